"""What an explanation has to go by: one wrong tensor of one replica, on all its ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from verify.finding import Explanation
from verify.placement import Listed, Partial, Placements, Shard, ZigzagShard, shard
from verify.reference import Reference
from verify.replica import RankMap


@dataclass(frozen=True)
class Evidence:
    """The tensor `name`: what it should be in full, and what each rank of the replica has.

    `candidate` holds float64 local tensors of the expected shapes, by rank, already summed where
    the placement is `Partial`; `wrong` names those ranks on which it differs. `reference` computes
    variants, for which `parameters` says how the target places its weights. `later` is the largest
    `relative` error of what is wrong after it.
    """

    name: str
    full: Tensor
    placements: Placements
    ranks: RankMap
    candidate: Mapping[int, Tensor]
    wrong: tuple[int, ...]
    dtype: torch.dtype
    reference: Reference | None = None
    parameters: Mapping[str, Placements] = field(default_factory=dict)
    later: float = 0.0

    def cut(self, full: Tensor, rank: int, placements: Placements | None = None) -> Tensor:
        """A rank's part of a full tensor, by the tensor's own placements or by others."""
        placed = self.placements if placements is None else placements
        return shard(full, placed, self.ranks.sizes, self.ranks.coordinates[rank])

    @cached_property
    def expected(self) -> Mapping[int, Tensor]:
        """What every rank should have."""
        return {rank: self.cut(self.full, rank) for rank in self.candidate}

    @cached_property
    def error(self) -> float:
        """Norm of the difference, over the wrong ranks."""
        return self._norm({rank: self.expected[rank] for rank in self.wrong})

    @cached_property
    def relative(self) -> float:
        """The error over the norm of what is expected: 0 where zeros are, infinite where it is no
        number."""
        norm = sum(float(self.expected[rank].norm()) ** 2 for rank in self.wrong) ** 0.5
        found = self.error / norm if norm else 0.0
        return found if math.isfinite(found) else math.inf

    @cached_property
    def groups(self) -> Mapping[str, tuple[tuple[int, ...], ...]]:
        """By axis with more than one rank, the groups of ranks that differ along it only; without
        an axis over which they hold listed parts, which need not be alike in size."""
        members = sorted(self.candidate)
        return {
            axis: tuple(self.ranks.along(axis, members))
            for axis in self.ranks.axes
            if self.ranks.sizes[axis] > 1 and not isinstance(self.placements.get(axis), Listed)
        }

    def dim(self, axis: str) -> int | None:
        """The dimension that `axis` shards, None where it does not."""
        placement = self.placements.get(axis)
        if isinstance(placement, Shard | ZigzagShard):
            return placement.dim % self.full.dim()
        return None

    @property
    def summed(self) -> bool:
        """Whether the candidate is a sum over ranks rather than a local tensor."""
        return any(isinstance(placement, Partial) for placement in self.placements.values())

    def score(self, predicted: Mapping[int, Tensor]) -> float:
        """The share of the error that goes away if these tensors, by wrong rank, were expected.

        Not finite errors are explained by nothing that is finite: 0.
        """
        if self.error == 0 or not torch.isfinite(torch.tensor(self.error)):
            return 0.0
        return max(0.0, 1.0 - self._norm(predicted) / self.error)

    def explain(self, sentence: str, predicted: Mapping[int, Tensor]) -> Explanation:
        """The explanation by which the wrong ranks would have what is `predicted`."""
        return Explanation(sentence, self.score(predicted))

    def group_text(self, axis: str) -> str:
        """`tp (size 2)`."""
        return f"{axis} (size {self.ranks.sizes[axis]})"

    def _norm(self, predicted: Mapping[int, Tensor]) -> float:
        squares = [float((self.candidate[r] - predicted[r]).norm()) ** 2 for r in self.wrong]
        return sum(squares) ** 0.5
