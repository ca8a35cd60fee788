"""The check `misuse`: a tracker of random streams refuses what would make streams meet, or be lost.

| misuse | is |
|---|---|
| `name` | adding a stream by the name of another, which would be lost |
| `seed` | adding one with the seed of another, which would draw the same numbers |
| `default` | adding one with the seed of the default generator |
| `unknown` | drawing from a stream that there is not |
| `lacking` | setting states without that of one stream |
| `foreign` | setting states of which one is of a stream that there is not |
| `told` | writing into the states that it told |
| `given` | writing into the states that were set |

Each but the last two, which change nothing, is refused on every rank, on purpose, with the name or
the seed in the message. All states are left as they were. What is no misuse works in the same run:
states that are told and set again give the numbers that followed, also where the last were drawn
outside of all forks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from verify.case import Case
from verify.checks.blame import Bench
from verify.checks.refusal import is_deliberate
from verify.cluster.base import Cluster
from verify.errors import BadArgument, HarnessError, NotSupported
from verify.rank_program import session_of, target_code
from verify.targets import load_target

# Two streams that no layout has, a third that nobody adds, and their seeds.
_ONE, _OTHER, _NOBODY = "shardproof-one", "shardproof-other", "shardproof-nobody"
_SEED, _FREE = 987_654_321, 987_654_322


class Tracker(Protocol):
    """A rank's random streams, at their start. All tensors of states are copies."""

    def add(self, name: str, *, seed: int) -> None:
        """Add a stream."""
        ...

    def fork(self, name: str) -> AbstractContextManager[object]:
        """Draw from a stream inside."""
        ...

    def states(self) -> dict[str, Tensor]:
        """The states of all streams by name, with or without `default`, the default generator's."""
        ...

    def set_states(self, states: Mapping[str, Tensor]) -> None:
        """Put back what `states` gave."""
        ...


def misuse(case: Case, *, target_name: str, cluster: Cluster) -> int:
    """Every rank refuses the misuse that the option `misuse` names."""
    bench = Bench("misuse", case, target_name, cluster)
    if case.options.get("misuse") not in MISUSES:
        raise BadArgument(
            f"case.options.misuse: {case.options.get('misuse')!r} is not one of"
            f" {', '.join(MISUSES)}"
        )
    bench.require_support(case)
    found = bench.run(_misused, target_name, case, world_size=case.layout.world_size)
    if None in found:
        raise NotSupported(f"{target_name} does not tell its tracker of random streams")
    if complaints := [f"rank {rank} {text}" for rank, text in enumerate(found) if text]:
        raise bench.mismatch("refusal", details=tuple(complaints))
    return len(found)


def _misused(target_name: str, case: Case) -> str | None:
    """Rank program: what is wrong with how the target meets a misuse; None where it does not tell
    its streams."""
    with session_of(load_target(target_name), case.layout) as session:
        tell = getattr(session, "tracker", None)
        if tell is None:
            return None
        with target_code("using its random streams"):
            tracker: Tracker = tell()
            tracker.add(_ONE, seed=_SEED)
            with tracker.fork(_ONE):
                torch.rand(1, device=torch.get_default_device())
            before = {name: state.clone() for name, state in tracker.states().items()}
            if lost := _not_drawn_again(tracker):
                return f"sets states again, and draws other numbers from {', '.join(lost)}"
            tracker.set_states(before)
        how, words = MISUSES[str(case.options["misuse"])]
        said, other = "", how.__doc__
        if words:
            said, other = _said(tracker, how, words), "refused it, and has other states than before"
        else:
            with target_code("using its random streams"):
                how(tracker)
        with target_code("using its random streams"):
            after = tracker.states()
        if set(after) != set(before) or not all(torch.equal(after[n], before[n]) for n in before):
            said = said or other or ""
        return said


def _not_drawn_again(tracker: Tracker) -> list[str]:
    """The streams that give other numbers when the states before these are set again."""
    device = torch.get_default_device()

    def numbers() -> dict[str, list[float]]:
        found = {"default": torch.rand(2, device=device).tolist()}
        with tracker.fork(_ONE):
            return {**found, _ONE: torch.rand(2, device=device).tolist()}

    torch.rand(1, device=device)
    states = tracker.states()
    first = numbers()
    tracker.set_states(states)
    again = numbers()
    return [name for name in first if name in states and again[name] != first[name]]


def _said(tracker: Tracker, how: Callable[[Tracker], None], words: tuple[str, ...]) -> str:
    """What is wrong with the answer to a misuse; empty where it is a refusal."""
    try:
        how(tracker)
    except HarnessError:
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if not is_deliberate(error):
            return f"ran into an error, it did not refuse: {told}"
        return "" if any(word in str(error) for word in words) else f"names neither: {told}"
    return f"did what it is to refuse: {how.__doc__}"


def _add_a_name(tracker: Tracker) -> None:
    """it added a stream by a name that is taken"""
    tracker.add(_ONE, seed=_FREE)


def _add_a_seed(tracker: Tracker) -> None:
    """it added a stream with the seed of another"""
    tracker.add(_OTHER, seed=_SEED)


def _add_the_default(tracker: Tracker) -> None:
    """it added a stream with the seed of the default generator"""
    tracker.add(_OTHER, seed=_default_seed())


def _fork_nobody(tracker: Tracker) -> None:
    """it drew from a stream that there is not"""
    with tracker.fork(_NOBODY):
        pass


def _set_fewer(tracker: Tracker) -> None:
    """it set states without that of one stream"""
    states = tracker.states()
    del states[_ONE]
    tracker.set_states(states)


def _set_more(tracker: Tracker) -> None:
    """it set the state of a stream that there is not"""
    states = tracker.states()
    tracker.set_states({**states, _NOBODY: states[_ONE]})


def _write_what_is_told(tracker: Tracker) -> None:
    """tells states that are its own: who writes into them writes into its streams"""
    _clear(tracker.states())


def _write_what_is_given(tracker: Tracker) -> None:
    """keeps the states that are set: who writes into them later writes into its streams"""
    states = tracker.states()
    tracker.set_states(states)
    _clear(states)


def _clear(states: Mapping[str, Tensor]) -> None:
    for state in states.values():
        state.zero_()


def _default_seed() -> int:
    device = torch.get_default_device()
    return torch.cuda.initial_seed() if device.type == "cuda" else torch.initial_seed()


# With what a refusal names one of; nothing where it is none.
MISUSES: Mapping[str, tuple[Callable[[Tracker], None], tuple[str, ...]]] = {
    "name": (_add_a_name, (_ONE,)),
    "seed": (_add_a_seed, (_OTHER, _ONE, str(_SEED))),
    "default": (_add_the_default, (_OTHER, "default", "seed")),
    "unknown": (_fork_nobody, (_NOBODY,)),
    "lacking": (_set_fewer, (_ONE,)),
    "foreign": (_set_more, (_NOBODY,)),
    "told": (_write_what_is_told, ()),
    "given": (_write_what_is_given, ()),
}
