"""The scores of one block, a chunk of queries with a chunk of keys, before the softmax.

Beside products of queries and keys, positions decide: which pairs are allowed (`mask`), and what
their distance adds (ALiBi, Press et al., arXiv:2108.12409). Positions are those in the sequence,
whichever rank holds the chunks. Keys may also be marked one by one, as padding.

Queries are [s, b, heads, d], keys [t, b, kv_heads, d]: heads lie in order of the kv head that they
share (grouped-query attention, Ainslie et al., arXiv:2305.13245).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, einsum
from torch.distributed import ProcessGroup

from impl.collectives import all_gather
from impl.context_parallel.mask import AttentionMask
from impl.context_parallel.zigzag import Chunk, Chunks
from impl.masking import alibi_bias

MINUS_INFINITY = float("-inf")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for what is narrower, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[s, b, heads, ...] with the heads of each kv head together in a dimension of their own."""
    return x.unflatten(2, (kv_heads, x.shape[2] // kv_heads))


@dataclass(frozen=True)
class KeyPadding:
    """Which keys are padding: `marks`, bool [sequence, batch], of all keys, lying as `chunks`."""

    marks: Tensor
    chunks: Chunks

    def real(self, keys: Chunk) -> Tensor:
        """Which keys of a chunk are none, bool [batch, keys]."""
        lies = {(c.sequence, c.position): c.rows for c in self.chunks}
        return ~self.marks[lies[keys.sequence, keys.position]].transpose(0, 1)


def gathered_marks(padding: Tensor, *, group: ProcessGroup) -> Tensor:
    """The marks [sequence, batch] of all ranks' tokens, in the order of the ranks, of this rank's
    `padding`, bool [batch, sequence / n]. One all-gather."""
    return all_gather(padding.transpose(0, 1), dim=0, group=group)


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Scores are scale q k^T - slope distance where `mask` allows it, and minus infinity else.

    `slopes` [heads] are those of the heads of the queries; None: distance adds nothing. Products
    are divided by `layer_number` when they are computed and multiplied by it after, in the
    accumulation dtype, as Megatron-LM's query-key layer scaling has it.
    """

    mask: AttentionMask
    scale: float
    layer_number: int = 1
    slopes: Tensor | None = None

    def of_heads(self, heads: slice) -> Scoring:
        """The same for some of the heads."""
        return self if self.slopes is None else replace(self, slopes=self.slopes[heads])

    def scores(
        self, q: Tensor, k: Tensor, *, queries: Chunk, keys: Chunk, padding: KeyPadding | None
    ) -> Tensor:
        """[s, b, kv_heads, heads / kv_heads, t] of the tokens of two chunks, in the accumulation
        dtype."""
        dtype = accumulation_dtype(q.dtype)
        products = einsum("sbgrd,tbgd->sbgrt", grouped(q.to(dtype), k.shape[2]), k.to(dtype))
        found = products * (self.scale / self.layer_number)
        if self.layer_number != 1:
            found = found * self.layer_number
        if self.slopes is not None:
            found = found + self._bias(queries, keys, kv_heads=k.shape[2], dtype=dtype)
        allowed = self.mask.allowed(queries, keys, device=k.device)
        if allowed is not None:
            allowed = allowed[:, None]
        if padding is not None:
            real = padding.real(keys)[None]
            allowed = real if allowed is None else allowed & real
        if allowed is None:
            return found
        return found.masked_fill(~allowed[:, :, None, None, :], MINUS_INFINITY)

    def _bias(self, queries: Chunk, keys: Chunk, *, kv_heads: int, dtype: torch.dtype) -> Tensor:
        assert self.slopes is not None
        at, of = (
            torch.arange(c.position, c.position + c.tokens, device=self.slopes.device)
            for c in (queries, keys)
        )
        bias = alibi_bias(self.slopes.to(dtype), queries=at, keys=of)
        return grouped(bias.permute(1, 0, 2)[:, None], kv_heads)
