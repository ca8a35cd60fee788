"""What came of one mutant, and how that is found out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from enum import Enum

from verify.errors import BadArgument, HarnessError
from verify.mutation.claims import NONE, Claim
from verify.mutation.trials import Surveyed, Trial, Trials
from verify.runner.options import RunOptions
from verify.runner.record import Record
from verify.targets import load_target
from verify.verdict import Verdict, worst

# The seconds of a property in each round but the last, which has all its examples. A round is as
# long as all before it: others have about twice the time that the one needs which fails, at most.
_ROUNDS = (0.25, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
# After so many nothing more is begun on a mutant that was caught, where every property is to run.
_SECONDS_OF_EVERY = 300.0
# In the first of them run only properties with examples that are known to reach what is changed.
_NEAR = 4


class Fate(Enum):
    """What came of a mutant. `unknown` is neither of the others, and counts as not caught."""

    CAUGHT = "caught"
    SURVIVED = "survived"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A mutant's fate, and what is to be said of it: why it is unknown, or that what caught it does
    not fail every time.

    `properties` ran, in this order; the last is the one that caught it first, if one did, and
    `record` is what is known of that. `failing` are all that were seen to fail, and of a mutant
    that is caught `undecided` those of which nobody knows. `examples` and `seconds` are until the
    first that failed, of all these properties, the time to load the mutant included; without one,
    until the end.
    """

    fate: Fate
    properties: tuple[str, ...] = ()
    examples: int = 0
    seconds: float = 0.0
    reason: str = ""
    record: Record | None = None
    failing: tuple[str, ...] = ()
    undecided: tuple[str, ...] = ()

    @property
    def caught_by(self) -> str | None:
        """The property that caught it."""
        return self.properties[-1] if self.fate is Fate.CAUGHT else None

    def by(
        self, failing: Sequence[str], *, ran: Iterable[str], undecided: Iterable[str] = ()
    ) -> Outcome:
        """The same, of these that fail, the first one first, and of those that ran."""
        others = (each for each in ran if each != failing[0])
        return replace(
            self,
            properties=(*others, failing[0]),
            failing=tuple(failing),
            undecided=tuple(undecided),
        )


def examine(
    target: str,
    claimed: Sequence[Claim],
    options: RunOptions,
    *,
    shrink: bool,
    every: bool = False,
    within: float | None = None,
) -> Outcome:
    """Run properties on a target that has a mutant in it, up to the first that fails, or `every`
    one to its end, or until so many seconds have passed.

    The properties take turns, in rounds that are longer each time: most mutants show at once, if
    not in the first property, and what takes long for an example must not keep others waiting. A
    property begins with those of its examples that are known to reach what is changed, where others
    do not; one of which none is known to do so waits for some rounds, if others need not.
    """
    if not claimed:
        return Outcome(fate=Fate.UNKNOWN, reason="no property is about it")
    trials = _Present.trials(options, shrink=shrink)
    began = time.monotonic()
    try:
        load_target(target)
    except (BadArgument, HarnessError) as error:
        return Outcome(fate=Fate.UNKNOWN, reason=str(error))
    # Of each that ran, in that order; and which that are telling have not run yet.
    examples: dict[str, int] = {}
    left = {each.property: each.telling for each in claimed}
    ran = 0
    verdicts: list[Verdict] = []
    unclear: list[tuple[str, Trial]] = []
    passed: set[str] = set()
    ended: set[str] = set()
    caught: Outcome | None = None
    failing: list[str] = []
    most = math.inf if within is None else within
    some_are_near = any(each.near for each in claimed)
    for rounds, turn in enumerate((*_ROUNDS, math.inf)):
        for claim in claimed:
            name = claim.property
            if name in ended or (some_are_near and not claim.near and rounds < _NEAR):
                continue
            so_far = time.monotonic() - began
            if so_far > (most if caught is None else min(most, _SECONDS_OF_EVERY)):
                break
            examples.setdefault(name, 0)
            only = left[name] if turn < math.inf else NONE
            trial = trials.run(
                name,
                target=target,
                after=0 if only else examples[name],
                within=min(turn, most - so_far),
                only=only or None,
            )
            ran += trial.ran
            if trial.record.verdict is Verdict.FAILED:
                caught = caught or Outcome(
                    fate=Fate.CAUGHT,
                    examples=ran,
                    seconds=so_far + trial.seconds,
                    reason=trial.record.reason,
                    record=trial.record,
                )
                failing.append(name)
                if not every:
                    return caught.by(failing, ran=examples)
                ended.add(name)
                continue
            if only:
                # They run once more when the property runs from its first example on.
                so_many = math.inf if trial.ended else trial.record.examples
                left[name] = frozenset(number for number in only if number >= so_many)
                continue
            examples[name] = trial.record.examples
            if trial.record.verdict is Verdict.UNKNOWN:
                unclear.append((name, trial))
            else:
                verdicts.append(trial.record.verdict)
                passed |= {name} if trial.record.verdict is Verdict.PASSED else set()
            if trial.ended:
                ended.add(name)
    # A few examples in a row may all be such that nothing can be said of them.
    said = [(name, trial) for name, trial in unclear if trial.broke or name not in passed]
    if caught is not None:
        unknown = {name for name, _ in said}.union(
            each.property for each in claimed if each.property not in ended
        )
        return caught.by(failing, ran=examples, undecided=sorted(unknown))
    reasons = [f"{name}: {trial.record.reason}" for name, trial in said]
    if ended != {each.property for each in claimed}:
        reasons.insert(0, f"not caught within {most:g} s")
    survived = not reasons and worst(verdicts) is Verdict.PASSED
    return Outcome(
        fate=Fate.SURVIVED if survived else Fate.UNKNOWN,
        properties=tuple(examples),
        examples=ran,
        seconds=time.monotonic() - began,
        reason="\n".join(reasons) or ("" if survived else "no property supports it"),
    )


def survey(
    name: str, options: RunOptions, *, target: str, trace: str | None, examples: int
) -> Surveyed:
    """What the first examples of a property are about."""
    trials = _Present.trials(options, trace=trace)
    return trials.survey(name, target=target, examples=examples)


class _Present:
    """The trials of this process, which keep their cluster and imports while the options stay."""

    key: object = None
    opened: AbstractContextManager[Trials] | None = None
    made: Trials

    @classmethod
    def trials(
        cls, options: RunOptions, *, shrink: bool = True, trace: str | None = None
    ) -> Trials:
        """Trials with these options, those of before closed."""
        key = (options, shrink, trace)
        if cls.key != key:
            if cls.opened is not None:
                cls.opened.__exit__(None, None, None)
            cls.opened = Trials(options, shrink=shrink, trace=trace)
            cls.made, cls.key = cls.opened.__enter__(), key
        return cls.made
