"""Linear layers split over a tensor-parallel group: by output features, or by input features.

A column-parallel layer followed by a row-parallel one needs no collective in between (Shoeybi et
al., arXiv:1909.08053, section 3). With sequence parallelism the activations around the pair are
Shard(0) instead of Replicate, at the same cost of communication (Korthikanti et al.,
arXiv:2205.05198, section 4.2). Activations are [sequence, ..., features].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn import Module
from torch.nn import functional as F
from torch.nn.init import zeros_

from impl.collectives import (
    all_gather,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from impl.mappings import (
    gather_from_tensor_parallel_region,
    reduce_from_tensor_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_tensor_parallel_region,
)
from impl.parameters import Initialiser, replicated_parameter, sharded_parameter
from impl.weight_pass import as_autocast, linear, parameter_of, weight_pass_of, weight_product

Output = tuple[Tensor, Tensor | None]


class _ColumnMatmul(torch.autograd.Function):
    """x @ weight.T with the gradient of x summed over the group while that of weight is computed.

    Under sequence parallelism x is gathered here, and only this rank's part is kept: backward
    gathers it again, which is what makes sequence parallelism save memory. What no gradient needs
    is not kept at all.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, group: ProcessGroup, sequence_parallel: bool
    ) -> Tensor:
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        ctx.weight = parameter_of(weight)
        full = all_gather(x, dim=0, group=group) if sequence_parallel else x
        return F.linear(full, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        later = weight_pass_of(ctx.weight) if needs_weight else None
        gathering = summing = gradient_of_weight = None
        if needs_weight and later is None and ctx.sequence_parallel:
            gathering = start_all_gather(x, group=ctx.group)
        if needs_x:
            partial = gradient @ weight
            start = start_reduce_scatter if ctx.sequence_parallel else start_all_reduce
            summing = start(partial, group=ctx.group)
        if later is not None:
            group = ctx.group if ctx.sequence_parallel else None
            later.put_off(ctx.weight, lambda: _product_of_parts(gradient, x, group=group))
        elif needs_weight:
            full = x if gathering is None else gathering.wait()
            gradient_of_weight = weight_product(gradient, full)
        return None if summing is None else summing.wait(), gradient_of_weight, None, None


def _product_of_parts(gradient: Tensor, x: Tensor, *, group: ProcessGroup | None) -> Tensor:
    """`weight_product`, where x is Shard(0) over a group or, for None, whole."""
    full = x if group is None else all_gather(x, dim=0, group=group)
    return weight_product(gradient, full)


class ColumnParallelLinear(Module):
    """y = x weight^T + bias, with the output features split over the group.

    `weight` [out_features, in_features] and `bias` [out_features] are Shard(0). `x` is Replicate,
    or Shard(0) with `sequence_parallel`; so is its gradient, complete, whether or not the weight
    is frozen. `y` is Shard(-1), or Replicate with `gather_output`.

    Forward: none (sequence_parallel: all-gather of x; gather_output: all-gather of y). Backward:
    all-reduce of the gradient of x (sequence_parallel: all-gather of x, reduce-scatter).

    The output features may be `stride` equal blocks, such as [gate | up], of each of which every
    rank has its part.

    `init` fills the full weight. Raises ValueError for features that do not divide by the size of
    the group, and for `gather_output` together with `sequence_parallel` or with blocks.
    """

    def __init__(
        self,
        in_features: int,
        *,
        out_features: int,
        group: ProcessGroup,
        init: Initialiser,
        bias: bool = True,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        stride: int = 1,
        sequence_parallel: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if gather_output and sequence_parallel:
            raise ValueError(
                "gather_output: True is not allowed with sequence_parallel=True;"
                " leave the output sharded, or set sequence_parallel=False"
            )
        if gather_output and stride > 1:
            raise ValueError(
                f"gather_output: True is not allowed with {stride} blocks of output features;"
                " leave the output sharded"
            )
        self.group = group
        self.gather_output, self.skip_bias_add = gather_output, skip_bias_add
        self.sequence_parallel = sequence_parallel
        common: dict[str, Any] = {
            "name": "out_features",
            "group": group,
            "stride": stride,
            "dtype": dtype,
            "device": device,
        }
        self.weight = sharded_parameter(out_features, in_features, dim=0, init=init, **common)
        self.bias = sharded_parameter(out_features, dim=0, init=zeros_, **common) if bias else None

    def forward(self, x: Tensor) -> Output:
        """`y`, and with `skip_bias_add` the bias (this rank's part) for the caller to add."""
        x, weight = as_autocast(x, self.weight)
        y = _ColumnMatmul.apply(x, weight, self.group, self.sequence_parallel)
        if self.bias is not None and not self.skip_bias_add:
            y = y + self.bias
        if self.gather_output:
            y = gather_from_tensor_parallel_region(y, group=self.group)
        return y, self.bias if self.skip_bias_add else None


class RowParallelLinear(Module):
    """y = x weight^T + bias, with the input features split over the group.

    `weight` [out_features, in_features] is Shard(1), `bias` [out_features] is Replicate and added
    once, after the sum. `x` is Shard(-1), or Replicate without `input_is_parallel`; its gradient
    likewise. `y` is Replicate, or Shard(0) with `sequence_parallel`; then the gradient of the bias
    is Partial until `impl.gradients.finish_sequence_parallel_gradients`.

    Forward: all-reduce of y (sequence_parallel: reduce-scatter). Backward: none (sequence_parallel:
    all-gather of the gradient of y; without input_is_parallel: all-gather of the gradient of x).

    `init` fills the full weight. Raises ValueError for features, and under sequence parallelism for
    a sequence, that do not divide by the size of the group, and for `sequence_parallel` without
    `input_is_parallel`.
    """

    def __init__(
        self,
        in_features: int,
        *,
        out_features: int,
        group: ProcessGroup,
        init: Initialiser,
        bias: bool = True,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        sequence_parallel: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if sequence_parallel and not input_is_parallel:
            raise ValueError(
                "input_is_parallel: False is not allowed with sequence_parallel=True;"
                " give the layer sharded features, or set sequence_parallel=False"
            )
        self.group, self.input_is_parallel = group, input_is_parallel
        self.skip_bias_add, self.sequence_parallel = skip_bias_add, sequence_parallel
        self.weight = sharded_parameter(
            out_features,
            in_features,
            dim=1,
            name="in_features",
            group=group,
            init=init,
            dtype=dtype,
            device=device,
        )
        self.bias = (
            replicated_parameter(
                out_features,
                init=zeros_,
                sequence_parallel=sequence_parallel,
                dtype=dtype,
                device=device,
            )
            if bias
            else None
        )

    def forward(self, x: Tensor) -> Output:
        """`y`, and with `skip_bias_add` the bias for the caller to add."""
        if not self.input_is_parallel:
            x = scatter_to_tensor_parallel_region(x, group=self.group)
        partial = linear(x, self.weight)
        if self.sequence_parallel:
            y = reduce_scatter_to_sequence_parallel_region(partial, group=self.group)
        else:
            y = reduce_from_tensor_parallel_region(partial, group=self.group)
        if self.bias is not None and not self.skip_bias_add:
            y = y + self.bias
        return y, self.bias if self.skip_bias_add else None
