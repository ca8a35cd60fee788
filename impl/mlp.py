"""The transformer's feed-forward block, split over a tensor-parallel group."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module
from torch.nn.functional import gelu

from impl.linear import ColumnParallelLinear, RowParallelLinear
from impl.parameters import Initialiser


class MLP(Module):
    """fc2(activation(fc1(x))), with the ffn features split over the group.

    `fc1` [ffn, hidden] is column-parallel and `fc2` [hidden, ffn] row-parallel, so the activation,
    which works element by element, needs no collective. `x` and `y` [sequence, ..., hidden] are
    Replicate, or Shard(0) with `sequence_parallel`. Collectives and errors are those of the layers.
    `activation` is the exact gelu, not its approximation by tanh, unless another is given.
    """

    def __init__(
        self,
        hidden: int,
        *,
        ffn: int,
        group: ProcessGroup,
        init: Initialiser,
        activation: Callable[[Tensor], Tensor] = gelu,
        bias: bool = True,
        sequence_parallel: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = ColumnParallelLinear(
            hidden,
            out_features=ffn,
            group=group,
            init=init,
            bias=bias,
            sequence_parallel=sequence_parallel,
            dtype=dtype,
            device=device,
        )
        self.fc2 = RowParallelLinear(
            ffn,
            out_features=hidden,
            group=group,
            init=init,
            bias=bias,
            sequence_parallel=sequence_parallel,
            dtype=dtype,
            device=device,
        )

    def forward(self, x: Tensor) -> Tensor:
        """`y` of `x`."""
        inner, _ = self.fc1(x)
        y, _ = self.fc2(self.activation(inner))
        return y
