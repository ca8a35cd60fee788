"""How activations move between placements, forward and backward: Megatron-LM's mappings.

Every mapping is a pair of collectives. Forward makes one placement of an activation from another,
and backward does the same to its gradient, whose placements are the conjugates: the gradient of
what is Replicate because every rank needs it is Partial, as each rank knows its own use only.

| mapping | x to y | forward | gradient: y to x | backward |
|---|---|---|---|---|
| copy to tp | R to R | none | P to R | all-reduce |
| reduce from tp | P to R | all-reduce | R to R | none |
| scatter to tp | R to S(-1) | split | S(-1) to R | all-gather |
| gather from tp | S(-1) to R | all-gather | R to S(-1) | split |
| scatter to sp | R to S(0) | split | S(0) to R | all-gather |
| gather from sp | S(0) to R | all-gather | P to S(0), or R to S(0) | reduce-scatter, or split |
| reduce-scatter to sp | P to S(0) | reduce-scatter | S(0) to R | all-gather |
| all-gather last dim | S(-1) to R | all-gather | P to S(-1) | reduce-scatter |
| reduce-scatter last dim | P to S(-1) | reduce-scatter | S(-1) to R | all-gather |
| sequence to hidden | S(0) to S(-1) | all-to-all | S(-1) to S(0) | all-to-all |
| hidden to sequence | S(-1) to S(0) | all-to-all | S(0) to S(-1) | all-to-all |

R is Replicate, S(d) is Shard(d) and P is Partial, over `group`. Activations are [sequence, ...,
hidden], of any dtype. A dimension that must be split and does not divide raises ValueError on every
rank before a collective begins. The first two are f and g of Shoeybi et al., arXiv:1909.08053;
those of sequence parallelism are from Korthikanti et al., arXiv:2205.05198.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from impl.collectives import all_gather, all_reduce, all_to_all, reduce_scatter
from impl.partition import split


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce(gradient, group=ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce(x, group=group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return split(x, dim=dim, group=group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(gradient, dim=ctx.dim, group=ctx.group), None, None


class _Gather(torch.autograd.Function):
    """The gradient is Replicate: what follows is computed alike on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim=dim, group=group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return split(gradient, dim=ctx.dim, group=ctx.group), None, None


class _GatherForPartial(torch.autograd.Function):
    """The gradient is Partial: each rank puts what is gathered to a use of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim=dim, group=group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(gradient, dim=ctx.dim, group=ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return reduce_scatter(x, dim=dim, group=group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(gradient, dim=ctx.dim, group=ctx.group), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, split_dim: int, concat_dim: int, group: ProcessGroup
    ) -> Tensor:
        ctx.dims, ctx.group = (split_dim, concat_dim), group
        return all_to_all(x, split_dim=split_dim, concat_dim=concat_dim, group=group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        concat_dim, split_dim = ctx.dims
        back = all_to_all(gradient, split_dim=split_dim, concat_dim=concat_dim, group=ctx.group)
        return back, None, None, None


def copy_to_tensor_parallel_region(x: Tensor, *, group: ProcessGroup) -> Tensor:
    """Replicate to Replicate; the gradient, Partial, is all-reduced."""
    return _Copy.apply(x, group)


def reduce_from_tensor_parallel_region(x: Tensor, *, group: ProcessGroup) -> Tensor:
    """Partial to Replicate by an all-reduce; the gradient, Replicate, stays as it is."""
    return _Reduce.apply(x, group)


def scatter_to_tensor_parallel_region(x: Tensor, *, group: ProcessGroup) -> Tensor:
    """Replicate to Shard(-1); the gradient is all-gathered."""
    return _Scatter.apply(x, -1, group)


def gather_from_tensor_parallel_region(x: Tensor, *, group: ProcessGroup) -> Tensor:
    """Shard(-1) to Replicate by an all-gather; the gradient, Replicate, is split."""
    return _Gather.apply(x, -1, group)


def scatter_to_sequence_parallel_region(x: Tensor, *, group: ProcessGroup) -> Tensor:
    """Replicate to Shard(0); the gradient is all-gathered."""
    return _Scatter.apply(x, 0, group)


def gather_from_sequence_parallel_region(
    x: Tensor, *, group: ProcessGroup, tensor_parallel_output_grad: bool = True
) -> Tensor:
    """Shard(0) to Replicate by an all-gather.

    The gradient is Partial and reduce-scattered where a tensor-parallel region follows; else it is
    Replicate and split.
    """
    mapping = _GatherForPartial if tensor_parallel_output_grad else _Gather
    return mapping.apply(x, 0, group)


def reduce_scatter_to_sequence_parallel_region(x: Tensor, *, group: ProcessGroup) -> Tensor:
    """Partial to Shard(0) by a reduce-scatter; the gradient is all-gathered."""
    return _ReduceScatter.apply(x, 0, group)


def all_gather_last_dim_from_tensor_parallel_region(x: Tensor, *, group: ProcessGroup) -> Tensor:
    """Shard(-1) to Replicate by an all-gather; the gradient, Partial, is reduce-scattered."""
    return _GatherForPartial.apply(x, -1, group)


def reduce_scatter_last_dim_to_tensor_parallel_region(x: Tensor, *, group: ProcessGroup) -> Tensor:
    """Partial to Shard(-1) by a reduce-scatter; the gradient is all-gathered."""
    return _ReduceScatter.apply(x, -1, group)


def all_to_all_sequence_to_hidden(x: Tensor, *, group: ProcessGroup) -> Tensor:
    """Shard(0) to Shard(-1): [s/tp, ..., h] to [s, ..., h/tp]; the gradient takes the way back."""
    return _AllToAll.apply(x, -1, 0, group)


def all_to_all_hidden_to_sequence(x: Tensor, *, group: ProcessGroup) -> Tensor:
    """Shard(-1) to Shard(0): [s, ..., h/tp] to [s/tp, ..., h]; the gradient takes the way back."""
    return _AllToAll.apply(x, 0, -1, group)
