"""Attention of one block, a chunk of queries with a chunk of keys, and how blocks become a whole.

The softmax over all keys is never there at once. A block yields, for each row of scores, its peak,
the total of exp(score - peak), and the values weighted by the same; from these, those over all
blocks follow (online softmax, Milakov and Gimelshein, arXiv:1805.02867; Dao et al.,
arXiv:2205.14135, section 3.1). Backward computes the weights of a block again. Peak and total are
kept apart for that, not as the one number lse = peak + log(total): where a softmax is nearly
certain its gradient is a small difference, which the rounding of a large lse would drown.

A sink, one more score of every row whose share goes nowhere (Xiao et al., arXiv:2309.17453,
learnable as in gpt-oss), is what a row begins with: a peak and a total, and no values.

Shapes are those of `impl.context_parallel.scores`; all is computed in `accumulation_dtype`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, einsum

from impl.context_parallel.scores import MINUS_INFINITY, accumulation_dtype, grouped


@dataclass(frozen=True)
class Rows:
    """What rows of queries have of the keys they were shown: `weighted` values [s, b, heads, d],
    `peak` and `total` [s, b, heads]. Without a key: zeros, a peak of minus infinity; with a sink
    its score, and a total of one."""

    weighted: Tensor
    peak: Tensor
    total: Tensor

    @staticmethod
    def without_keys(q: Tensor, *, value_dim: int, sink: Tensor | None = None) -> Rows:
        """The rows of `q` before anything was shown but a `sink` [heads]."""
        dtype = accumulation_dtype(q.dtype)
        peak = q.new_full(q.shape[:3], MINUS_INFINITY, dtype=dtype)
        total = q.new_zeros(q.shape[:3], dtype=dtype)
        if sink is not None:
            peak.copy_(sink)
            total.fill_(1.0)
        return Rows(q.new_zeros((*q.shape[:3], value_dim), dtype=dtype), peak, total)

    def merge(self, rows: slice, block: Rows) -> None:
        """Add to some rows, in place, a block of keys that they were not shown yet."""
        weighted, peak, total = (x[rows] for x in (self.weighted, self.peak, self.total))
        highest = torch.maximum(peak, block.peak)
        before = torch.exp(peak - _finite(highest))
        after = torch.exp(block.peak - _finite(highest))
        weighted.mul_(before[..., None]).add_(block.weighted * after[..., None])
        total.mul_(before).add_(block.total * after)
        peak.copy_(highest)

    @property
    def out(self) -> Tensor:
        """softmax(scores) v over what was shown; zeros without a key."""
        return self.weighted / _nonzero(self.total)[..., None]


def attend(scores: Tensor, v: Tensor, *, kept: Tensor | None = None) -> Rows:
    """The rows of a block. `kept` [s, b, heads, t], by what dropout multiplies shares, does so to
    what is weighted, and leaves the totals alone."""
    peak = scores.amax(-1)
    weights = torch.exp(scores - _finite(peak)[..., None])
    left = weights if kept is None else weights * grouped(kept, v.shape[2])
    weighted = einsum("sbgrt,tbgd->sbgrd", left, v.to(weights.dtype))
    return Rows(*(x.flatten(2, 3) for x in (weighted, peak, weights.sum(-1))))


def attend_backward(
    gradient: Tensor,
    scores: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    peak: Tensor,
    total: Tensor,
    delta: Tensor,
    scale: float,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a block adds to the gradients of q, k and v, in the accumulation dtype.

    `peak`, `total` and `delta` [s, b, heads] are of whole rows; delta is the sum of gradient * out
    over d, which is what the softmax's own gradient subtracts (arXiv:2205.14135, appendix B.4), as
    much with dropout: `scores` and `kept` are what `attend` was given.
    """
    kv_heads = k.shape[2]
    peak, total, delta = (
        grouped(x, kv_heads)[..., None] for x in (_finite(peak), _nonzero(total), delta)
    )
    weights = torch.exp(scores - peak) / total
    given = grouped(gradient.to(weights.dtype), kv_heads)
    of_weights = einsum("sbgrd,tbgd->sbgrt", given, v.to(weights.dtype))
    left = weights
    if kept is not None:
        by = grouped(kept, kv_heads)
        left, of_weights = weights * by, of_weights * by
    dv = einsum("sbgrt,sbgrd->tbgd", left, given)
    of_scores = weights * (of_weights - delta) * scale
    dq = einsum("sbgrt,tbgd->sbgrd", of_scores, k.to(weights.dtype))
    dk = einsum("sbgrt,sbgrd->tbgd", of_scores, grouped(q.to(weights.dtype), kv_heads))
    return dq.flatten(2, 3), dk, dv


def sink_gradient(sink: Tensor, *, peak: Tensor, total: Tensor, delta: Tensor) -> Tensor:
    """The gradient of a `sink` [heads], of these rows: its share of each, times minus delta, for
    it weights nothing. Arguments are as in `attend_backward`."""
    shares = torch.exp(sink.to(peak.dtype) - peak) / total
    return -(shares * delta).sum((0, 1))


def _finite(peak: Tensor) -> Tensor:
    """A peak to subtract: where there is no key, weights are exp(-inf - 0) = 0."""
    return peak.masked_fill(peak == MINUS_INFINITY, 0.0)


def _nonzero(total: Tensor) -> Tensor:
    """A total to divide by: where there is no key, weights are 0 / 1."""
    return total.masked_fill(total == 0.0, 1.0)
