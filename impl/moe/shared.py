"""Experts that every token goes to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module
from torch.nn.functional import gelu, silu

from impl.linear import ColumnParallelLinear, RowParallelLinear
from impl.parameters import Initialiser


class SharedExperts(Module):
    """fc2(activation(fc1(x))) of every token, without biases; the ffn features are split over tp.

    Several shared experts are one of their summed width. `x` and `y` [sequence, ..., hidden] are
    Replicate over `group`, or Shard(0) with `sequence_parallel`. With swiglu, silu(gate(x)) is
    multiplied by fc1(x). Collectives and errors are those of the layers.
    """

    def __init__(
        self,
        hidden: int,
        *,
        ffn: int,
        group: ProcessGroup,
        init: Initialiser,
        activation: str = "gelu",
        sequence_parallel: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()

        def column() -> ColumnParallelLinear:
            return ColumnParallelLinear(
                hidden,
                out_features=ffn,
                group=group,
                init=init,
                bias=False,
                sequence_parallel=sequence_parallel,
                dtype=dtype,
                device=device,
            )

        self.fc1 = column()
        self.gate = column() if activation == "swiglu" else None
        self.fc2 = RowParallelLinear(
            ffn,
            out_features=hidden,
            group=group,
            init=init,
            bias=False,
            sequence_parallel=sequence_parallel,
            dtype=dtype,
            device=device,
        )

    def forward(self, x: Tensor) -> Tensor:
        """`y` of `x`."""
        inner, _ = self.fc1(x)
        if self.gate is None:
            inner = gelu(inner)
        else:
            gate, _ = self.gate(x)
            inner = silu(gate) * inner
        y, _ = self.fc2(inner)
        return y
