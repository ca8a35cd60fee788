"""Whether a pipeline schedule gets stuck where a send is done only when it is received.

The hardest case that a real network makes: a stage goes on behind an exchange when all of it is
done, and between two stages tensors are matched in the order in which they are sent and received,
one of each at a time, as NCCL does.
"""

from __future__ import annotations

from verify.schedules.table import Exchange, Table, Transfer

# Posted and not matched, by sender and receiver.
_Queues = dict[tuple[int, int], list[tuple[int, Transfer]]]


def stuck(table: Table) -> tuple[str, ...]:
    """What every stage that cannot go on waits for, or what met what it was not meant for; empty
    for a table that runs to its end."""
    place, open_ = [0] * len(table), [0] * len(table)
    sent: _Queues = {}
    received: _Queues = {}
    moving = True
    while moving:
        moving = False
        for stage, steps in enumerate(table):
            while open_[stage] == 0 and place[stage] < len(steps):
                step = steps[place[stage]]
                place[stage] += 1
                moving = True
                if isinstance(step, Exchange):
                    open_[stage] = len(step.transfers)
                    _post(stage, step, sent, received)
        for pair in [pair for pair in sent if pair in received]:
            while sent[pair] and received[pair]:
                (sender, one), (receiver, other) = sent[pair].pop(0), received[pair].pop(0)
                if _content(one) != _content(other):
                    return (f"the {one} of stage {sender} meets the {other} of stage {receiver}",)
                open_[sender] -= 1
                open_[receiver] -= 1
                moving = True
    waiting = [(stage, t) for queue in (sent, received) for q in queue.values() for stage, t in q]
    return tuple(f"stage {stage} waits for ever in the {transfer}" for stage, transfer in waiting)


def _post(stage: int, exchange: Exchange, sent: _Queues, received: _Queues) -> None:
    for transfer in exchange.transfers:
        if transfer.way == "send":
            sent.setdefault((stage, transfer.peer), []).append((stage, transfer))
        else:
            received.setdefault((transfer.peer, stage), []).append((stage, transfer))


def _content(transfer: Transfer) -> tuple[str, int, int]:
    return transfer.what, transfer.microbatch, transfer.chunk
