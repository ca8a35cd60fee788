"""All blocks of a rank's queries, in whatever portions their keys come."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from impl.context_parallel.blocks import (
    MINUS_INFINITY,
    accumulation_dtype,
    attend,
    attend_backward,
    merge,
)
from impl.context_parallel.plan import Plan
from impl.context_parallel.zigzag import Chunk, Chunks


class ForwardSweep:
    """The output of queries `q` [s, b, heads, d] that lie as `chunks`, of the keys it is shown."""

    def __init__(self, q: Tensor, *, chunks: Chunks, value_dim: int, plan: Plan) -> None:
        dtype = accumulation_dtype(q.dtype)
        self._q, self._chunks, self._plan = q, chunks, plan
        self._out = q.new_zeros((*q.shape[:3], value_dim), dtype=dtype)
        self.lse = q.new_full(q.shape[:3], MINUS_INFINITY, dtype=dtype)

    def show(self, k: Tensor, v: Tensor, chunks: Chunks) -> None:
        """Attend to keys and values that lie as `chunks`. Each is shown once."""
        for mine, theirs in _blocks(self._plan, self._chunks, chunks):
            block_out, block_lse = attend(
                self._q[mine.rows],
                k[theirs.rows],
                v[theirs.rows],
                scale=self._plan.scale,
                allowed=self._plan.mask.allowed(mine, theirs, device=k.device),
            )
            merge(
                self._out[mine.rows],
                self.lse[mine.rows],
                block_out=block_out,
                block_lse=block_lse,
            )
            if self._plan.on_block is not None:
                self._plan.on_block(mine, theirs)

    @property
    def out(self) -> Tensor:
        """The output over what was shown, in the dtype of q; 0 where there was no key."""
        return self._out.to(self._q.dtype)


class BackwardSweep:
    """The gradients that belong to a `ForwardSweep` with these results. `dq` grows with every
    portion of keys; it is in the accumulation dtype."""

    def __init__(
        self, gradient: Tensor, q: Tensor, out: Tensor, lse: Tensor, *, chunks: Chunks, plan: Plan
    ) -> None:
        self._gradient, self._q, self._lse = gradient, q, lse
        self._chunks, self._plan = chunks, plan
        self._delta = (gradient.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        self.dq = torch.zeros_like(q, dtype=lse.dtype, memory_format=torch.contiguous_format)

    def show(self, k: Tensor, v: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
        """What these queries add to the gradients of k and v, in the accumulation dtype."""
        dk, dv = (
            torch.zeros_like(x, dtype=self._lse.dtype, memory_format=torch.contiguous_format)
            for x in (k, v)
        )
        for mine, theirs in _blocks(self._plan, self._chunks, chunks):
            of_q, of_k, of_v = attend_backward(
                self._gradient[mine.rows],
                self._q[mine.rows],
                k[theirs.rows],
                v[theirs.rows],
                lse=self._lse[mine.rows],
                delta=self._delta[mine.rows],
                scale=self._plan.scale,
                allowed=self._plan.mask.allowed(mine, theirs, device=k.device),
            )
            self.dq[mine.rows] += of_q
            dk[theirs.rows] += of_k
            dv[theirs.rows] += of_v
        return dk, dv


def _blocks(plan: Plan, queries: Chunks, keys: Chunks) -> Iterator[tuple[Chunk, Chunk]]:
    """The blocks in which any query attends to any key: all others are skipped."""
    for mine in queries:
        for theirs in keys:
            if plan.mask.attends(mine, theirs):
                yield mine, theirs
