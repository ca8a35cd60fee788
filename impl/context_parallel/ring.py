"""Ring attention: keys and values go round the ranks, point to point.

Liu et al., arXiv:2310.01889. In step i a rank attends to what the i-th rank before it holds, while
it sends that on. Backward sends K and V round again, and with them their gradients, to which every
rank adds its share, and which end up at home after one more step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from impl.context_parallel.plan import Extras, Plan
from impl.context_parallel.sweep import BackwardSweep, ForwardSweep
from impl.context_parallel.zigzag import Chunks


@dataclass(frozen=True)
class Shift:
    """Tensors on their way from every rank of a ring to its next. Keeps what is sent alive."""

    received: tuple[Tensor, ...]
    sent: tuple[Tensor, ...]
    works: Sequence[dist.Work]

    def wait(self) -> tuple[Tensor, ...]:
        """What the previous rank sent."""
        for work in self.works:
            work.wait()
        return self.received


def start_shift(*tensors: Tensor, group: ProcessGroup) -> Shift:
    """Begin to send tensors to the next rank of the group, and to receive the previous rank's.

    They are contiguous, and have one shape and dtype on all ranks. Sends and receives are posted
    together, so that none waits for another. Peers are global ranks, whatever their place in the
    group.
    """
    ranks, mine = dist.get_process_group_ranks(group), dist.get_rank(group)
    after, before = ranks[(mine + 1) % len(ranks)], ranks[mine - 1]
    received = tuple(torch.empty_like(tensor) for tensor in tensors)
    posted = [dist.P2POp(dist.isend, tensor, after, group) for tensor in tensors]
    posted += [dist.P2POp(dist.irecv, tensor, before, group) for tensor in received]
    return Shift(received, tensors, dist.batch_isend_irecv(posted))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        marks: Tensor | None,
        group: ProcessGroup,
        chunks: tuple[Chunks, ...],
        plan: Plan,
    ) -> Tensor:
        ctx.sources = _sources(group)
        own, extras = chunks[ctx.sources[0]], Extras(sink, marks)
        sweep = ForwardSweep(q, extras, chunks=own, value_dim=v.shape[-1], plan=plan)
        here: tuple[Tensor, ...] = (k, v)
        for source in ctx.sources:
            last = source == ctx.sources[-1]
            shift = None if last else start_shift(*here, group=group)
            sweep.show(here[0], here[1], chunks[source])
            here = here if shift is None else shift.wait()
        ctx.group, ctx.chunks = group, chunks
        return sweep.save(ctx, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        sweep = BackwardSweep(ctx, gradient)
        here: tuple[Tensor, ...] = (sweep.k, sweep.v)
        travelling: Shift | None = None
        for source in ctx.sources:
            last = source == ctx.sources[-1]
            shift = None if last else start_shift(*here, group=ctx.group)
            shares: tuple[Tensor, ...] = sweep.show(here[0], here[1], ctx.chunks[source])
            if travelling is not None:
                others = travelling.wait()
                shares = tuple(a + b for a, b in zip(others, shares, strict=True))
            if len(ctx.sources) > 1:
                travelling = start_shift(*shares, group=ctx.group)
            here = here if shift is None else shift.wait()
        dk, dv = shares if travelling is None else travelling.wait()
        return *sweep.gradients(dk, dv), None, None, None


def _sources(group: ProcessGroup) -> tuple[int, ...]:
    """Whose keys this rank has in each step, as ranks of the group: its own, then the previous
    rank's, and so on."""
    size, mine = dist.get_world_size(group), dist.get_rank(group)
    return tuple((mine - step) % size for step in range(size))


def ring_over(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extras: Extras,
    *,
    group: ProcessGroup,
    chunks: tuple[Chunks, ...],
    plan: Plan,
) -> Tensor:
    """Attention of what the ranks of `group` hold, which lies as `chunks`, for each of them, with k
    and v contiguous.

    Forward: n - 1 times k and v to the next rank. Backward: the same, and n times their gradients,
    in the accumulation dtype. Kept: q, k, v, output, peak and total of this rank's tokens, and
    the extras.
    """
    return _Ring.apply(q, k, v, *extras, group, chunks, plan)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, extras: Extras, *, plan: Plan) -> Tensor:
    """Attention of q, k, v and output Shard(0) or ZigzagShard(0) over cp, by `ring_over` cp."""
    return ring_over(q, k, v, extras, group=plan.groups.cp, chunks=plan.chunks, plan=plan)
