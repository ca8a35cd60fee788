"""The space that a run covered: by concept, which values and which pairs of values were exercised,
and which were on offer and were not."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from verify.coverage.factors import FIXED, Pair, pairs_of, row_from, told
from verify.runner.record import Record

Values = dict[str, Counter[str]]


@dataclass
class Space:
    """One concept. `missed` are pairs that a case of the run could have had, and none had that was
    checked; `undecided` were drawn several times, and each time the case was rejected or is not
    supported."""

    concept: str
    examples: int = 0
    values: Values = field(default_factory=lambda: defaultdict(Counter))
    pairs: Counter[Pair] = field(default_factory=Counter)
    missed: set[Pair] = field(default_factory=set)
    undecided: set[Pair] = field(default_factory=set)

    @property
    def factors(self) -> dict[str, list[str]]:
        """The factors with more than one value: sizes and arithmetic, then options; their values in
        order."""
        names = [name for name in FIXED if len(self.values.get(name, ())) > 1]
        names += sorted(n for n, each in self.values.items() if n not in FIXED and len(each) > 1)
        return {name: sorted(self.values[name], key=_order) for name in names}

    def add(self, row: Mapping[str, str], count: int) -> None:
        """So many examples with the factors of a row."""
        self.examples += count
        for name, value in row.items():
            self.values[name][value] += count
        self.pairs.update(dict.fromkeys(pairs_of(row), count))

    def has(self, pair: Pair) -> bool:
        """Whether an example has the pair, or the value that stands alone."""
        factor, value, other, _ = pair
        return pair in self.pairs if other else value in self.values.get(factor, ())

    def to_json(self) -> dict[str, Any]:
        """Values with their counts; for every two factors a matrix of the counts of their pairs,
        the values of the first down and of the second across."""
        factors = self.factors
        return {
            "concept": self.concept,
            "examples": self.examples,
            "factors": {n: {v: self.values[n][v] for v in each} for n, each in factors.items()},
            "pairs": [
                {
                    "factors": [one, other],
                    "counts": [
                        [self._count(one, value, other, its) for its in factors[other]]
                        for value in factors[one]
                    ],
                }
                for one, other in combinations(factors, 2)
            ],
            "missed": [told(pair) for pair in sorted(self.missed)],
            "undecided": [told(pair) for pair in sorted(self.undecided)],
        }

    def _count(self, one: str, value: str, other: str, its: str) -> int:
        pair = (one, value, other, its) if one < other else (other, its, one, value)
        return self.pairs[pair]

    @property
    def exercised(self) -> int:
        """How many pairs of factors with more than one value were exercised."""
        several = set(self.factors)
        return sum(pair[0] in several and pair[2] in several for pair in self.pairs)


def spaces_of(records: Iterable[Record]) -> list[Space]:
    """The space of every concept of which something was checked, by name. A pair is missed or
    undecided only if no property exercised it."""
    found: dict[str, Space] = {}
    records = list(records)
    for record in records:
        for key, count in record.rows.items():
            concept, row = row_from(key)
            found.setdefault(concept, Space(concept)).add(row, count)
    for record in records:
        for concept, pair, given_up in record.open:
            space = found.get(concept)
            if space is not None and not space.has(pair):
                (space.undecided if given_up else space.missed).add(pair)
    for space in found.values():
        space.undecided -= space.missed
    return [found[concept] for concept in sorted(found)]


def pair_counts(spaces: Sequence[Space]) -> dict[str, int]:
    """Of all concepts: pairs exercised, missed, undecided."""
    return {
        "exercised": sum(space.exercised for space in spaces),
        "missed": sum(len(space.missed) for space in spaces),
        "undecided": sum(len(space.undecided) for space in spaces),
    }


def _order(value: str) -> tuple[int, float, str]:
    """Numbers by size, then words."""
    try:
        return 0, float(value), value
    except ValueError:
        return 1, 0.0, value
