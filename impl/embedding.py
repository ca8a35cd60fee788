"""An embedding whose vocabulary is split over a tensor-parallel group."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module
from torch.nn.functional import embedding

from impl.mappings import (
    reduce_from_tensor_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from impl.parameters import Initialiser, sharded_parameter
from impl.partition import divide, part_of


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
            vocabulary, hidden, dim=0, group=group, init=init, dtype=dtype, device=device
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """The embeddings of tokens [batch, sequence]."""
        if tokens.dim() != 2:
            raise ValueError(f"tokens: {list(tokens.shape)} is not [batch, sequence]")
        if self.scatter_to_sequence:
            divide(tokens.shape[1], group=self.group, name="scatter_to_sequence: the sequence")
        elsewhere = (tokens < self.rows.start) | (tokens >= self.rows.stop)
        row = (tokens - self.rows.start).masked_fill(elsewhere, 0)
        partial = embedding(row, self.weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        if not self.scatter_to_sequence:
            return reduce_from_tensor_parallel_region(partial, group=self.group)
        return reduce_scatter_to_sequence_parallel_region(partial.transpose(0, 1), group=self.group)
