"""The laws of pipeline schedules, for the table of whoever made it.

p stages, v chunks a stage, m microbatches; a forward of a chunk takes one unit of time, a backward
two, its halves one each. Chunk c of stage s is the (c p + s)-th of the model.

1. Every microbatch is once forwarded and once backwarded (as a whole, or `input` and `weight`) on
   every chunk.
2. Everything is done after what it needs: each activation and gradient is sent once, after it is
   computed, to the stage that needs it, and received there before it is used.
3. No stage waits for ever, even where a send is done only when it is received.
4. The bubble is the published one, in units of time:

   | kind | bubble | source |
   |---|---|---|
   | gpipe, 1f1b | 3 (p - 1) | arXiv:1811.06965, 2.3; arXiv:2104.04473, 2.2.1 |
   | interleaved | 3 (p - 1), of units that are v times shorter | arXiv:2104.04473, 2.2.2 |
   | zb-h1 | p - 1, for m >= p | arXiv:2401.10241, table 1: (p - 1)(F + B - W) |

   With m < p, zb-h1 cannot be shorter than the first microbatch's way to the last stage, m pairs of
   forward and input there, the way back, and one weight: 2 m + 2 p - 1.
5. At their peak, the activations that stage s keeps are of

   | kind | (microbatch, chunk) pairs | source |
   |---|---|---|
   | gpipe | m | arXiv:1811.06965, 2.3 |
   | 1f1b | min(m, p - s) | arXiv:2104.04473, 2.2.1 |
   | interleaved | min(m v, 2 (p - s - 1) + (v - 1) p + 1) | arXiv:2205.05198, 4.2.3, for s = 0 |
   | zb-h1 | min(m, p - s) until `input`, min(m, p) until `weight` | arXiv:2401.10241, 2.3 |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from verify.errors import BadArgument
from verify.schedules.rendezvous import stuck
from verify.schedules.table import Compute, Exchange, Table, Transfer
from verify.schedules.times import Times

KINDS = ("gpipe", "1f1b", "interleaved", "zb-h1")
_BACK = ("backward", "input")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a table is to be of: a kind of `KINDS`, stages, chunks a stage, microbatches."""

    kind: str
    pp: int
    vpp: int
    microbatches: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BadArgument(f"kind: {self.kind!r} is not one of {', '.join(KINDS)}")

    @property
    def possible(self) -> bool:
        """Whether the kind is published for these sizes: interleaved groups microbatches by pp, and
        the others have one chunk a stage."""
        if self.kind == "interleaved":
            return self.microbatches % self.pp == 0 and (self.vpp == 1 or self.pp > 1)
        return self.vpp == 1

    @property
    def work(self) -> int:
        """How long a stage computes."""
        return 3 * self.microbatches * self.vpp

    @property
    def bubble(self) -> int:
        """Law 4: how long a stage is idle."""
        if self.kind == "zb-h1":
            shortest = 2 * self.microbatches + 2 * self.pp - 1
            return max(self.pp - 1, shortest - self.work)
        return 3 * (self.pp - 1)

    def peaks(self) -> Mapping[tuple[str, ...], tuple[int, ...]]:
        """Law 5: what each stage keeps at most, until work of these names."""
        m, p, v = self.microbatches, self.pp, self.vpp
        if self.kind == "gpipe":
            return {_BACK: (m,) * p}
        if self.kind == "interleaved":
            return {_BACK: tuple(min(m * v, 2 * (p - s - 1) + (v - 1) * p + 1) for s in range(p))}
        found = {_BACK: tuple(min(m, p - s) for s in range(p))}
        return found | ({("weight",): (min(m, p),) * p} if self.kind == "zb-h1" else {})


def complaints(table: Table, plan: Plan) -> tuple[str, ...]:
    """How a table breaks the first law that it breaks; empty for one that is well-formed."""
    if len(table) != plan.pp:
        return (f"law 1: the table has {len(table)} stages and should have {plan.pp}",)
    for law in (_works, _order, _rendezvous, _bubble, _peaks):
        if found := tuple(law(table, plan)):
            return found
    return ()


