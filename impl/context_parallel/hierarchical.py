"""Context parallelism on two levels: heads are exchanged among the inner ranks, keys and values go
round the outer ones (Fang and Zhao, arXiv:2405.07719; Gu et al., arXiv:2406.18485).

The inner ranks are the near ones, which have the bandwidth for an all-to-all; the ring's messages
hide behind computation. The heads need to divide by the number of inner ranks only.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from impl.context_parallel.plan import ContextGroups, Extras, Plan
from impl.context_parallel.ring import ring_attention, ring_over
from impl.context_parallel.ulysses import with_heads_exchanged


def hierarchical_attention(
    q: Tensor, k: Tensor, v: Tensor, extras: Extras, *, plan: Plan
) -> Tensor:
    """Attention of q, k, v and output Shard(0) or ZigzagShard(0) over cp, by `with_heads_exchanged`
    over the inner level of `ring_over` the outer one.

    Kept as by `ulysses_attention`. ValueError for heads that do not divide by the number of inner
    ranks, and for groups that have not two levels, which a single rank does not need.
    """
    if dist.get_world_size(plan.groups.cp) == 1:
        return ring_attention(q, k, v, extras, plan=plan)
    inner, outer = _levels(plan.groups)
    plan.require_heads(heads=q.shape[2], kv_heads=k.shape[2], group=inner, name="hierarchical")
    chunks = plan.together(dist.get_world_size(inner))

    def attend(q: Tensor, k: Tensor, v: Tensor, extras: Extras, plan: Plan) -> Tensor:
        return ring_over(q, k, v, extras, group=outer, chunks=chunks, plan=plan)

    return with_heads_exchanged(q, k, v, extras, group=inner, plan=plan, attend=attend)


def _levels(groups: ContextGroups) -> tuple[ProcessGroup, ProcessGroup]:
    if len(groups.levels) != 2:
        raise ValueError(
            f"algorithm: hierarchical needs two levels of cp={dist.get_world_size(groups.cp)},"
            f" got {len(groups.levels)}; give hierarchical_cp=(inner, outer)"
        )
    inner, outer = groups.levels
    place = dist.get_rank(inner) + dist.get_world_size(inner) * dist.get_rank(outer)
    if place != dist.get_rank(groups.cp):
        raise ValueError(
            f"algorithm: hierarchical: rank {dist.get_rank(groups.cp)} of cp is rank {place} by its"
            " levels; give the levels of this cp group, innermost first"
        )
    return inner, outer
