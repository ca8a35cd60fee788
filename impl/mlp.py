"""The transformer's feed-forward block, split over a tensor-parallel group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module
from torch.nn.functional import gelu, relu, silu

from impl.linear import ColumnParallelLinear, RowParallelLinear
from impl.parameters import Initialiser


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2, element by element (So et al., arXiv:2109.08668)."""
    return relu(x).square()


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"gelu": gelu, "squared_relu": squared_relu}
GATES: Mapping[str, Callable[[Tensor], Tensor]] = {"swiglu": silu, "geglu": gelu}


class MLP(Module):
    """fc2(activation(fc1(x))), with the ffn features split over the group.

    `fc1` [ffn, hidden] is column-parallel and `fc2` [hidden, ffn] row-parallel, so the activation,
    which works element by element, needs no collective. `x` and `y` [sequence, ..., hidden] are
    Replicate, or Shard(0) with `sequence_parallel`. Collectives and errors are those of the layers.

    `activation` is gelu (the exact one, not its approximation by tanh) or squared_relu; or, with a
    gate (Shazeer, arXiv:2002.05202), swiglu or geglu: fc2(silu(gate) * up), gelu for silu. Then
    `fc1` is [2 ffn, hidden], packed as [gate | up], and each rank has its part of either. If not
    `packed`, `fc1` is up and `gate` a layer of its own, with collectives of its own. Raises
    ValueError for another activation, for packed=False without a gate, and for an ffn that does not
    divide by the group.
    """

    def __init__(
        self,
        hidden: int,
        *,
        ffn: int,
        group: ProcessGroup,
        init: Initialiser,
        activation: str = "gelu",
        packed: bool = True,
        bias: bool = True,
        sequence_parallel: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if activation not in {**ACTIVATIONS, **GATES}:
            known = ", ".join((*ACTIVATIONS, *GATES))
            raise ValueError(f"activation: {activation!r} is not one of {known}")
        if not packed and activation not in GATES:
            raise ValueError(
                f"packed: False is not allowed with activation={activation}, which has no gate;"
                f" leave it out, or take one of {', '.join(GATES)}"
            )
        self.gated = activation in GATES
        self.activation = GATES[activation] if self.gated else ACTIVATIONS[activation]
        common: dict[str, Any] = {
            "group": group,
            "init": init,
            "bias": bias,
            "sequence_parallel": sequence_parallel,
            "dtype": dtype,
            "device": device,
        }
        blocks = 2 if self.gated and packed else 1
        self.fc1 = ColumnParallelLinear(hidden, out_features=blocks * ffn, stride=blocks, **common)
        self.gate = (
            ColumnParallelLinear(hidden, out_features=ffn, **common)
            if self.gated and not packed
            else None
        )
        self.fc2 = RowParallelLinear(ffn, out_features=hidden, **common)

    def forward(self, x: Tensor) -> Tensor:
        """`y` of `x`."""
        y, _ = self.fc2(self._inner(x))
        return y

    def _inner(self, x: Tensor) -> Tensor:
        inner, _ = self.fc1(x)
        if not self.gated:
            return self.activation(inner)
        if self.gate is None:
            gate, up = inner.chunk(2, dim=-1)
        else:
            (gate, _), up = self.gate(x), inner
        return self.activation(gate) * up
