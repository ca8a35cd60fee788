"""Draws that cover pairs: a covering array built one case at a time, in the order of its draws.

Strategies name their choices (`chosen`). While a property runs, a choice that Hypothesis would make
at random takes the value that makes most pairs, with what this case has already, that no case of
the property had (the greedy step of AETG: Cohen et al., IEEE TSE 23(7), 1997); where none makes a
new one, Hypothesis chooses. A pair that was drawn `TRIES` times and never checked, because the case
was rejected or is not supported, is given up.

Only choices that are random are steered: what Hypothesis replays, mutates or shrinks is as it wants
it. What was on offer beside what was drawn is what else could have been: the pairs that
`--require-pairs` requires.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.control import current_build_context

from verify.case import Case
from verify.coverage.factors import Pair, alone, pair_of, pairs_of, row_of, text_of

T = TypeVar("T")
TRIES = 3
CONCEPT = "concept"
_MANY = 2**16


class Steering:
    """What one property has drawn, been offered and checked, by concept. It steers while `active`:
    until the property fails, and Hypothesis looks for a smaller case.

    What is drawn next depends on the cases that reached a check, `seen`, whatever came of them, so
    that it is the same for every target and cluster; what was exercised is what passed, `shown`.
    """

    def __init__(self) -> None:
        self.active = True
        self.seen: dict[str, set[Pair]] = defaultdict(set)
        self.shown: dict[str, set[Pair]] = defaultdict(set)
        self.drawn: dict[str, Counter[Pair]] = defaultdict(Counter)
        self.offered: dict[str, set[Pair]] = defaultdict(set)
        self._values: dict[str, set[tuple[str, str]]] = defaultdict(set)
        self._tried: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
        self._left: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
        self._defaults: dict[str, dict[str, object]] = defaultdict(dict)
        self._concepts: Counter[str] = Counter()
        self._case: dict[str, str] = {}
        self._concept = ""
        self._data: object = None
        # Ties are broken alike in every run.
        self._random = Random(0)

    def default(self, concept: str, option: str, value: object) -> None:
        """Cases of the concept leave the option out where it has this value."""
        self._defaults[concept][option] = value

    def best(self, data: object, factor: str, values: Sequence[str]) -> int | None:
        """The index of the value to choose; None where none is better than any other."""
        if data is not self._data:
            self._data, self._case, self._concept = data, {}, ""
        if factor == CONCEPT:
            gains = {value: (-self._concepts[value], False) for value in values}
        else:
            gains = {value: self._gain(factor, value) for value in dict.fromkeys(values)}
        most = max(gains.values())
        best = [value for value, gain in gains.items() if gain == most]
        if len(best) == len(gains):
            return None
        return values.index(self._random.choice(best))

    def chose(self, factor: str, value: str) -> None:
        """A choice is made."""
        if factor == CONCEPT:
            self._concept = value
            self._concepts[value] += 1
            return
        drawn = self.drawn[self._concept]
        self._tried[self._concept][factor, value] += 1
        for given in self._case.items():
            pair = pair_of(factor, value, *given)
            drawn[pair] += 1
            if drawn[pair] == TRIES:
                self._close(self._concept, pair)
        self._case[factor] = value

    def reached(self, case: Case) -> None:
        """A case is going to be checked."""
        seen = self.seen[case.concept]
        for pair in pairs_of(self._row(case)):
            if pair not in seen:
                if self.drawn[case.concept][pair] < TRIES:
                    self._close(case.concept, pair)
                seen.add(pair)

    def checked(self, case: Case) -> dict[str, str]:
        """A case passed a check; its row."""
        row = self._row(case)
        self.shown[case.concept].update(pairs_of(row))
        return row

    def _row(self, case: Case) -> dict[str, str]:
        chosen = {"etp": None} if "etp" in self._case else {}
        return row_of(case, {**self._defaults[case.concept], **chosen})

    def open(self) -> Iterator[tuple[str, Pair, bool]]:
        """The concept and the pair of all that was on offer and did not pass, and whether it was
        given up, or only ever reached a check that could not say; of concepts of which something
        passed. Of a value that no such case has, `alone`."""
        for concept in sorted(each for each, pairs in self.shown.items() if pairs):
            seen, shown = self.seen[concept], self.shown[concept]
            for pair in sorted(self.offered[concept] - shown):
                yield concept, pair, self.drawn[concept][pair] >= TRIES or pair in seen
            had = {value for pair in shown for value in (pair[:2], pair[2:])}
            for value in sorted(self._values[concept] - had):
                yield concept, alone(*value), self._tried[concept][value] >= TRIES

    def _gain(self, factor: str, value: str) -> tuple[int, bool]:
        """How many new pairs a value makes with what the case has, and whether any may be left with
        whatever it may have: some of a value that no case had."""
        seen, drawn = self.seen[self._concept], self.drawn[self._concept]
        offered, left = self.offered[self._concept], self._left[self._concept]
        new = 0
        self._values[self._concept].add((factor, value))
        for given in self._case.items():
            pair = pair_of(factor, value, *given)
            wanted = pair not in seen and drawn[pair] < TRIES
            new += wanted
            if pair not in offered:
                offered.add(pair)
                if wanted:
                    left.update((pair[:2], pair[2:]))
        return new, left[factor, value] > 0 or not self._tried[self._concept][factor, value]

    def _close(self, concept: str, pair: Pair) -> None:
        """The pair is wanted no more."""
        if pair in self.offered[concept] and pair not in self.seen[concept]:
            self._left[concept].subtract((pair[:2], pair[2:]))


class _Present:
    steering: Steering | None = None


@contextmanager
def steered(steering: Steering | None) -> Iterator[None]:
    """While inside, choices of this process are steered, or not."""
    before, _Present.steering = _Present.steering, steering
    try:
        yield
    finally:
        _Present.steering = before


def note_default(case: Case, option: str, default: object) -> None:
    """Tell the steering, if there is one, at what value an option is left out of a case."""
    if _Present.steering is not None:
        _Present.steering.default(case.concept, option, default)


def chosen(
    draw: st.DrawFn, factor: str, values: Sequence[T], key: Callable[[T], object] | None = None
) -> T:
    """Draw one of these values of a factor. The first is the simplest; `key` is what a value comes
    to, where that is not the value itself."""
    strategy = st.sampled_from(list(values))
    steering = _Present.steering
    if steering is not None and factor == CONCEPT:
        # Hypothesis itself chooses as much as it needs to repeat nothing: with this, no more.
        draw(st.integers(0, _MANY))
    if steering is None or not steering.active:
        return draw(strategy)
    texts = [text_of(value if key is None else key(value)) for value in values]
    data = current_build_context().data
    index = steering.best(data, factor, texts)
    if index is None:
        value = draw(strategy)
    else:
        with _picking(data, index):
            value = draw(strategy)
    steering.chose(factor, text_of(value if key is None else key(value)))
    return value


@contextmanager
def _picking(data: Any, index: int) -> Iterator[None]:
    """While inside, the random choice of `data` is this index; a replayed one is what it was."""
    before = data.provider
    data.provider = _Picks(before, index)
    try:
        yield
    finally:
        data.provider = before


class _Picks:
    """Hypothesis' source of randomness, but for whole numbers."""

    def __init__(self, provider: object, index: int) -> None:
        self._provider, self._index = provider, index

    def draw_integer(self, *args: Any, **constraints: Any) -> int:
        """The index."""
        return self._index

    def __getattr__(self, name: str) -> Any:
        return getattr(self._provider, name)
