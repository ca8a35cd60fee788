"""The experts of one rank: as many perceptrons, their weights stacked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn import Module, Parameter
from torch.nn.functional import gelu, linear, silu
from torch.nn.init import zeros_

from impl.mappings import copy_to_tensor_parallel_region
from impl.parameters import Initialiser, defer
from impl.partition import divide, split
from impl.weight_pass import as_autocast, now_or_later, parameter_of, weight_product

ACTIVATIONS = ("gelu", "swiglu")


class _GroupedMatmul(torch.autograd.Function):
    """rows @ weight[i].T for every run of rows, whose lengths are `counts`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.weight, ctx.counts = parameter_of(weight), counts
        return torch.cat([linear(rows, weight[i]) for i, rows in enumerate(x.split(counts))])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        of_x = of_weight = None
        runs = gradient.split(ctx.counts)
        if needs_x:
            of_x = torch.cat([rows @ weight[i] for i, rows in enumerate(runs)])
        if needs_weight:
            compute = partial(_grouped_product, runs, x, ctx.counts)
            of_weight = now_or_later(ctx.weight, compute)
        return of_x, of_weight, None


def _grouped_product(runs: Sequence[Tensor], x: Tensor, counts: list[int]) -> Tensor:
    """The gradient of all weights, stacked."""
    pairs = zip(runs, x.split(counts), strict=True)
    return torch.stack([weight_product(gradient, rows) for gradient, rows in pairs])


class GroupedLinear(Module):
    """y = x weight^T + bias with a weight of its own for every run of rows.

    `weight` [experts, out, in] and `bias` [experts, out] are Shard(0) over ep, and are split over
    etp along `etp_dim` of the full weight (1 out, 2 in) in `stride` blocks; a bias is split with
    the outputs. With split inputs, `y` are summands over etp, to which the first rank adds the
    bias; the bias is Replicate over etp and its gradient, all-reduced, complete.
    """

    def __init__(
        self,
        in_features: int,
        *,
        out_features: int,
        num_experts: int,
        etp_dim: int,
        ep_group: ProcessGroup,
        etp_group: ProcessGroup,
        init: Initialiser,
        bias: bool,
        stride: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.etp_group, self.row = etp_group, etp_dim == 2
        common: dict[str, Any] = {
            "ep_group": ep_group,
            "etp_group": etp_group,
            "stride": stride,
            "dtype": dtype,
            "device": device,
        }
        self.weight = expert_parameter(
            num_experts, out_features, in_features, etp_dim=etp_dim, init=init, **common
        )
        self.bias = (
            expert_parameter(
                num_experts, out_features, etp_dim=None if self.row else 1, init=zeros_, **common
            )
            if bias
            else None
        )

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """`y` [rows, out] of `x` [rows, in], whose rows are sorted by expert: `counts` of each."""
        y: Tensor = _GroupedMatmul.apply(*as_autocast(x, self.weight), counts)
        biases: Tensor | None = self.bias
        if biases is None:
            return y
        if self.row:
            first = dist.get_rank(self.etp_group) == 0
            biases = copy_to_tensor_parallel_region(biases, group=self.etp_group) * first
        return torch.cat([rows + biases[i] for i, rows in enumerate(y.split(counts))])


class Experts(Module):
    """fc2(activation(fc1(x))) for every expert, the ffn features split over etp.

    Inputs are rows sorted by expert, Replicate over etp, whose gradients are Partial; outputs are
    summands over etp. The dispatcher gathers and sums them: there is no communication here but
    that of a bias. With swiglu, fc1 is packed, [gate | up], and every rank has its part of both.
    Parameters are marked `allreduce` False, as Megatron's: replicas are along edp, not dp.

    Raises ValueError for experts that do not divide by ep and an ffn that does not by etp.
    """

    def __init__(
        self,
        hidden: int,
        *,
        ffn: int,
        num_experts: int,
        ep_group: ProcessGroup,
        etp_group: ProcessGroup,
        init: Initialiser,
        activation: str = "gelu",
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: {activation!r} is not one of {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.fc1 = GroupedLinear(
            hidden,
            out_features=ffn * (2 if activation == "swiglu" else 1),
            num_experts=num_experts,
            etp_dim=1,
            ep_group=ep_group,
            etp_group=etp_group,
            init=init,
            bias=bias,
            stride=2 if activation == "swiglu" else 1,
            dtype=dtype,
            device=device,
        )
        self.fc2 = GroupedLinear(
            ffn,
            out_features=hidden,
            num_experts=num_experts,
            etp_dim=2,
            ep_group=ep_group,
            etp_group=etp_group,
            init=init,
            bias=bias,
            dtype=dtype,
            device=device,
        )

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """Summands of the outputs [rows, hidden] of `x` [rows, hidden], sorted by expert."""
        inner = self.fc1(x, counts)
        if self.activation == "swiglu":
            gate, up = inner.chunk(2, dim=-1)
            return self.fc2(silu(gate) * up, counts)
        return self.fc2(gelu(inner), counts)


def expert_parameter(
    *shape: int,
    etp_dim: int | None,
    stride: int,
    ep_group: ProcessGroup,
    etp_group: ProcessGroup,
    init: Initialiser,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Parameter:
    """This rank's part of the stacked parameters [experts, ...] of all experts: its experts and, of
    each of `stride` blocks of dimension `etp_dim`, its part over etp.

    Values do not depend on the groups, because `init` fills the full parameter, which is on every
    rank for a moment unless `init` is `defer`. ValueError where a dimension does not divide.
    """
    local = [divide(shape[0], group=ep_group, name="num_experts"), *shape[1:]]
    if etp_dim is not None:
        local[etp_dim] = stride * divide(shape[etp_dim] // stride, group=etp_group, name="ffn")
    if init is defer:
        part = torch.empty(local, dtype=dtype, device=device)
        defer(part)
    else:
        full = torch.empty(shape, dtype=dtype, device=device)
        with torch.no_grad():
            init(full)
            part = split(full, dim=0, group=ep_group)
            if etp_dim is not None:
                blocks = part.chunk(stride, etp_dim)
                part = torch.cat([split(b, dim=etp_dim, group=etp_group) for b in blocks], etp_dim)
    marks: dict[str, bool | int] = {"allreduce": False, "tensor_model_parallel": False}
    if etp_dim is not None:
        marks |= {"tensor_model_parallel": True, "partition_dim": etp_dim}
        marks |= {"partition_stride": stride}
    parameter = Parameter(part)
    for name, value in marks.items():
        setattr(parameter, name, value)
    return parameter
