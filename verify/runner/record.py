"""What is known of one property after its examples: a row of the report, and its findings.

Records are made where properties run and travel to where the report is written as JSON.
"""

from __future__ import annotations

import builtins
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from verify.coverage.factors import Pair
from verify.finding import Finding
from verify.verdict import Verdict, worst

# The reason of a verdict of which no more is known.
NOT_RUN = "it did not run to its end"
# A concept, a pair of its factors, and whether it was drawn and could never be checked.
Open = tuple[str, Pair, bool]


@dataclass(frozen=True)
class Unsupported:
    """Examples that the target declared not to support, for one reason; `example` is one case."""

    reason: str
    count: int
    example: str


@dataclass(frozen=True)
class KnownOutcome:
    """A known finding of a property and what came of it: the property fails so, or only the case
    that is on record does, or that case passes now, or nothing was seen of it."""

    reason: str
    reference: str
    state: Literal["fails", "fails when its case is run", "no longer fails", "not seen"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """A property, its verdict and why, and what its examples covered.

    `examples` counts those up to the first failure that is not known; `compared` is how much was
    compared in them, as the checks tell, which is elements of tensors for most; `digest` is of all
    that was drawn for them; the rest are counts of those that were checked: `layouts` by their JSON
    text, `arithmetic` by lens and dtype, `options` by concept and value, `rows` by all factors
    (`verify.coverage`). `open` are pairs that were on offer and in no example.
    `left_out` counts what was drawn and could not be run here, or not be judged, by reason.
    `traceback` is that of an error that no finding describes. `known` is what came of the findings
    known of the property.
    """

    property: str
    verdict: Verdict
    reason: str = ""
    examples: int = 0
    compared: int = 0
    digest: str = ""
    seconds: float = 0.0
    layouts: Mapping[str, int] = field(default_factory=dict)
    arithmetic: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, int] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    open: tuple[Open, ...] = ()
    not_supported: tuple[Unsupported, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    known: tuple[KnownOutcome, ...] = ()
    findings: tuple[Finding, ...] = ()
    traceback: str = ""

    @builtins.property
    def suite(self) -> str:
        """The suite that the property is in."""
        return self.property.partition(".")[0]

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON types from which `from_json` makes an equal record."""
        return {
            "property": self.property,
            "verdict": self.verdict.value,
            "reason": self.reason,
            "examples": self.examples,
            "compared": self.compared,
            "digest": self.digest,
            "seconds": round(self.seconds, 3),
            "layouts": dict(self.layouts),
            "arithmetic": dict(self.arithmetic),
            "options": dict(self.options),
            "rows": dict(self.rows),
            "open": [[concept, list(pair), tried] for concept, pair, tried in self.open],
            "not_supported": [vars(each) for each in self.not_supported],
            "left_out": dict(self.left_out),
            "known": [vars(each) for each in self.known],
            "findings": [finding.to_json() for finding in self.findings],
            "traceback": self.traceback,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Record:
        """The record that `to_json` described."""
        return Record(
            **{
                **data,
                "verdict": Verdict(data["verdict"]),
                "not_supported": tuple(Unsupported(**each) for each in data["not_supported"]),
                "open": tuple((each, tuple(pair), tried) for each, pair, tried in data["open"]),
                "known": tuple(KnownOutcome(**each) for each in data["known"]),
                "findings": tuple(Finding.from_json(each) for each in data["findings"]),
            }
        )

    def worsened(self, verdict: Verdict, reason: str) -> Record:
        """The same record after something more went wrong."""
        together = "\n".join(text for text in (self.reason, reason) if text)
        return replace(self, verdict=worst((self.verdict, verdict)), reason=together)


def total(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The sums of several counts, by name, the most frequent first."""
    found: dict[str, int] = {}
    for each in counts:
        for name, count in each.items():
            found[name] = found.get(name, 0) + count
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def layout_key(layout: Mapping[str, Any]) -> str:
    """A layout's JSON as a text that is the same for equal layouts."""
    return json.dumps(layout, sort_keys=True, separators=(",", ":"))


def property_name(nodeid: str) -> str:
    """The name of a property, `suite.property`, from a test's id: `linear.is_equivalent[x]` of
    `properties/test_linear.py::test_is_equivalent[x]`."""
    path, *names = nodeid.split("::")
    suite = path.rpartition("/")[2].removesuffix(".py").removeprefix("test_")
    return ".".join([suite, *(name.removeprefix("test_") for name in names)])


def file_name(name: str) -> str:
    """A property's name as that of its failure file."""
    return re.sub(r"[^\w.=-]+", "_", name).strip("_") + ".json"
