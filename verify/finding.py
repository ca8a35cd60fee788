"""What a check found wrong: everything that is known of one failure, and the text for people.

The human text of a failure is made here and nowhere else, by `Finding.message`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from verify.case import Case
from verify.errors import BadArgument

WIDTH = 100
_LISTED = 6
# An explanation of less than this part of the error is none.
LIKELY = 0.8

Kind = Literal[
    "value",  # not what the reference computes
    "copies",  # copies of one tensor differ between ranks
    "bits",  # two runs differ that must not
    "masks",  # dropout masks that copies do not share, or parts do
    "communication",  # more, less or something else was sent than promised
    "traffic",  # in training, too late, too large, too small or for nothing
    "waiting",  # what was begun was never waited for
    "memory",  # more was kept for backward than promised
    "random state",  # a random generator does not draw what it has to
    "missing",  # a tensor or a gradient that should be there is not
    "unexpected",  # one is there that should not
    "shape",
    "dtype",
    "contract",  # names or placements that do not fit what the concept promises
    "crash",  # the target raised
    "deadlock",
    "collective",  # members of a group issued collectives that do not fit
    "rerun",  # what is computed again is not what was computed
    "unrepeatable",  # what is computed again cannot be what was computed, and is not refused
    "refusal",  # a case that must be refused was not, or not clearly
    "misfit",  # inputs that do not fit were computed
    "groups",
    "initialisation",  # parameters before training that are not as promised
    "schedule",  # a table of a pipeline schedule that breaks a law
]
KINDS = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A tensor that is wrong, on the rank where it is most wrong.

    `index` is that of the worst element in the local tensor; `error` and `bound` are in the norm
    named by `norm` (`element`, `row`, `tensor`, `factor`). `ranks` are all ranks on which it is
    wrong.
    Without an index the tensor as such is wrong, and `detail` says how.
    """

    tensor: str
    kind: Kind
    rank: int
    coordinates: Mapping[str, int]
    ranks: tuple[int, ...]
    index: tuple[int, ...] | None = None
    reference: float | None = None
    candidate: float | None = None
    error: float | None = None
    bound: float | None = None
    norm: str = "element"
    detail: str = ""


