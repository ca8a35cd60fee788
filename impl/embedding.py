"""Embeddings: of tokens, the vocabulary split over a tensor-parallel group, and of positions."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module

from impl.context_parallel.zigzag import PackedSequences, Placement, positions
from impl.mappings import (
    reduce_from_tensor_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from impl.parameters import Initialiser, replicated_parameter, sharded_parameter
from impl.partition import part_of
from impl.weight_pass import embedding


class VocabParallelEmbedding(Module):
    """The row of `weight` of every token.

    `weight` [vocabulary, hidden] is Shard(0). Tokens [batch, sequence] are integers, Replicate; a
    token outside the vocabulary gets zeros, on any number of ranks. The output is [batch, sequence,
    hidden], Replicate; with `scatter_to_sequence`, which needs `sequence_parallel`, it is
    [sequence, batch, hidden], Shard(0). Each rank looks up the tokens of its own rows and the
    others' are zero, so that the sum over the group is the embedding.

    Forward: all-reduce (scatter_to_sequence: reduce-scatter). Backward: none (all-gather).

    `init` fills the full weight. Raises ValueError for a vocabulary, or a sequence that is
    scattered, that does not divide by the size of the group.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        hidden: int,
        group: ProcessGroup,
        init: Initialiser,
        sequence_parallel: bool = False,
        scatter_to_sequence: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if scatter_to_sequence and not sequence_parallel:
            raise ValueError(
                "scatter_to_sequence: True is not allowed with sequence_parallel=False;"
                " set both or neither"
            )
        self.rows = part_of(vocabulary, group=group, name="vocabulary")
        self.group, self.scatter_to_sequence = group, scatter_to_sequence
        self.weight = sharded_parameter(
            vocabulary,
            hidden,
            dim=0,
            name="vocabulary",
            group=group,
            init=init,
            dtype=dtype,
            device=device,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """The embeddings of tokens [batch, sequence]."""
        if tokens.dim() != 2:
            raise ValueError(f"tokens: {list(tokens.shape)} is not [batch, sequence]")
        elsewhere = (tokens < self.rows.start) | (tokens >= self.rows.stop)
        row = (tokens - self.rows.start).masked_fill(elsewhere, 0)
        partial = embedding(row, self.weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        if not self.scatter_to_sequence:
            return reduce_from_tensor_parallel_region(partial, group=self.group)
        return reduce_scatter_to_sequence_parallel_region(partial.transpose(0, 1), group=self.group)


class PositionEmbedding(Module):
    """x + weight[position of each token]: learned positions.

    `x`, `y` [sequence, batch, hidden] and gradients lie over cp as `placement` says, and over tp
    are Replicate, or Shard(0) with `sequence_parallel`. `weight` [max_positions, hidden] is
    Replicate. Its gradient is of this rank's tokens: Partial over cp until
    `impl.gradients.sum_gradients`, and with `sequence_parallel` over tp until
    `finish_sequence_parallel_gradients`. Positions are those in the whole sequence; in packed ones
    they begin with 0 in each. No collectives.

    Raises ValueError for an x of another shape, a sequence longer than there are positions, and one
    that does not divide as `placement` needs.
    """

    def __init__(
        self,
        max_positions: int,
        *,
        hidden: int,
        tp_group: ProcessGroup,
        cp_group: ProcessGroup,
        init: Initialiser,
        placement: Placement = "zigzag",
        sequence_parallel: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.tp_group, self.cp_group, self.placement = tp_group, cp_group, placement
        self.sequence_parallel = sequence_parallel
        self.weight = replicated_parameter(
            max_positions,
            hidden,
            init=init,
            sequence_parallel=sequence_parallel,
            dtype=dtype,
            device=device,
        )

    def forward(self, x: Tensor, *, packed: PackedSequences | None = None) -> Tensor:
        """`y` of x; `packed` are the sequences of all ranks."""
        if x.dim() != 3 or x.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"x: {list(x.shape)} is not [sequence, batch, {self.weight.shape[1]}], the hidden"
                " size of these positions"
            )
        return x + embedding(self._positions(x, packed), self.weight).unsqueeze(1)

    def _positions(self, x: Tensor, packed: PackedSequences | None) -> Tensor:
        split = dist.get_world_size(self.tp_group) if self.sequence_parallel else 1
        length = x.shape[0] * split * dist.get_world_size(self.cp_group)
        longest = max(packed.padded_lengths) if packed is not None else length
        if longest > self.weight.shape[0]:
            raise ValueError(
                f"max_positions: {self.weight.shape[0]} are fewer than the sequence's {longest};"
                " give more positions, or a shorter sequence"
            )
        mine = positions(length, group=self.cp_group, placement=self.placement, packed=packed)
        if self.sequence_parallel:
            part = part_of(len(mine), group=self.tp_group, name="sequence_parallel: the sequence")
            mine = mine[part.start : part.stop]
        return mine.to(x.device)
