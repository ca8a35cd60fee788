"""All blocks of a rank's queries, in whatever portions their keys come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from impl.context_parallel.blocks import Rows, attend, attend_backward, sink_gradient
from impl.context_parallel.dropout import KeptShares
from impl.context_parallel.plan import Extras, Plan
from impl.context_parallel.zigzag import Chunk, Chunks


class ForwardSweep:
    """The output of queries `q` [s, b, heads, d] that lie as `chunks`, of the keys it is shown."""

    def __init__(
        self, q: Tensor, extras: Extras, *, chunks: Chunks, value_dim: int, plan: Plan
    ) -> None:
        self._q, self._extras, self._chunks, self._plan = q, extras, chunks, plan
        self._kept, self._padding = plan.kept_shares(q, chunks), plan.padding(extras.marks)
        self.rows = Rows.without_keys(q, value_dim=value_dim, sink=extras.sink)

    def show(self, k: Tensor, v: Tensor, chunks: Chunks) -> None:
        """Attend to keys and values that lie as `chunks`. Each is shown once."""
        for mine, theirs in _blocks(self._plan, self._chunks, chunks):
            scores = self._plan.scoring.scores(
                self._q[mine.rows],
                k[theirs.rows],
                queries=mine,
                keys=theirs,
                padding=self._padding,
            )
            kept = _of_block(self._kept, mine, theirs, self.rows.total.dtype)
            block = attend(scores, v[theirs.rows], kept=kept)
            self.rows.merge(mine.rows, block)
            if self._plan.on_block is not None:
                self._plan.on_block(mine, theirs)

    def save(self, ctx: Any, k: Tensor, v: Tensor) -> Tensor:
        """Keep for a `BackwardSweep` what it needs, with k and v; the output, in q's dtype."""
        out = self.rows.out.to(self._q.dtype)
        ctx.save_for_backward(self._q, k, v, out, self.rows.peak, self.rows.total, *self._extras)
        ctx.queries, ctx.plan = self._chunks, self._plan
        ctx.random_state = None if self._kept is None else self._kept.state
        return out


class BackwardSweep:
    """The gradients of what a `ForwardSweep` saved. `dq` grows with every portion of keys; it is in
    the accumulation dtype. `k` and `v` are those that were saved."""

    def __init__(self, ctx: Any, gradient: Tensor) -> None:
        self._q, self.k, self.v, out, self._peak, self._total, *extras = ctx.saved_tensors
        self._gradient, self._chunks, self._plan = gradient, ctx.queries, ctx.plan
        self._sink, marks = extras
        self._padding = self._plan.padding(marks)
        self._dtype = self._total.dtype
        self._kept = self._plan.kept_shares(self._q, self._chunks, state=ctx.random_state)
        self._delta = (gradient.to(self._dtype) * out.to(self._dtype)).sum(-1)
        self.dq = torch.zeros_like(self._q, dtype=self._dtype)

    def show(self, k: Tensor, v: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
        """What these queries add to the gradients of k and v, in the accumulation dtype."""
        dk, dv = (torch.zeros_like(x, dtype=self._dtype) for x in (k, v))
        for mine, theirs in _blocks(self._plan, self._chunks, chunks):
            q_block, k_block = self._q[mine.rows], k[theirs.rows]
            scores = self._plan.scoring.scores(
                q_block, k_block, queries=mine, keys=theirs, padding=self._padding
            )
            of_q, of_k, of_v = attend_backward(
                self._gradient[mine.rows],
                scores,
                q_block,
                k_block,
                v[theirs.rows],
                peak=self._peak[mine.rows],
                total=self._total[mine.rows],
                delta=self._delta[mine.rows],
                scale=self._plan.scoring.scale,
                kept=_of_block(self._kept, mine, theirs, self._dtype),
            )
            self.dq[mine.rows] += of_q
            dk[theirs.rows] += of_k
            dv[theirs.rows] += of_v
        return dk, dv

    def gradients(self, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        """Those of q, k, v, the sink and the marks in their dtypes."""
        of_sink = None
        if self._sink is not None:
            whole = {"peak": self._peak, "total": self._total, "delta": self._delta}
            of_sink = sink_gradient(self._sink, **whole).to(self._sink.dtype)
        found = self.dq.to(self._q.dtype), dk.to(self.k.dtype), dv.to(self.v.dtype)
        return *found, of_sink, None


def _of_block(
    kept: KeptShares | None, queries: Chunk, keys: Chunk, dtype: torch.dtype
) -> Tensor | None:
    return None if kept is None else kept.scale(queries, keys, dtype=dtype)


def _blocks(plan: Plan, queries: Chunks, keys: Chunks) -> Iterator[tuple[Chunk, Chunk]]:
    """The blocks in which any query attends to any key: all others are skipped."""
    for mine in queries:
        for theirs in keys:
            if plan.scoring.mask.attends(mine, theirs):
                yield mine, theirs
