"""Where the transfers of a pipeline schedule go. Needs no torch.

Given what every stage computes, and in which order, the model time of every action follows: a chunk
takes one unit for a forward, for `input` and for `weight`, two for a backward, and transfers take
none. A transfer is put, on both of its stages, at the time at which what it carries is there: after
all actions that began before, and before all that begin then or later.

So all actions and transfers have one order, of which every stage does its part. Even where a send
returns only when it is received, the first that is not done can be done: no table deadlocks. That
holds as well for transfers that follow each other on a stage, begun together as one `Exchange`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Work = Literal["forward", "backward", "input", "weight"]
DURATIONS = {"forward": 1, "backward": 2, "input": 1, "weight": 1}


@dataclass(frozen=True)
class Action:
    """One computation of a stage: of which microbatch, on which of the stage's chunks."""

    work: Work
    microbatch: int
    chunk: int


@dataclass(frozen=True)
class Transfer:
    """One tensor sent to, or received from, the stage `peer`: an activation or a gradient of
    `microbatch`, for the chunk `chunk` of the stage that receives it."""

    way: Literal["send", "recv"]
    what: Literal["activation", "gradient"]
    microbatch: int
    chunk: int
    peer: int


@dataclass(frozen=True)
class Exchange:
    """Transfers that are begun together, in the order in which both ends begin them."""

    transfers: tuple[Transfer, ...]


Step = Action | Exchange
# Which chunk of all, in the order of the model; the microbatch; forward or backward.
_Key = tuple[int, int, bool]


def with_exchanges(
    orders: Sequence[Sequence[Action]], *, pp: int, vpp: int
) -> tuple[tuple[Step, ...], ...]:
    """The steps of every stage: its actions in this order, and the exchanges between them.

    Raises ValueError where an action waits for what is never done before it.
    """
    begun, produced = _times(orders, pp=pp, vpp=vpp)
    transfers: list[list[tuple[int, Transfer]]] = [[] for _ in range(pp)]
    last = pp * vpp - 1
    for time, (place, microbatch, forward) in produced:
        target = place + 1 if forward else place - 1
        if not 0 <= target <= last:
            continue
        source, (chunk, receiver) = place % pp, divmod(target, pp)
        what: Literal["activation", "gradient"] = "activation" if forward else "gradient"
        sent = Transfer("send", what, microbatch, chunk, receiver)
        transfers[source].append((time, sent))
        transfers[receiver].append((time, Transfer("recv", what, microbatch, chunk, source)))
    return tuple(
        _merged(order, times, mine)
        for order, times, mine in zip(orders, begun, transfers, strict=True)
    )


def _times(
    orders: Sequence[Sequence[Action]], *, pp: int, vpp: int
) -> tuple[list[list[int]], list[tuple[int, _Key]]]:
    """When every action begins; and when each activation and gradient is there, in that order."""
    begun: list[list[int]] = [[] for _ in orders]
    free = [0] * pp
    ready: dict[_Key, int] = {}
    going = True
    while going:
        going = False
        for stage, order in enumerate(orders):
            while len(begun[stage]) < len(order):
                action = order[len(begun[stage])]
                place = action.chunk * pp + stage
                needed = _needed(action, place, pp * vpp - 1)
                if needed is not None and needed not in ready:
                    break
                start = max(free[stage], 0 if needed is None else ready[needed])
                free[stage] = start + DURATIONS[action.work]
                begun[stage].append(start)
                if action.work != "weight":
                    ready[place, action.microbatch, action.work == "forward"] = free[stage]
                going = True
    for stage, order in enumerate(orders):
        if len(begun[stage]) < len(order):
            waiting = order[len(begun[stage])]
            raise ValueError(f"orders: stage {stage} waits for ever before {waiting}")
    return begun, sorted((time, key) for key, time in ready.items())


def _needed(action: Action, place: int, last: int) -> _Key | None:
    """What an action waits for from another stage, or from its own chunk; None: nothing."""
    if action.work == "forward":
        return (place - 1, action.microbatch, True) if place else None
    if action.work == "weight":
        return place, action.microbatch, False
    if place == last:
        return place, action.microbatch, True
    return place + 1, action.microbatch, False


def _merged(
    order: Sequence[Action], begun: Sequence[int], transfers: Sequence[tuple[int, Transfer]]
) -> tuple[Step, ...]:
    """Actions, and before each the transfers at the times up to its beginning."""
    steps: list[Step] = []
    waiting = list(transfers)
    for action, start in zip(order, begun, strict=True):
        if now := [transfer for time, transfer in waiting if time <= start]:
            steps.append(Exchange(tuple(now)))
            waiting = waiting[len(now) :]
        steps.append(action)
    if waiting:
        steps.append(Exchange(tuple(transfer for _, transfer in waiting)))
    return tuple(steps)