def _works(table: Table, plan: Plan) -> Iterator[str]:
    """Law 1."""
    split = plan.kind == "zb-h1"
    works = ("forward", "input", "weight") if split else ("forward", "backward")
    wanted = Counter(
        Compute(work, microbatch, chunk)
        for work in works
        for microbatch in range(plan.microbatches)
        for chunk in range(plan.vpp)
    )
    for stage, steps in enumerate(table):
        found = Counter(step for step in steps if isinstance(step, Compute))
        for compute in (*(wanted - found), *(found - wanted)):
            times = f"{found[compute]} times and not {wanted[compute]}"
            yield f"law 1: stage {stage} does, {times}, the {compute}"


def _order(table: Table, plan: Plan) -> Iterator[str]:
    """Law 2."""
    for stage, steps in enumerate(table):
        wanted = Counter(_transfers(stage, plan))
        found = Counter(t for step in steps if isinstance(step, Exchange) for t in step.transfers)
        for transfer in (*(wanted - found), *(found - wanted)):
            times = f"{found[transfer]} times and not {wanted[transfer]}"
            yield f"law 2: stage {stage} has, {times}, the {transfer}"
        done: set[Compute | Transfer] = set()
        for step in steps:
            parts = step.transfers if isinstance(step, Exchange) else (step,)
            for part in parts:
                lacking = [each for each in _before(part, stage, plan) if each not in done]
                yield from (f"law 2: stage {stage} has the {part} before the {e}" for e in lacking)
            done.update(parts)


def _rendezvous(table: Table, plan: Plan) -> Iterator[str]:
    """Law 3."""
    yield from (f"law 3: {text}" for text in stuck(table))


def _bubble(table: Table, plan: Plan) -> Iterator[str]:
    """Law 4."""
    found = Times(table, plan.vpp).bubble
    if found != plan.bubble:
        yield (
            f"law 4: the bubble is {found} units of time beside {plan.work} of work; published are"
            f" {plan.bubble}"
        )


def _peaks(table: Table, plan: Plan) -> Iterator[str]:
    """Law 5."""
    times = Times(table, plan.vpp)
    for until, wanted in plan.peaks().items():
        for stage, (most, right) in enumerate(zip(times.peaks(until=until), wanted, strict=True)):
            if most != right:
                yield (
                    f"law 5: stage {stage} keeps activations of {most} microbatches and chunks"
                    f" until {' or '.join(until)}; published are {right}"
                )


def _transfers(stage: int, plan: Plan) -> Iterator[Transfer]:
    """All transfers of a stage."""
    for chunk in range(plan.vpp):
        place = chunk * plan.pp + stage
        for microbatch in range(plan.microbatches):
            for what, step in (("activation", 1), ("gradient", -1)):
                if 0 <= place + step < plan.pp * plan.vpp:
                    its_chunk, peer = divmod(place + step, plan.pp)
                    yield Transfer("send", what, microbatch, its_chunk, peer)
                if 0 <= place - step < plan.pp * plan.vpp:
                    peer = (place - step) % plan.pp
                    yield Transfer("recv", what, microbatch, chunk, peer)


def _before(part: Compute | Transfer, stage: int, plan: Plan) -> list[Compute | Transfer]:
    """What its own stage must have done before: one of these for each thing that it needs."""
    back = "input" if plan.kind == "zb-h1" else "backward"
    microbatch, place = part.microbatch, part.chunk * plan.pp + stage
    if isinstance(part, Transfer):
        if part.way == "recv":
            return []
        step, work = (-1, "forward") if part.what == "activation" else (1, back)
        own = (part.chunk * plan.pp + part.peer + step) // plan.pp
        return [Compute(work, microbatch, own)]
    if part.work == "weight":
        return [Compute("input", microbatch, part.chunk)]
    forward = part.work == "forward"
    found: list[Compute | Transfer] = []
    if not forward:
        found.append(Compute("forward", microbatch, part.chunk))
    if place != (0 if forward else plan.pp * plan.vpp - 1):
        what, step = ("activation", -1) if forward else ("gradient", 1)
        found.append(Transfer("recv", what, microbatch, part.chunk, (place + step) % plan.pp))
    return found
