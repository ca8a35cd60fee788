"""What a rank computes of an attention that is split over a sequence, whatever the algorithm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from impl.context_parallel.dropout import KeptShares, ShareDropout
from impl.context_parallel.scores import KeyPadding, Scoring
from impl.context_parallel.zigzag import Chunk, Chunks, side_by_side

OnBlock = Callable[[Chunk, Chunk], None]
"""Called in forward for every block that is computed, with its chunks of queries and of keys."""


@dataclass(frozen=True, kw_only=True)
class ContextGroups:
    """The context-parallel group of this rank, and its levels, innermost first, where it has them.

    `levels` are two: the inner ranks are neighbours in `cp`, the outer ones lie one from each set
    of inner ranks, so that the index in `cp` is inner index + inner size * outer index.
    """

    cp: ProcessGroup
    levels: tuple[ProcessGroup, ...] = ()


class Extras(NamedTuple):
    """Tensors beside q, k and v: the `sink` of each head, [heads], and the `marks` of padding among
    all keys, bool [sequence, batch]; None for none."""

    sink: Tensor | None = None
    marks: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`chunks` has, for each rank of `groups.cp`, what it holds of the sequence; `scoring` is what
    comes before the softmax; `dropout` is of what comes of it."""

    groups: ContextGroups
    chunks: tuple[Chunks, ...]
    scoring: Scoring
    dropout: ShareDropout | None = None
    on_block: OnBlock | None = None

    def together(self, size: int) -> tuple[Chunks, ...]:
        """The chunks of every `size` neighbours in one tensor, in the order of their ranks."""
        neighbours = (self.chunks[i : i + size] for i in range(0, len(self.chunks), size))
        return tuple(side_by_side([*chain.from_iterable(each)]) for each in neighbours)

    def padding(self, marks: Tensor | None) -> KeyPadding | None:
        """The padding that `marks` of all keys say, in the order of the ranks of `groups.cp`."""
        if marks is None:
            return None
        (everything,) = self.together(len(self.chunks))
        return KeyPadding(marks, everything)

    def of_heads(self, heads: slice) -> Plan:
        """The same for some of the heads."""
        return replace(self, scoring=self.scoring.of_heads(heads))

    def kept_shares(
        self, q: Tensor, queries: Chunks, *, state: Tensor | None = None
    ) -> KeptShares | None:
        """What is kept of the shares of `q` [s, b, heads, d] that lie as `queries`; None for all.
        With `state` it is what was kept when the generator was there."""
        if self.dropout is None or not self.dropout.p:
            return None
        return KeptShares(
            self.dropout,
            (q.shape[1], q.shape[2]),
            queries=queries,
            keys=tuple(chain.from_iterable(self.chunks)),
            device=q.device,
            state=state,
        )

    def require_heads(self, *, heads: int, kv_heads: int, group: ProcessGroup, name: str) -> None:
        """ValueError where the heads of this rank cannot be shared out to the ranks of a group."""
        size = dist.get_world_size(group)
        if heads % size:
            raise ValueError(
                f"algorithm: {name} shares {heads} heads out to {size} ranks;"
                f" give a multiple of {size} heads for each tensor-parallel rank, or take ring"
            )
        if kv_heads % size and size % kv_heads:
            raise ValueError(
                f"algorithm: {name} shares {kv_heads} kv heads out to {size} ranks; one must divide"
                f" the other, for each tensor-parallel rank, or take ring"
            )
