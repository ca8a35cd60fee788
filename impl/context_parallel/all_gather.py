"""Context parallelism by an all-gather of keys and values, as Llama 3 has it (arXiv:2407.21783,
section 3.3.2).

Each rank gathers the whole sequence of K and V and attends with its own queries. Only its own part
is kept for backward, which gathers again, and reduce-scatters the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from impl.collectives import start_all_gather, start_reduce_scatter
from impl.context_parallel.plan import Extras, Plan
from impl.context_parallel.sweep import BackwardSweep, ForwardSweep


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        marks: Tensor | None,
        plan: Plan,
    ) -> Tensor:
        cp = plan.groups.cp
        gathering = [start_all_gather(x, group=cp) for x in (k, v)]
        (everything,) = plan.together(len(plan.chunks))
        own = plan.chunks[dist.get_rank(cp)]
        extras = Extras(sink, marks)
        sweep = ForwardSweep(q, extras, chunks=own, value_dim=v.shape[-1], plan=plan)
        all_k, all_v = (each.wait() for each in gathering)
        sweep.show(all_k, all_v, everything)
        ctx.everything = everything
        return sweep.save(ctx, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cp = ctx.plan.groups.cp
        sweep = BackwardSweep(ctx, gradient)
        gathering = [start_all_gather(x, group=cp) for x in (sweep.k, sweep.v)]
        all_k, all_v = (each.wait() for each in gathering)
        partial = sweep.show(all_k, all_v, ctx.everything)
        summing = [start_reduce_scatter(each, group=cp) for each in partial]
        dk, dv = (each.wait() for each in summing)
        return *sweep.gradients(dk, dv), None


def all_gather_attention(q: Tensor, k: Tensor, v: Tensor, extras: Extras, *, plan: Plan) -> Tensor:
    """Attention of q, k, v and output Shard(0) or ZigzagShard(0) over cp.

    Forward: all-gather of k and of v. Backward: the same again, and the reduce-scatter of their
    gradients, in the accumulation dtype. Kept: q, k, v, output, peak and total of this rank's
    tokens, and the extras.
    """
    return _AllGather.apply(q, k, v, *extras, plan)
