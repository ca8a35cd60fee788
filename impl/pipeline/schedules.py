"""Pipeline schedules as tables: what every stage does, in its order. Needs no torch.

A model is cut into `pp * vpp` chunks; chunk c of stage s is the (c * pp + s)-th of them. On each
microbatch a chunk does `forward`, and then `backward`; zero-bubble schedules split that into
`input`, the gradient of the chunk's input, which the stage before waits for, and `weight`, the
gradients of its parameters, for which nobody does. See `impl.pipeline.timeline` for how the
transfers between stages get their places.

| kind | is | source |
|---|---|---|
| gpipe | all forwards, then all backwards | arXiv:1811.06965 |
| 1f1b | one forward, one backward after a warm-up (PipeDream-flush) | arXiv:2104.04473, 2.2.1 |
| interleaved | the same over vpp chunks a stage | arXiv:2104.04473, 2.2.2 |
| zb-h1 | 1f1b with weight gradients put off into the bubble | arXiv:2401.10241, 2.3 |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from impl.pipeline.timeline import Action, Exchange, Step, Work, with_exchanges


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The table of one kind for `microbatches` over `pp` stages of `vpp` chunks. `stages[s]` is
    what stage s does, one step after the other."""

    kind: str
    pp: int
    vpp: int
    microbatches: int
    stages: tuple[tuple[Step, ...], ...]

    def actions(self, stage: int) -> tuple[Action, ...]:
        """What a stage computes, without its transfers."""
        return tuple(step for step in self.stages[stage] if isinstance(step, Action))

    def last_backward(self, stage: int, chunk: int) -> Action:
        """The action after which the gradients of a chunk's parameters are complete."""
        completing = ("backward", "weight")
        return next(
            action
            for action in reversed(self.actions(stage))
            if action.chunk == chunk and action.work in completing
        )

    def to_plain(self) -> list[list[list[object]]]:
        """The table as lists of JSON types: for each stage its steps, `[work, microbatch, chunk]`
        or `["exchange", transfers]`; a transfer is `[send or recv, activation or gradient,
        microbatch, chunk, peer]`, the chunk being the one that it is for, on its own stage."""
        return [[_plain(step) for step in steps] for steps in self.stages]


def build_schedule(kind: str, *, pp: int, vpp: int, microbatches: int) -> Schedule:
    """The table of a kind of `KINDS`.

    Raises ValueError for an unknown kind, a size below 1, several chunks a stage where the kind has
    one or pp is 1, and microbatches that are no multiple of pp for interleaved, as Megatron does.
    """
    if kind not in KINDS:
        raise ValueError(f"schedule: {kind!r} is not one of {', '.join(KINDS)}")
    for name, size in (("pp", pp), ("vpp", vpp), ("microbatches", microbatches)):
        if size < 1:
            raise ValueError(f"{name}: {size} is no size; give a whole number from 1 up")
    if vpp > 1 and kind != "interleaved":
        raise ValueError(
            f"vpp: schedule {kind} runs one chunk a stage, got {vpp}; set vpp=1 or take interleaved"
        )
    if vpp > 1 and pp == 1:
        raise ValueError(f"vpp: {vpp} chunks a stage need pp above 1, got 1; set vpp=1")
    if kind == "interleaved" and microbatches % pp:
        raise ValueError(
            f"microbatches: {microbatches} is no multiple of pp={pp}, which schedule interleaved"
            f" needs; give a multiple of {pp}, or take 1f1b"
        )
    order = KINDS[kind]
    orders = [tuple(order(stage, pp, vpp, microbatches)) for stage in range(pp)]
    return Schedule(
        kind=kind,
        pp=pp,
        vpp=vpp,
        microbatches=microbatches,
        stages=with_exchanges(orders, pp=pp, vpp=vpp),
    )


def forward_only(*, pp: int, vpp: int, microbatches: int) -> Schedule:
    """The table of an evaluation: chunk after chunk, all microbatches of each."""
    orders = [
        tuple(Action("forward", m, chunk) for chunk in range(vpp) for m in range(microbatches))
        for _ in range(pp)
    ]
    stages = with_exchanges(orders, pp=pp, vpp=vpp)
    return Schedule(kind="forward", pp=pp, vpp=vpp, microbatches=microbatches, stages=stages)


def _gpipe(stage: int, pp: int, vpp: int, microbatches: int) -> Iterator[Action]:
    for work in ("forward", "backward"):
        yield from (Action(work, m, 0) for m in range(microbatches))


def _one_forward_one_backward(stage: int, pp: int, vpp: int, microbatches: int) -> Iterator[Action]:
    return _alternated(microbatches, warmup=pp - stage - 1, forward=_whole, backward=_whole)


def _interleaved(stage: int, pp: int, vpp: int, microbatches: int) -> Iterator[Action]:
    """Groups of pp microbatches go through the chunks one after the other."""

    def forward(turn: int) -> tuple[int, int]:
        group, within = divmod(turn, pp * vpp)
        return group * pp + within % pp, within // pp

    def backward(turn: int) -> tuple[int, int]:
        microbatch, chunk = forward(turn)
        return microbatch, vpp - 1 - chunk

    warmup = 2 * (pp - stage - 1) + (vpp - 1) * pp
    return _alternated(microbatches * vpp, warmup=warmup, forward=forward, backward=backward)


def _zero_bubble(stage: int, pp: int, vpp: int, microbatches: int) -> Iterator[Action]:
    """Stage s puts off each weight gradient until s further input gradients are done, so that every
    stage keeps as many microbatches as the first."""
    for action in _one_forward_one_backward(stage, pp, vpp, microbatches):
        if action.work == "forward":
            yield action
            continue
        yield Action("input", action.microbatch, 0)
        if action.microbatch >= stage:
            yield Action("weight", action.microbatch - stage, 0)
    for microbatch in range(max(microbatches - stage, 0), microbatches):
        yield Action("weight", microbatch, 0)


# The microbatch and the chunk of a stage's turn.
_Turn = Callable[[int], tuple[int, int]]


def _alternated(turns: int, *, warmup: int, forward: _Turn, backward: _Turn) -> Iterator[Action]:
    """`warmup` forwards, then a forward and a backward in turn, then the backwards left over."""
    warmup = min(warmup, turns)
    for turn in range(turns + warmup):
        if turn < turns:
            yield Action("forward", *forward(turn))
        if turn >= warmup:
            yield Action("backward", *backward(turn - warmup))


def _whole(turn: int) -> tuple[int, int]:
    return turn, 0


def _plain(step: Step) -> list[object]:
    if isinstance(step, Exchange):
        carried = [[t.way, t.what, t.microbatch, t.chunk, t.peer] for t in step.transfers]
        return ["exchange", carried]
    return [step.work, step.microbatch, step.chunk]


KINDS: Mapping[str, Callable[[int, int, int, int], Iterator[Action]]] = {
    "gpipe": _gpipe,
    "1f1b": _one_forward_one_backward,
    "interleaved": _interleaved,
    "zb-h1": _zero_bubble,
}

__all__ = ["KINDS", "Action", "Exchange", "Schedule", "Work", "build_schedule", "forward_only"]
