"""Finds the mutation score: surveys the properties, runs them on every mutant, sums up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol

from verify.errors import HarnessError
from verify.mutants import AnyMutant
from verify.mutants.equivalent import Equivalents
from verify.mutants.generated import Generated
from verify.mutation.claims import Claim, claims
from verify.mutation.document import describe
from verify.mutation.outcome import Fate, Outcome, examine, survey
from verify.mutation.pool import Lost, Pool
from verify.mutation.trials import Surveyed
from verify.runner.options import RunOptions
from verify.runner.suites import suites

TARGET = "impl"
# A mutant that takes longer is not known to be caught.
_SECONDS_OF_A_MUTANT = 900.0
# An example that never ends is ended by the cluster, unless a rank computes for ever.
_SECONDS_OF_AN_EXAMPLE = 120.0
_DRAWN, _TRACED = 20, 12
# Of so many hand-made ones it is soon made up for to see which lines every property reaches.
_SEVERAL = 20


# What is chosen of what the properties' examples communicate.
Choice = Callable[[Sequence[Surveyed]], Sequence[AnyMutant]]


class Watcher(Protocol):
    """Is told how it goes."""

    def phase(self, what: str, total: int) -> None:
        """So many things will be done."""

    def begun(self, name: str) -> None:
        """One of them has begun."""

    def done(self, name: str, outcome: Outcome | None) -> None:
        """One of them is done."""


def score(
    chosen: Sequence[AnyMutant] | Choice,
    options: RunOptions,
    *,
    workers: int,
    shrink: bool,
    every: bool,
    within: float | None,
    watcher: Watcher,
) -> tuple[dict[str, Any], dict[str, Outcome]]:
    """The document of a run of these mutants of one kind, or of those that are chosen by what the
    survey found, and what came of each, by name. Raises HarnessError where properties cannot be
    surveyed, because then nothing can be said."""
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    mutants = () if callable(chosen) else chosen
    listed = Equivalents.read()
    for each in mutants:
        # One that does not fit the source is told before anything is surveyed.
        claims(each, ())
    traced = callable(chosen) or len(mutants) >= _SEVERAL or isinstance(mutants[0], Generated)
    with Pool(workers, timeout=_SECONDS_OF_A_MUTANT) as pool:
        known = _surveyed(options, pool, watcher, traced=traced)
        if callable(chosen):
            mutants = chosen(known)
        if within is not None and not shrink:
            pool.timeout = min(within + _SECONDS_OF_AN_EXAMPLE, _SECONDS_OF_A_MUTANT)
        by_mutant = {each.name: claims(each, known) for each in mutants}
        how: dict[str, Any] = {"shrink": shrink, "every": every, "within": within}
        outcomes = dict(_outcomes(by_mutant, options, how, pool, watcher))
    document = describe(
        [(each, outcomes[each.name], listed.reason(each)) for each in mutants],
        options,
        target=TARGET,
        started=started,
        seconds=time.monotonic() - began,
        workers=workers,
        **how,
    )
    return document, outcomes


def _surveyed(options: RunOptions, pool: Pool, watcher: Watcher, *, traced: bool) -> list[Surveyed]:
    """What the properties of the wanted suites are about."""
    names = [
        f"{suite.name}.{name}"
        for suite in suites()
        for name in suite.properties
        if not options.suites or suite.name in options.suites
    ]
    examples, trace = (_TRACED, TARGET) if traced else (_DRAWN, None)
    tasks = {
        name: partial(survey, name, options, target=TARGET, trace=trace, examples=examples)
        for name in names
    }
    watcher.phase("properties to survey", len(names))
    found: dict[str, Surveyed] = {}
    for name, result in pool.run(tasks, started=watcher.begun):
        if isinstance(result, Lost):
            raise HarnessError(f"survey of {name}: {result.reason}")
        found[name] = result
        watcher.done(name, None)
    return [found[name] for name in names]


def _outcomes(
    by_mutant: dict[str, list[Claim]],
    options: RunOptions,
    how: dict[str, Any],
    pool: Pool,
    watcher: Watcher,
) -> Iterator[tuple[str, Outcome]]:
    tasks: dict[str, Callable[[], Outcome]] = {
        name: partial(examine, f"{TARGET}@{name}", claimed, options, **how)
        for name, claimed in by_mutant.items()
    }
    watcher.phase("mutants", len(tasks))
    for name, result in pool.run(tasks, started=watcher.begun):
        if isinstance(result, Lost):
            result = Outcome(fate=Fate.UNKNOWN, reason=result.reason)
        watcher.done(name, result)
        yield name, result
