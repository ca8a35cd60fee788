"""Collectives along a dimension of a tensor. They know nothing of autograd: see `impl.mappings`.

Inputs may have any strides, at least one dimension, and are not written to but where a name says
`in_place`. A group of one rank communicates nothing and gets its input back. The functions named
`start_...` return at once, and their result may be read after `Pending.wait` only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from impl.partition import divide, split

# torch 2.13 renamed them, and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


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


def start_all_reduce(
    x: Tensor, *, group: ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Pending:
    """Begin the sum of `x` over the group, or another reduction: Partial to Replicate."""
    if dist.get_world_size(group) == 1:
        return Pending(x, x)
    out = x.clone(memory_format=torch.contiguous_format)
    return Pending(out, out, dist.all_reduce(out, op=op, group=group, async_op=True))


def start_all_reduce_in_place(x: Tensor, *, group: ProcessGroup) -> Pending:
    """Begin to sum a contiguous `x` over the group, which is written where it is."""
    if dist.get_world_size(group) == 1:
        return Pending(x, x)
    return Pending(x, x, dist.all_reduce(x, group=group, async_op=True))


def start_all_gather_in_place(x: Tensor, *, group: ProcessGroup) -> Pending:
    """Begin to write every rank's part of dimension 0 of a contiguous `x` to that of the others.

    ValueError where the dimension does not divide.
    """
    if dist.get_world_size(group) == 1:
        return Pending(x, x)
    sent = split(x, dim=0, group=group)
    return Pending(x, sent, _all_gather(x, sent, group=group, async_op=True))


def start_all_gather(x: Tensor, *, group: ProcessGroup) -> Pending:
    """Begin to concatenate every rank's `x` along dimension 0: Shard(0) to Replicate."""
    size = dist.get_world_size(group)
    if size == 1:
        return Pending(x, x)
    sent = x.contiguous()
    out = x.new_empty((size * x.shape[0], *x.shape[1:]))
    return Pending(out, sent, _all_gather(out, sent, group=group, async_op=True))


def start_reduce_scatter(x: Tensor, *, group: ProcessGroup) -> Pending:
    """Begin the sum of `x`, of which each rank keeps its part of dimension 0: Partial to Shard(0).

    ValueError where the dimension does not divide.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return Pending(x, x)
    sent = x.contiguous()
    out = x.new_empty((divide(x.shape[0], group=group, name="x, dimension 0"), *x.shape[1:]))
    return Pending(out, sent, _reduce_scatter(out, sent, group=group, async_op=True))


def all_reduce(
    x: Tensor, *, group: ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """The sum of `x` over the group, or another reduction: Partial to Replicate."""
    return start_all_reduce(x, group=group, op=op).wait()


def all_gather(x: Tensor, *, dim: int, group: ProcessGroup) -> Tensor:
    """Every rank's `x` concatenated along `dim`, in group order: Shard(dim) to Replicate."""
    gathered = start_all_gather(x, group=group).wait()
    return _from_first(gathered, dim=dim, group=group)


def reduce_scatter(x: Tensor, *, dim: int, group: ProcessGroup) -> Tensor:
    """The sum of `x`, of which each rank keeps its part of `dim`: Partial to Shard(dim).

    ValueError where the dimension does not divide.
    """
    return start_reduce_scatter(_to_first(x, dim=dim, group=group), group=group).wait()


def all_to_all(x: Tensor, *, split_dim: int, concat_dim: int, group: ProcessGroup) -> Tensor:
    """From Shard(concat_dim) to Shard(split_dim): rank i gets part i of `split_dim` of every rank.

    ValueError where `split_dim` does not divide.
    """
    if dist.get_world_size(group) == 1:
        return x
    sent = _to_first(x, dim=split_dim, group=group).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return _from_first(received, dim=concat_dim, group=group)


def _to_first(x: Tensor, *, dim: int, group: ProcessGroup) -> Tensor:
    """The parts of `dim` that belong to the ranks, one after the other along dimension 0.

    Collectives know that dimension only. [.., n*d, ..] of n ranks becomes [n*.., d, ..].
    """
    dim %= x.dim()
    length = divide(x.shape[dim], group=group, name=f"x, dimension {dim}")
    parts = x.unflatten(dim, (dist.get_world_size(group), length))
    return parts.movedim(dim, 0).flatten(0, 1)


def _from_first(x: Tensor, *, dim: int, group: ProcessGroup) -> Tensor:
    """The inverse of `_to_first`: the parts of the ranks side by side along `dim`."""
    size = dist.get_world_size(group)
    dim %= x.dim()
    parts = x.unflatten(0, (size, x.shape[0] // size))
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def all_to_all_unequal(
    x: Tensor, *, send: list[int], receive: list[int], group: ProcessGroup
) -> Tensor:
    """Rows of `x` exchanged: `send[i]` of them, in order, go to rank i, which sends `receive[i]`.

    Every rank knows both. A length may be zero. The rows received lie in the order of the ranks.
    """
    if dist.get_world_size(group) == 1:
        return x
    received = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(received, x.contiguous(), receive, send, group=group)
    return received