@dataclass(frozen=True)
class Explanation:
    """A possible cause, as a sentence, and how much of the error it accounts for: 1.0 for all, 0.0
    for what only says where the error is."""

    sentence: str
    score: float


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One failure of `check` on `case`: the divergent tensors in the order of execution, ranked
    explanations of the first, and, for a crash, `details` with every rank's message."""

    check: str
    kind: Kind
    target: str
    case: Case
    divergences: tuple[Divergence, ...] = ()
    explanations: tuple[Explanation, ...] = ()
    details: tuple[str, ...] = ()

    @property
    def first(self) -> Divergence | None:
        """The first divergent tensor in the order of execution."""
        return self.divergences[0] if self.divergences else None

    def message(self, report: str = "REPORT.json") -> str:
        """One paragraph for people, and the command that replays it; lines of at most 100."""
        sentences = [self._what()]
        if self.explanations and self.explanations[0].score >= LIKELY:
            sentences.append(f"Likeliest cause: {self.explanations[0].sentence}.")
        elif self.explanations:
            sentences.append(f"No known cause accounts for it; {self.explanations[0].sentence}.")
        if others := self.divergences[1:]:
            names = [other.tensor for other in others[:_LISTED]]
            more = f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
            sentences.append(f"Wrong after it: {', '.join(names)}{more}.")
        sentences.append(f"Case: {self.case}.")
        lines = textwrap.wrap(" ".join(sentences), WIDTH, break_on_hyphens=False)
        for detail in self.details:
            lines += textwrap.wrap(
                detail, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
            )
        return "\n".join([*lines, f"Replay: shardproof repro {report}"])

    def table(self) -> str:
        """Every divergent tensor, one line each, in the order of execution."""
        rows = [("tensor", "rank", "index", "reference", "candidate", "error", "allowed")]
        for each in self.divergences:
            index = "" if each.index is None else str(list(each.index))
            numbers = (each.reference, each.candidate, each.error, each.bound)
            shown = ["" if number is None else f"{number:.6g}" for number in numbers]
            rows.append((each.tensor, str(each.rank), index or each.kind, *shown))  # type: ignore[arg-type]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)

    def _what(self) -> str:
        subject = f"{self.target}, {self.case.concept}"
        first = self.first
        if first is None:
            return f"{subject}: {_HEADLINES[self.kind]}."
        place = f"{first.tensor} on rank {first.rank}{_coordinates(first.coordinates)}"
        wrong = _ranks(first.ranks, self.case.layout.world_size)
        if first.index is None:
            return f"{subject}: {place} {first.detail} ({wrong})."
        return f"{subject}: {place} {self._numbers(first)} ({wrong})."

    def _numbers(self, first: Divergence) -> str:
        at = f"[{', '.join(map(str, first.index or ()))}]"
        candidate, reference = _digits(first.candidate, first.reference)
        text = f"is {candidate} at {at}"
        if first.kind in ("copies", "bits"):
            return f"{text} and {reference} {first.detail}"
        text += f" and should be {reference}" + f" {first.detail}" * bool(first.detail)
        if first.error is None or first.bound is None:
            return text
        allowed = (
            "exact equality is required" if first.bound == 0 else f"allowed is {first.bound:.3g}"
        )
        if not math.isfinite(first.candidate or 0.0):
            return text
        where = _WHERE.get(first.norm, "")
        return f"{text}; the error{where} is {first.error:.3g}, {allowed}"

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON types; numbers that are not finite are strings."""
        return {
            "check": self.check,
            "kind": self.kind,
            "target": self.target,
            "case": self.case.to_json(),
            "divergences": [
                {name: _plain(value) for name, value in asdict(each).items()}
                for each in self.divergences
            ],
            "explanations": [asdict(each) for each in self.explanations],
            "details": list(self.details),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Finding:
        """The finding that `to_json` described. Raises BadArgument naming the first wrong field."""
        if not isinstance(data, Mapping):
            raise BadArgument(f"finding: expected an object, got {type(data).__name__}")
        fields = ("check", "kind", "target", "case", "divergences", "explanations", "details")
        if set(data) != set(fields):
            missing, foreign = sorted(set(fields) - set(data)), sorted(set(data) - set(fields))
            raise BadArgument(f"finding: missing fields {missing}, unknown fields {foreign}")
        if data["kind"] not in KINDS:
            raise BadArgument(f"finding.kind: {data['kind']!r} is not one of {', '.join(KINDS)}")
        try:
            return Finding(
                check=str(data["check"]),
                kind=data["kind"],
                target=str(data["target"]),
                case=Case.from_json(data["case"]),
                divergences=tuple(_divergence(each) for each in data["divergences"]),
                explanations=tuple(Explanation(**each) for each in data["explanations"]),
                details=tuple(str(each) for each in data["details"]),
            )
        except (TypeError, KeyError) as error:
            raise BadArgument(f"finding: {error}") from error


_WHERE: Mapping[str, str] = {
    "row": " over its row",
    "tensor": " over the tensor",
    "factor": " as a factor on the tensor",
}
_HEADLINES: Mapping[str, str] = {
    "crash": "the target raised on a case that it has to compute",
    "deadlock": "no rank can go on",
    "collective": "members of a group issued collectives that do not fit each other",
    "contract": "the target's tensors are not those that the concept promises",
    "communication": "what was communicated is not what the concept promises",
    "traffic": "training communicates late, in other buckets than asked for, or what is known",
    "waiting": "communication that was begun is never waited for",
    "memory": "more is kept for backward than the concept promises",
    "random state": "random generators do not draw what they have to",
    "rerun": "what is computed again in backward is not what was computed in forward",
    "unrepeatable": "a function that computes something else in backward must be refused",
    "refusal": "the case must be refused on every rank with an error that names what is wrong",
    "misfit": "inputs that do not fit were computed, which one device refuses",
    "groups": "the process groups are not those of the layout",
    "initialisation": "parameters are not initialised as promised",
    "schedule": "the table of the schedule is not well-formed",
}


def _coordinates(coordinates: Mapping[str, int]) -> str:
    inside = ", ".join(f"{axis}={index}" for axis, index in coordinates.items())
    return f" ({inside})" if inside else ""


def _ranks(ranks: Sequence[int], world_size: int) -> str:
    if len(ranks) == world_size:
        return "so on every rank" if world_size > 1 else "one rank"
    word = "rank" if len(ranks) == 1 else "ranks"
    shown = ", ".join(map(str, ranks[:_LISTED])) + (", ..." if len(ranks) > _LISTED else "")
    return f"wrong on {word} {shown} of {world_size}"


def _digits(*values: float | None) -> tuple[str, ...]:
    """Numbers in nine digits, or in as many as tell them apart."""
    given = [float("nan") if value is None else value for value in values]
    short = [f"{value:.9g}" for value in given]
    return tuple(short if len(set(short)) == len(short) else [repr(value) for value in given])


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _divergence(data: Mapping[str, Any]) -> Divergence:
    values = dict(data)
    for name in ("reference", "candidate", "error", "bound"):
        if values.get(name) is not None:
            values[name] = float(values[name])
    values["ranks"] = tuple(values["ranks"])
    values["index"] = None if values["index"] is None else tuple(values["index"])
    return Divergence(**values)
