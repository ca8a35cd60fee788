"""Known findings: failures of a target that a gate lets through, read from a file and held against
what a run shows. They stay in the report, and whatever else fails still fails.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from verify.case import Case
from verify.errors import BadArgument
from verify.finding import Finding
from verify.property import CHECKS
from verify.runner.record import KnownOutcome, Record
from verify.verdict import Judgement, Verdict, worst

_HEAD = ("target", "version", "finding")
_REQUIRED = ("property", "reason", "reference")
_OPTIONAL = ("words", "pattern", "check", "case")

Rerun = Callable[[str, Case], Judgement | None]


def not_run(check: str, case: Case) -> None:
    """How a case is run again where none can be."""


@dataclass(frozen=True, kw_only=True)
class KnownFinding:
    """One known failure of a property.

    It explains a failure whose text has all `words` and, somewhere, the regular expression
    `pattern`. `check` and `case` are a case that shows it, with which a run can tell that the
    finding is gone from that it was not drawn.
    """

    property: str
    reason: str
    reference: str
    words: tuple[str, ...] = ()
    pattern: str = ""
    check: str = ""
    case: Case | None = None

    def explains(self, text: str) -> bool:
        """Whether this is the failure that `text` tells of."""
        flat = _flat(text)
        has_all = all(_flat(word) in flat for word in self.words)
        return has_all and re.search(self.pattern, flat) is not None


@dataclass(frozen=True)
class KnownFindings:
    """The known findings of one target in one version; none without a file."""

    findings: tuple[KnownFinding, ...] = ()

    @staticmethod
    def read(path: Path, *, target: str, version: str) -> KnownFindings:
        """The file's findings. Raises BadArgument, in one line, for a file that cannot be read, is
        no TOML, has other fields, or is of another target or version than these."""
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BadArgument(f"--known: cannot read {path}: {error.strerror or error}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadArgument(f"--known: {path} is no TOML: {error}") from error
        _check_fields(f"--known: {path}", data, _HEAD, ())
        for name, here in (("target", target), ("version", version)):
            if data[name] != here:
                raise BadArgument(
                    f"--known: {path} is of {name} {data[name]!r}, this run of {here!r};"
                    " give the file of this one, or leave --known out"
                )
        entries = data["finding"]
        if not isinstance(entries, list):
            raise BadArgument(f"--known: {path}: write each finding under [[finding]]")
        return KnownFindings(
            tuple(_finding(f"--known: {path}: finding {n}", e) for n, e in enumerate(entries, 1))
        )

    def check_properties(self, path: Path, names: Collection[str]) -> None:
        """Raise BadArgument where an entry names a property that there is not."""
        for number, each in enumerate(self.findings, 1):
            if each.property not in names:
                raise BadArgument(
                    f"--known: {path}: finding {number}: there is no property {each.property!r};"
                    " see `shardproof suites`"
                )

    def number(self, name: str, finding: Finding) -> int | None:
        """Which of the findings that are known of a property is this one; None if none is."""
        if not (listed := self._listed(name)):
            return None
        text = _text(finding)
        return next((n for n, each in enumerate(listed) if each.explains(text)), None)

    def _listed(self, name: str) -> list[KnownFinding]:
        return [each for each in self.findings if each.property == name.partition("[")[0]]

    def applied(self, record: Record, rerun: Rerun = not_run) -> Record:
        """The record with what it shows of the findings that are known of its property, in the
        order in which they are listed.

        `failed` becomes `failed (known)` where each part of the failure is explained. The case of a
        finding that did not show is run with `rerun`, which returns None where it cannot run here.
        Of a property that is unknown only what it showed before that is looked at.
        """
        listed = self._listed(record.property)
        texts, unknown = _texts(record), record.verdict is Verdict.UNKNOWN
        if not listed or (unknown and not texts):
            return record
        seen = [each for each in listed if any(map(each.explains, texts))]
        if (
            not unknown
            and texts
            and all(any(each.explains(text) for each in seen) for text in texts)
        ):
            record = replace(record, verdict=Verdict.KNOWN)
        for each in listed:
            outcome = KnownOutcome(each.reason, each.reference, "fails")
            if each not in seen:
                how = not_run if unknown else rerun
                record, outcome = _looked_for(each, record, outcome, how)
            record = replace(record, known=(*record.known, outcome))
        return record


def _looked_for(
    finding: KnownFinding, record: Record, outcome: KnownOutcome, rerun: Rerun
) -> tuple[Record, KnownOutcome]:
    """What is known of a finding that the drawn examples did not show."""
    unseen = replace(outcome, state="not seen")
    now = rerun(finding.check, finding.case) if finding.case is not None else None
    if now is None:
        return record, unseen
    if now.verdict is Verdict.PASSED:
        return record, replace(outcome, state="no longer fails")
    if now.verdict is Verdict.NOT_SUPPORTED:
        return record, unseen
    reason = f"the case of a known finding ({finding.reason}): "
    if now.verdict is Verdict.FAILED and now.finding is not None:
        if finding.explains(_text(now.finding)):
            return record, replace(outcome, state="fails when its case is run")
        record = replace(record, findings=(*record.findings, now.finding))
        return record.worsened(Verdict.FAILED, f"{reason}it fails in another way"), unseen
    return record.worsened(worst((now.verdict, Verdict.UNKNOWN)), reason + now.reason), unseen


def _texts(record: Record) -> list[str]:
    """Each part of a failure: its findings, and what is said besides."""
    said = record.verdict is Verdict.FAILED and record.reason
    return [*map(_text, record.findings), *([said] if said else [])]


def _text(finding: Finding) -> str:
    return f"{finding.check} {finding.kind}\n{finding.message()}"


def _flat(text: str) -> str:
    return " ".join(text.split())


def _finding(where: str, data: Any) -> KnownFinding:
    if not isinstance(data, Mapping):
        raise BadArgument(f"{where}: it is no table; write it under [[finding]]")
    _check_fields(where, data, _REQUIRED, _OPTIONAL)
    words = data.get("words", [])
    if not isinstance(words, list) or not all(isinstance(w, str) and w.strip() for w in words):
        raise BadArgument(f'{where}: words: {words!r} is no list of texts like ["tp=2"]')
    for name in (*_REQUIRED, "pattern", "check", "case"):
        if not isinstance(given := data.get(name, "-"), str) or not given.strip():
            raise BadArgument(f"{where}: {name}: {given!r} is no text")
    pattern = data.get("pattern", "")
    try:
        re.compile(pattern)
    except re.error as error:
        said = f"{pattern!r} is no regular expression: {error}"
        raise BadArgument(f"{where}: pattern: {said}") from error
    if ("check" in data) != ("case" in data):
        raise BadArgument(f"{where}: give check and case together, or neither")
    if "check" in data and data["check"] not in CHECKS:
        raise BadArgument(f"{where}: check: {data['check']!r} is not one of {', '.join(CHECKS)}")
    kept = {name: data[name] for name in (*_REQUIRED, "pattern", "check") if name in data}
    return KnownFinding(**kept, words=tuple(words), case=_case(where, data.get("case")))


def _case(where: str, text: str | None) -> Case | None:
    if text is None:
        return None
    try:
        return Case.from_json(json.loads(text))
    except (json.JSONDecodeError, BadArgument) as error:
        raise BadArgument(
            f"{where}: case is not as in a failure file's `case`, as JSON: {error}"
        ) from error


def _check_fields(
    where: str, data: Mapping[str, Any], required: Sequence[str], optional: Sequence[str]
) -> None:
    missing = [name for name in required if name not in data]
    foreign = sorted(set(data) - {*required, *optional})
    if missing or foreign:
        allowed = ", ".join((*required, *optional))
        problem = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(foreign)}"
        raise BadArgument(f"{where} {problem}; its fields are {allowed}")
