"""Which ranks share a problem, and which of them must hold the same bits.

A concept is split over the axes that its contract names. Along all other axes of the mesh ranks are
replicas: each set of ranks that differ only along the contract's axes has data and weights of its
own.

A mixture of experts has tensors on both meshes: tokens on tp, cp and dp, experts on etp, ep and
edp. These are the same ranks, those of a pipeline stage, in other arrangements, so a concept may
name all six, its replicas being the stages, or all of them and pp.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from verify.errors import HarnessError
from verify.layout import Layout
from verify.placement import Cut, Partial, Placements


@dataclass(frozen=True)
class RankMap:
    """The ranks of `layout` as seen by a concept that is split over `axes`.

    `axes` are of the dense mesh (tp, cp, dp, pp), or of the expert mesh (etp, ep, edp, pp), or all
    of both, with pp or without, in any order.
    """

    layout: Layout
    axes: tuple[str, ...]

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Size of every axis of the mesh, or of both."""
        dense, expert = self.layout.sizes, self.layout.expert_sizes
        for sizes in (dense, expert):
            if set(self.axes) <= set(sizes):
                return sizes
        both = {**dense, **expert}
        if {*self.axes, "pp"} == set(both):
            return both
        raise HarnessError(
            f"contract: the axes {', '.join(self.axes)} are neither of one mesh nor all of both"
        )

    @cached_property
    def coordinates(self) -> tuple[Mapping[str, int], ...]:
        """Coordinates of every rank on the mesh, or on both."""
        return tuple(
            {axis: found[axis] for axis in self.sizes}
            for found in (
                self.layout.coordinates(rank) | self.layout.expert_coordinates(rank)
                for rank in range(self.layout.world_size)
            )
        )

    def replica(self, rank: int) -> str:
        """The replica that a rank belongs to, as `dp1-pp2`; empty for the first in every axis, so
        that it has the data of a run without replicas."""
        found = self.coordinates[rank].items()
        return "-".join(f"{axis}{i}" for axis, i in found if i and axis not in self.axes)

    @cached_property
    def replicas(self) -> Mapping[str, tuple[int, ...]]:
        """The ranks of every replica."""
        found: dict[str, tuple[int, ...]] = {}
        for rank in range(self.layout.world_size):
            replica = self.replica(rank)
            found[replica] = (*found.get(replica, ()), rank)
        return found

    def alike(self, placements: Placements, ranks: Iterable[int]) -> list[tuple[int, ...]]:
        """The sets of ranks, of those given, whose local tensors are copies of each other."""
        split = [axis for axis, p in placements.items() if isinstance(p, Cut | Partial)]
        return self._together(split, ranks)

    def summed(self, placements: Placements, ranks: Iterable[int]) -> list[tuple[int, ...]]:
        """The sets of ranks, of those given, whose local tensors add up to the expected one: each
        set has one rank of every coordinate on the `Partial` axes and agrees in all others of their
        mesh. Raises HarnessError for `Partial` axes of two meshes."""
        partial = {axis for axis, p in placements.items() if isinstance(p, Partial)}
        found = [mesh for mesh in self._meshes if partial <= set(mesh)]
        if not found:
            raise HarnessError(f"contract: Partial over {', '.join(partial)}, axes of two meshes")
        return self._together([axis for axis in found[0] if axis not in partial], ranks)

    def along(self, axis: str, ranks: Iterable[int]) -> list[tuple[int, ...]]:
        """The sets of ranks, of those given, that differ along one axis of its mesh only."""
        mesh = next(mesh for mesh in self._meshes if axis in mesh)
        return self._together([each for each in mesh if each != axis], ranks)

    def part(self, placements: Placements, rank: int) -> int:
        """The index, among the summands of a tensor with `Partial` axes, of this rank's."""
        index = 0
        for axis, placement in placements.items():
            if isinstance(placement, Partial):
                index = index * self.sizes[axis] + self.coordinates[rank][axis]
        return index

    def parts(self, placements: Placements) -> int:
        """How many summands a tensor with these placements has; 1 without `Partial` axes."""
        return prod(self.sizes[a] for a, p in placements.items() if isinstance(p, Partial))

    @cached_property
    def _meshes(self) -> list[Mapping[str, int]]:
        """The meshes that the ranks are seen on."""
        both = (self.layout.sizes, self.layout.expert_sizes)
        return [mesh for mesh in both if set(mesh) <= set(self.sizes)]

    def _together(self, axes: list[str], ranks: Iterable[int]) -> list[tuple[int, ...]]:
        found: dict[tuple[int, ...], tuple[int, ...]] = {}
        for rank in ranks:
            key = tuple(self.coordinates[rank][axis] for axis in axes)
            found[key] = (*found.get(key, ()), rank)
        return list(found.values())


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0, 1`."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
