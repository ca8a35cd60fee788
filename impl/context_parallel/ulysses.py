"""Context parallelism by exchanging a split of the sequence for one of the heads: DeepSpeed-Ulysses
(Jacobs et al., arXiv:2309.14509).

After an all-to-all each rank has the whole sequence for its share of the heads, attends as if
alone, and a second all-to-all brings the output back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from impl.context_parallel.plan import Extras, Plan
from impl.context_parallel.sweep import BackwardSweep, ForwardSweep
from impl.context_parallel.zigzag import Chunks
from impl.mappings import all_to_all_hidden_to_sequence, all_to_all_sequence_to_hidden

Attend = Callable[[Tensor, Tensor, Tensor, Extras, Plan], Tensor]
"""Attention of q, k and v with their extras, by a plan that is for their heads."""


class _Alone(torch.autograd.Function):
    """Attention of what this rank holds, without any communication."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        marks: Tensor | None,
        chunks: Chunks,
        plan: Plan,
    ) -> Tensor:
        extras = Extras(sink, marks)
        sweep = ForwardSweep(q, extras, chunks=chunks, value_dim=v.shape[-1], plan=plan)
        sweep.show(k, v, chunks)
        return sweep.save(ctx, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        sweep = BackwardSweep(ctx, gradient)
        return *sweep.gradients(*sweep.show(sweep.k, sweep.v, ctx.queries)), None, None


def with_heads_exchanged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extras: Extras,
    *,
    group: ProcessGroup,
    plan: Plan,
    attend: Attend,
) -> Tensor:
    """`attend` with the sequence of all ranks of a group and this rank's share of the heads.

    [s, b, heads, d] becomes [s * n, b, heads / n, d] for it, and what else is of heads, sinks and
    slopes, that of these heads. Where there are fewer kv heads than ranks each is held by several,
    who add up its gradients. Forward: all-to-all of q, k, v and of the output. Backward: the same
    in the other direction.
    """
    size, kv_heads = dist.get_world_size(group), k.shape[2]
    if kv_heads < size:
        k, v = (x.repeat_interleave(size // kv_heads, dim=2) for x in (k, v))
    share = q.shape[2] // size
    heads = slice(dist.get_rank(group) * share, (dist.get_rank(group) + 1) * share)
    own = extras._replace(sink=None if extras.sink is None else extras.sink[heads])
    q_share, k_share, v_share = (_to_heads(x, group) for x in (q, k, v))
    out = attend(q_share, k_share, v_share, own, plan.of_heads(heads))
    back = all_to_all_hidden_to_sequence(out.flatten(2), group=group)
    return back.unflatten(2, (q.shape[2], v.shape[3]))


def _to_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    exchanged = all_to_all_sequence_to_hidden(x.flatten(2), group=group)
    return exchanged.unflatten(2, (-1, x.shape[3]))


def ulysses_attention(q: Tensor, k: Tensor, v: Tensor, extras: Extras, *, plan: Plan) -> Tensor:
    """Attention of q, k, v and output Shard(0) or ZigzagShard(0) over cp.

    Collectives are those of `with_heads_exchanged`. Kept: q, k, v, output, peak and total of as
    many elements as this rank's tokens have, kv heads counted as often as they are held, and the
    extras. ValueError for heads that do not divide by cp, and for kv heads that neither divide by
    it nor divide it.
    """
    cp = plan.groups.cp
    plan.require_heads(heads=q.shape[2], kv_heads=k.shape[2], group=cp, name="ulysses")
    (everything,) = plan.together(len(plan.chunks))

    def attend(q: Tensor, k: Tensor, v: Tensor, extras: Extras, plan: Plan) -> Tensor:
        return _Alone.apply(q, k, v, *extras, everything, plan)

    return with_heads_exchanged(q, k, v, extras, group=cp, plan=plan, attend=attend)
