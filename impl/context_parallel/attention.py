"""Attention over a sequence that is split over ranks, by any of the algorithms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from impl.attention import checked_layer_number
from impl.context_parallel.all_gather import all_gather_attention
from impl.context_parallel.dropout import ShareDropout
from impl.context_parallel.hierarchical import hierarchical_attention
from impl.context_parallel.mask import AttentionMask
from impl.context_parallel.plan import ContextGroups, Extras, OnBlock, Plan
from impl.context_parallel.ring import ring_attention
from impl.context_parallel.scores import Scoring, gathered_marks
from impl.context_parallel.ulysses import ulysses_attention
from impl.context_parallel.zigzag import PackedSequences, Placement, chunks_of

CAUSAL = AttentionMask()


class Algorithm(Protocol):
    """How keys come to queries: local q, k, v to the local output, differentiable."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extras: Extras, *, plan: Plan) -> Tensor:
        """[s, b, heads, d] and twice [s, b, kv_heads, d] to [s, b, heads, d]."""
        ...


ALGORITHMS: Mapping[str, Algorithm] = {
    "all_gather": all_gather_attention,
    "ring": ring_attention,
    "ulysses": ulysses_attention,
    "hierarchical": hierarchical_attention,
}


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    algorithm: str,
    groups: ContextGroups,
    placement: Placement = "zigzag",
    mask: AttentionMask = CAUSAL,
    scale: float | None = None,
    layer_number: int | None = None,
    slopes: Tensor | None = None,
    sink: Tensor | None = None,
    padding: Tensor | None = None,
    packed: PackedSequences | None = None,
    dropout: ShareDropout | None = None,
    on_block: OnBlock | None = None,
) -> Tensor:
    """softmax(scale * q k^T - slope * distance, masked) v over the whole sequence, of which each
    rank has its chunks.

    `q` is [sequence / cp, batch, heads, d], `k` and `v` are [sequence / cp, batch, kv_heads, d] (d
    of v may be another); kv_heads divides heads. They, the output and all gradients lie over cp as
    `placement` says: Shard(0), or ZigzagShard(0); with `packed`, so for each sequence, and a query
    attends within its sequence. Padding takes no part: its output and its gradients are 0. `scale`
    is 1 / sqrt(d) unless given. Over a tensor-parallel group heads may be Shard(2): each rank calls
    this with its own. Sums are in float32 for dtypes narrower than that. `dropout` is of the shares
    of the softmax, which none keeps for backward.

    `slopes` [heads] are ALiBi's, of this rank's heads of q (`impl.masking`). `sink` [heads] is one
    more score of every query of a head, whose share goes nowhere; its gradient is Partial over cp,
    of this rank's queries. `padding`, bool [batch, sequence / cp], marks tokens of this rank that
    no query attends to, and lies over cp as they do; a query without a key to attend to gives
    zeros. `layer_number` is as in `Scoring`.

    Blocks in which nothing is attended to are not computed; `on_block` is told of the others.
    Collectives are those of the algorithm, and in forward an all-gather of `padding`, of which all
    is kept for backward. Raises ValueError, before any, for shapes that do not fit each other or
    the placement, and, on every rank alike, where the algorithm cannot do them.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: {algorithm!r} is not one of {', '.join(ALGORITHMS)}")
    _check_shapes(q, k, v)
    _check_extras(q, slopes, sink, padding)
    size = dist.get_world_size(groups.cp)
    chunks = chunks_of(q.shape[0] * size, size=size, placement=placement, packed=packed)
    plan = Plan(
        groups=groups,
        chunks=chunks,
        scoring=Scoring(
            mask=mask,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            layer_number=checked_layer_number(layer_number),
            slopes=slopes,
        ),
        dropout=dropout,
        on_block=on_block,
    )
    # Copies of parts of a fused tensor, which is then not kept for backward. They can be sent.
    q, k, v = (x.contiguous() for x in (q, k, v))
    marks = None if padding is None else gathered_marks(padding, group=groups.cp)
    return ALGORITHMS[algorithm](q, k, v, Extras(sink, marks), plan=plan)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if {q.dim(), k.dim(), v.dim()} != {4} or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{shapes}: give [sequence, batch, heads, d], d of q and k the same")
    if k.shape[:3] != v.shape[:3] or q.shape[:2] != k.shape[:2]:
        raise ValueError(f"{shapes}: sequence, batch and kv heads have to be the same")
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"kv_heads: {k.shape[2]} do not divide the {q.shape[2]} heads;"
            " give heads as a multiple of kv_heads"
        )


def _check_extras(
    q: Tensor, slopes: Tensor | None, sink: Tensor | None, padding: Tensor | None
) -> None:
    for name, given in (("slopes", slopes), ("sink", sink)):
        if given is not None and given.shape != q.shape[2:3]:
            raise ValueError(
                f"{name}: {list(given.shape)} are not one for each of the {q.shape[2]} heads of q"
            )
    if padding is None:
        return
    if padding.dtype is not torch.bool or padding.shape != (q.shape[1], q.shape[0]):
        raise ValueError(
            f"padding: {list(padding.shape)} {padding.dtype} does not mark the tokens of q"
            f" {list(q.shape)}; give bool [{q.shape[1]}, {q.shape[0]}], the batch first"
        )
