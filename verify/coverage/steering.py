"""Draws that cover pairs: a covering array built one case at a time, in the order of its draws.

Strategies name their choices (`chosen`). While a property runs, a choice that Hypothesis would make
at random takes the value that makes most pairs, with what this case has already, that no case of
the property had (the greedy step of AETG: Cohen et al., IEEE TSE 23(7), 1997), the likelier the
more are left of it; where no value makes any and none are left, Hypothesis chooses. Factors of
which one leaves others no room, as sizes in a world, are steered together (`foresee`). A pair that
was drawn `TRIES` times and never checked, because the case was rejected or is not supported, is
given up.

Only choices that are random are steered: what Hypothesis replays, mutates or shrinks is as it wants
it. What was on offer beside what was drawn is what else could have been: the pairs that
`--require-pairs` requires.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.control import current_build_context

from verify.case import Case
from verify.coverage.factors import Pair, alone, pair_of, pairs_of, row_of, text_of
from verify.errors import HarnessError

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
        self._plan: Mapping[str, str] = {}
        self._concept = ""
        self._data: object = None
        # Ties are broken alike in every run.
        self._random = Random(0)

    def default(self, concept: str, option: str, value: object) -> None:
        """Cases of the concept leave the option out where it has this value."""
        self._defaults[concept][option] = value

    def best(self, data: object, factor: str, values: Sequence[str]) -> int | None:
        """The index of the value to choose: what was foreseen, or one of the best; None where none
        is better than any other."""
        self._begin(data)
        if factor == CONCEPT:
            gains = [(-self._concepts[value], 0) for value in values]
        else:
            gains = [self._gain(self._case, factor, value) for value in values]
        if self._plan.get(factor) in values:
            return values.index(self._plan[factor])
        return self._one_of_the_best(gains)

    def foresee(self, data: object, rows: Sequence[Mapping[str, str]]) -> None:
        """Choose the factors of these rows, when they are chosen, as the best of the rows has
        them. Of no rows nothing is foreseen."""
        self._begin(data)
        if not rows:
            return
        gains = []
        for row in rows:
            case = dict(self._case)
            new = left = 0
            for factor, value in row.items():
                more, its = self._gain(case, factor, value)
                new, left = new + more, left + its
                case[factor] = value
            gains.append((new, left))
        index = self._one_of_the_best(gains)
        self._plan = {} if index is None else rows[index]

    def _begin(self, data: object) -> None:
        if data is not self._data:
            self._data, self._case, self._plan, self._concept = data, {}, {}, ""

    def _one_of_the_best(self, gains: Sequence[tuple[int, int]]) -> int | None:
        """The index of one of those that make most new pairs: the likelier the more are left of it,
        by the square of their number. None where all make as many and nothing is left of any."""
        most = max(new for new, _ in gains)
        weights = [left**2 * (new == most) for new, left in gains]
        if not any(weights):
            weights = [new == most for new, _ in gains]
            if all(weights):
                return None
        return self._random.choices(range(len(gains)), weights)[0]

    def chose(self, factor: str, value: str) -> None:
        """A choice is made; that of a concept begins a case, as where a filter wants another."""
        if factor == CONCEPT:
            self._case, self._plan, self._concept = {}, {}, value
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
        """A case is going to be checked. Raises HarnessError where its choices were made for
        another concept: what they cover would be nobody's."""
        if self.active and self._concept not in ("", case.concept):
            raise HarnessError(f"steering: {case} was drawn as one of {self._concept}")
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

    def _gain(self, case: Mapping[str, str], factor: str, value: str) -> tuple[int, int]:
        """How many new pairs a value makes with what a case has, one more if no case had it, and
        how many are left of it, whatever with."""
        seen, drawn = self.seen[self._concept], self.drawn[self._concept]
        offered, left = self.offered[self._concept], self._left[self._concept]
        new = int(not self._tried[self._concept][factor, value])
        self._values[self._concept].add((factor, value))
        for given in case.items():
            pair = pair_of(factor, value, *given)
            wanted = pair not in seen and drawn[pair] < TRIES
            new += wanted
            if pair not in offered:
                offered.add(pair)
                if wanted:
                    left.update((pair[:2], pair[2:]))
        return new, left[factor, value]

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
    data = current_build_context().data
    texts = [text_of(value if key is None else key(value)) for value in values]
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


def foresee(rows: Iterable[Mapping[str, object]]) -> None:
    """Tell what the choices of several factors that follow may come to together: values of one
    may leave no room for those of another, and are steered with them. Each factor is chosen as
    always."""
    steering = _Present.steering
    if steering is not None and steering.active:
        texts = [{factor: text_of(value) for factor, value in row.items()} for row in rows]
        steering.foresee(current_build_context().data, texts)


class _Picks:
    """Hypothesis' source of randomness, but for whole numbers."""

    def __init__(self, provider: object, index: int) -> None:
        self._provider, self._index = provider, index

    def draw_integer(self, *args: Any, **constraints: Any) -> int:
        """The index."""
        return self._index

    def __getattr__(self, name: str) -> Any:
        return getattr(self._provider, name)
