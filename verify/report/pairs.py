"""What the page shows of the pairs of values: a triangle of factors for each concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SHADES = 5


@dataclass(frozen=True)
class Share:
    """Of the pairs of two factors' values, how many were exercised; `shade` is from 0 (none) to 5
    (all)."""

    seen: int
    of: int

    @property
    def shade(self) -> int:
        """0 for none, 5 for all."""
        return 0 if not self.seen else 1 + (_SHADES - 1) * self.seen // self.of


@dataclass(frozen=True)
class Triangle:
    """One concept: its values with their counts, and a row for each factor but the first, with a
    share for each factor before it."""

    concept: str
    examples: int
    factors: Mapping[str, Mapping[str, int]]
    rows: Sequence[tuple[str, Sequence[Share]]]
    exercised: int
    missed: Sequence[str]
    undecided: Sequence[str]

    @property
    def across(self) -> list[str]:
        """The factors that head a column."""
        return list(self.factors)[:-1]


def triangle(space: Mapping[str, Any]) -> Triangle:
    """The triangle of a concept in a report."""
    names = list(space["factors"])
    shares = {}
    for pair in space["pairs"]:
        counts = [count for row in pair["counts"] for count in row]
        shares[tuple(pair["factors"])] = Share(sum(n > 0 for n in counts), len(counts))
    return Triangle(
        concept=space["concept"],
        examples=space["examples"],
        factors=space["factors"],
        rows=[
            (name, [shares[before, name] for before in names[:at]])
            for at, name in enumerate(names)
            if at
        ],
        exercised=sum(share.seen for share in shares.values()),
        missed=space["missed"],
        undecided=space["undecided"],
    )
