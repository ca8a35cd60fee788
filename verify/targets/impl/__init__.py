"""The target `impl`: the reference implementation of this repository."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from impl.groups import Groups, build_groups
from verify.case import HARNESS_OPTIONS, Case
from verify.checks.rerun import Checkpoint
from verify.checks.stream_laws import Draw
from verify.checks.stream_misuse import Tracker
from verify.errors import BadArgument
from verify.layout import Layout
from verify.target import RankState, Subject
from verify.targets.impl import dropout, pipeline, recompute
from verify.targets.impl.subjects import BUILDERS, OPTIONS

# Concepts of which a session tells what a check needs.
_WITHOUT_A_SUBJECT = ("groups", "random_streams", "pipeline_schedule", "recomputed_function")


class Session:
    """impl on one rank: a bundle of process groups, which every subject is given."""

    def __init__(self, groups: Groups) -> None:
        self.bundle = groups

    def groups(self) -> Mapping[str, tuple[int, ...]]:
        """This rank's members of every kind of group it is in."""
        kinds = self.bundle.layout.kinds
        return {
            kind: self.bundle.ranks(kind) for kind in kinds if self.bundle.group(kind) is not None
        }

    def probe(self, kind: str) -> list[int]:
        """The global ranks that an all-gather over this rank's group of `kind` brings together."""
        try:
            group, size = self.bundle.group(kind), self.bundle.size(kind)
        except ValueError as error:
            raise BadArgument(str(error)) from error
        mine = torch.tensor([dist.get_rank()])
        everyone = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(everyone, mine, group=group)
        return [int(rank) for rank in everyone]

    def streams(self) -> Mapping[str, Draw]:
        """How to draw from this rank's random stream of every region."""
        return dropout.streams(self.bundle.layout)

    def tracker(self) -> Tracker:
        """This rank's random streams."""
        return dropout.tracker_of(self.bundle.layout)

    def checkpoint(self) -> Checkpoint:
        """How a function is computed again in backward."""
        return recompute.checkpoint_of(self.bundle)

    def build(self, case: Case) -> Subject:
        """The subject of a supported case. Raises ValueError where impl refuses."""
        return BUILDERS[case.concept](case, self.bundle)


class Target:
    """The reference implementation under test."""

    name = "impl"

    def version(self) -> str:
        """The version of the distribution that it is part of."""
        return importlib.metadata.version("shardproof")

    def stand_ins(self) -> tuple[str, ...]:
        """None: all of it is impl's own code."""
        return ()

    def supports(self, case: Case) -> str | None:
        """None, or that a concept or an option is unknown here."""
        if case.concept in _WITHOUT_A_SUBJECT:
            return None
        if case.concept not in BUILDERS:
            return f"no adapter for {case.concept}"
        known = {*OPTIONS.get(case.concept, ()), *HARNESS_OPTIONS}
        if foreign := sorted(set(case.options) - known):
            return f"{case.concept} has no option {', '.join(foreign)}"
        return None

    def rank_state(self) -> tuple[RankState, ...]:
        """None: impl keeps nothing in process globals."""
        return ()

    def schedule(self, kind: str, layout: Layout, microbatches: int) -> list[list[list[object]]]:
        """The table of a pipeline schedule. Raises ValueError where impl refuses."""
        return pipeline.schedule(kind, layout, microbatches)

    @contextlib.contextmanager
    def session(self, layout: Layout) -> Iterator[Session]:
        """Collective: make the groups of `layout`, and destroy them at the end."""
        groups = build_groups(layout)
        yield Session(groups)
        # Not after an error: the world may be broken, and its cluster replaces it then.
        groups.destroy()
