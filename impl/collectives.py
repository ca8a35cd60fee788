"""Collectives along a dimension of a tensor. They know nothing of autograd: see `impl.mappings`.

Inputs may have any strides and are never written to; results are contiguous along their first
dimension. A group of one rank communicates nothing and gets its input back. The functions named
`start_...` return at once, and their result may be read after `Pending.wait` only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from impl.partition import divide


@dataclass(frozen=True)
class Pending:
    """A collective under way. Keeps what it sends alive until it is done."""

    result: Tensor
    sent: Tensor
    work: dist.Work | None = None

    def wait(self) -> Tensor:
        """The result, complete."""
        if self.work is not None:
            self.work.wait()
        return self.result


def start_all_reduce(x: Tensor, *, group: ProcessGroup) -> Pending:
    """Begin the sum of `x` over the group: Partial to Replicate."""
    if dist.get_world_size(group) == 1:
        return Pending(x, x)
    out = x.clone(memory_format=torch.contiguous_format)
    return Pending(out, out, dist.all_reduce(out, group=group, async_op=True))


def start_all_gather(x: Tensor, *, group: ProcessGroup) -> Pending:
    """Begin to concatenate every rank's `x` along dimension 0: Shard(0) to Replicate."""
    return _start_stack(x, group=group, flatten=True)


def start_reduce_scatter(x: Tensor, *, group: ProcessGroup) -> Pending:
    """Begin the sum of `x`, of which each rank keeps its part of dimension 0: Partial to Shard(0)."""
    size = dist.get_world_size(group)
    if size == 1:
        return Pending(x, x)
    sent = _stacked_parts(x, dim=0, group=group)
    out = torch.empty_like(sent[0])
    return Pending(out, sent, dist.reduce_scatter_tensor(out, sent, group=group, async_op=True))


def all_reduce(x: Tensor, *, group: ProcessGroup) -> Tensor:
    """The sum of `x` over the group: Partial to Replicate."""
    return start_all_reduce(x, group=group).wait()


def all_gather(x: Tensor, *, dim: int, group: ProcessGroup) -> Tensor:
    """Every rank's `x` concatenated along `dim`, in group order: Shard(dim) to Replicate."""
    if dist.get_world_size(group) == 1:
        return x
    stacked = _start_stack(x, group=group, flatten=False).wait()
    return _concatenated(stacked, dim=dim)


def reduce_scatter(x: Tensor, *, dim: int, group: ProcessGroup) -> Tensor:
    """The sum of `x`, of which each rank keeps its part of `dim`: Partial to Shard(dim).

    ValueError where the dimension does not divide.
    """
    if dist.get_world_size(group) == 1:
        return x
    parts = _stacked_parts(x, dim=dim, group=group)
    return start_reduce_scatter(parts, group=group).wait().squeeze(0)


def all_to_all(x: Tensor, *, split_dim: int, concat_dim: int, group: ProcessGroup) -> Tensor:
    """From Shard(concat_dim) to Shard(split_dim): rank i gets part i of `split_dim` of every rank.

    ValueError where `split_dim` does not divide.
    """
    if dist.get_world_size(group) == 1:
        return x
    sent = _stacked_parts(x, dim=split_dim, group=group)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return _concatenated(received, dim=concat_dim)


def _start_stack(x: Tensor, *, group: ProcessGroup, flatten: bool) -> Pending:
    """Begin to gather [ranks, *x.shape], with the first two dimensions merged if `flatten`."""
    size = dist.get_world_size(group)
    if size == 1:
        return Pending(x, x)
    sent = x.contiguous()
    out = x.new_empty((size, *x.shape))
    work = dist.all_gather_into_tensor(out, sent, group=group, async_op=True)
    return Pending(out.flatten(0, 1) if flatten else out, sent, work)


def _stacked_parts(x: Tensor, *, dim: int, group: ProcessGroup) -> Tensor:
    """The parts of dimension `dim` that the ranks of the group get, as [ranks, *part], contiguous."""
    dim %= x.dim()
    length = divide(x.shape[dim], group=group, name=f"x, dimension {dim}")
    parts = x.unflatten(dim, (dist.get_world_size(group), length))
    return parts.movedim(dim, 0).contiguous()


def _concatenated(stacked: Tensor, *, dim: int) -> Tensor:
    """[ranks, *part] as one tensor, the parts side by side along dimension `dim` of the part."""
    dim %= stacked.dim() - 1
    return stacked.movedim(0, dim).flatten(dim, dim + 1)
