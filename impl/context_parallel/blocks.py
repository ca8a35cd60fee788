"""Attention of one block, a chunk of queries with a chunk of keys, and how blocks become a whole.

The softmax over all keys is never there at once. A block yields its own output and the logarithm of
its normaliser, `out` and `lse`, from which the output over all blocks follows (online softmax,
Milakov and Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135, section 3.1). Backward
computes the weights of a block again, from the `lse` of the whole row.

Queries are [s, b, heads, d], keys and values [t, b, kv_heads, d]: heads lie in order of the
kv head that they share (grouped-query attention, Ainslie et al., arXiv:2305.13245). `out` is
[s, b, heads, d] and `lse` [s, b, heads]. Everything is computed in `accumulation_dtype`.
"""

from __future__ import annotations

import torch
from torch import Tensor, einsum

MINUS_INFINITY = float("-inf")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for what is narrower, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`out` and `lse` of a block. A row without an allowed key has 0 and minus infinity.

    `allowed` is bool [s, t], None for all.
    """
    scores = _scores(q, k, scale=scale, allowed=allowed)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - _finite(lse)[..., None])
    out = einsum("sbgrt,tbgd->sbgrd", weights, v.to(weights.dtype))
    return out.flatten(2, 3), lse.flatten(2, 3)


def merge(out: Tensor, lse: Tensor, *, block_out: Tensor, block_lse: Tensor) -> None:
    """Add a block of other keys to `out` and `lse`, in place; they begin with 0 and minus
    infinity."""
    total = torch.logaddexp(lse, block_lse)
    finite = _finite(total)
    out.mul_(torch.exp(lse - finite)[..., None])
    out.add_(block_out * torch.exp(block_lse - finite)[..., None])
    lse.copy_(total)


def attend_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    allowed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a block adds to the gradients of q, k and v, in the accumulation dtype.

    `lse` and `delta` [s, b, heads] are of whole rows; delta is the sum of gradient * out over d,
    which is what the softmax's own gradient subtracts (arXiv:2205.14135, appendix B.4).
    """
    kv_heads = k.shape[2]
    scores = _scores(q, k, scale=scale, allowed=allowed)
    weights = torch.exp(scores - _grouped(_finite(lse), kv_heads)[..., None])
    given = _grouped(gradient.to(weights.dtype), kv_heads)
    dv = einsum("sbgrt,sbgrd->tbgd", weights, given)
    of_weights = einsum("sbgrd,tbgd->sbgrt", given, v.to(weights.dtype))
    of_scores = weights * (of_weights - _grouped(delta, kv_heads)[..., None]) * scale
    dq = einsum("sbgrt,tbgd->sbgrd", of_scores, k.to(weights.dtype))
    dk = einsum("sbgrt,sbgrd->tbgd", of_scores, _grouped(q.to(weights.dtype), kv_heads))
    return dq.flatten(2, 3), dk, dv


def _scores(q: Tensor, k: Tensor, *, scale: float, allowed: Tensor | None) -> Tensor:
    """[s, b, kv_heads, heads / kv_heads, t]."""
    dtype = accumulation_dtype(q.dtype)
    scores = einsum("sbgrd,tbgd->sbgrt", _grouped(q.to(dtype), k.shape[2]), k.to(dtype)) * scale
    if allowed is None:
        return scores
    return scores.masked_fill(~allowed[:, None, None, None, :], MINUS_INFINITY)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[s, b, heads, ...] with the heads of each kv head together in a dimension of their own."""
    return x.unflatten(2, (kv_heads, x.shape[2] // kv_heads))


def _finite(lse: Tensor) -> Tensor:
    """`lse` as something to subtract: a row without keys has weights exp(-inf - 0) = 0."""
    return lse.masked_fill(lse == MINUS_INFINITY, 0.0)
