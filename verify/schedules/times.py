"""When a pipeline schedule does what, in the model of the papers: transfers take no time, and a
stage never waits for what it sends. Time is in forwards of one chunk (`DURATIONS`), or in what
measured durations are in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from verify.errors import Mismatch
from verify.schedules.table import DURATIONS, Compute, Table


@dataclass(frozen=True)
class Timed:
    """A stage's work with the time at which it begins and ends."""

    compute: Compute
    begin: int
    end: int


@dataclass(frozen=True)
class Times:
    """The times of a table of `vpp` chunks a stage, where works take so long.

    Raises Mismatch, when it is asked, where a stage waits for what nobody computes before it.
    """

    table: Table
    vpp: int
    durations: Mapping[str, int] = field(default_factory=lambda: DURATIONS)

    @cached_property
    def stages(self) -> tuple[tuple[Timed, ...], ...]:
        """What every stage computes, in its order."""
        orders = [[step for step in steps if isinstance(step, Compute)] for steps in self.table]
        found: list[list[Timed]] = [[] for _ in orders]
        ends: dict[tuple[str, int, int], int] = {}
        moving = True
        while moving:
            moving = False
            for stage, order in enumerate(orders):
                while len(found[stage]) < len(order):
                    compute = order[len(found[stage])]
                    begin = self._begin(compute, stage, found[stage], ends)
                    if begin is None:
                        break
                    end = begin + self.durations[compute.work]
                    found[stage].append(Timed(compute, begin, end))
                    ends[self._made(compute, stage)] = end
                    moving = True
        for stage, order in enumerate(orders):
            if len(found[stage]) < len(order):
                raise Mismatch(f"stage {stage} never gets to the {order[len(found[stage])]}")
        return tuple(map(tuple, found))

    @property
    def span(self) -> int:
        """From the beginning of the first work to the end of the last."""
        return max(timed.end for stage in self.stages for timed in stage)

    @property
    def bubble(self) -> int:
        """How much of `span` the busiest stage is idle."""
        busy = (sum(t.end - t.begin for t in stage) for stage in self.stages)
        return self.span - max(busy)

    def peaks(self, *, until: Sequence[str]) -> tuple[int, ...]:
        """The most (microbatch, chunk) of which a stage has done the forward, and not yet the work
        of one of these names, for each stage."""
        found = []
        for stage in self.stages:
            live, most = 0, 0
            for timed in stage:
                live += (timed.compute.work == "forward") - (timed.compute.work in until)
                most = max(most, live)
            found.append(most)
        return tuple(found)

    def _begin(
        self,
        compute: Compute,
        stage: int,
        done: Sequence[Timed],
        ends: dict[tuple[str, int, int], int],
    ) -> int | None:
        """When a work can begin; None if what it needs is not computed yet."""
        needed = self._needed(compute, stage)
        if any(each not in ends for each in needed):
            return None
        return max([done[-1].end if done else 0, *(ends[each] for each in needed)])

    def _needed(self, compute: Compute, stage: int) -> list[tuple[str, int, int]]:
        """What has to be computed before: the forward of the chunk before; the gradient of the
        chunk behind, and the chunk's own forward; for weights, its own gradient."""
        place = compute.chunk * len(self.table) + stage
        last = self.vpp * len(self.table) - 1
        microbatch = compute.microbatch
        if compute.work == "forward":
            return [("forward", microbatch, place - 1)] if place else []
        if compute.work == "weight":
            return [("gradient", microbatch, place)]
        behind = [("gradient", microbatch, place + 1)] if place < last else []
        return [("forward", microbatch, place), *behind]

    def _made(self, compute: Compute, stage: int) -> tuple[str, int, int]:
        names = {"forward": "forward", "backward": "gradient", "input": "gradient"}
        name = names.get(compute.work, "weight")
        return name, compute.microbatch, compute.chunk * len(self.table) + stage
