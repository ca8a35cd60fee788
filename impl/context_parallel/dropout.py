"""Dropout of the shares of attention whose queries and heads are spread over ranks.

Attention drops shares of the softmax, after it was normalised (Vaswani et al., arXiv:1706.03762,
as all code has it), so a row's total is of all keys, kept or not. No rank has whole rows of shares,
but each has rows of its own, and draws what it keeps of them: all of them at once, in the order of
the whole sequence, whatever order the keys come in. For backward only the generator's state before
that is kept, and the mask is drawn again, as FlashAttention does (Dao et al., arXiv:2205.14135,
appendix B.4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from impl.context_parallel.zigzag import Chunk, Chunks
from impl.dropout import check_probability
from impl.random import Stream, default_generator


@dataclass(frozen=True)
class ShareDropout:
    """Shares are dropped with probability `p`, by numbers of `stream`, which is to differ on all
    ranks of tp and cp: each has rows that no other has."""

    p: float
    stream: Stream = nullcontext

    def __post_init__(self) -> None:
        check_probability(self.p, name="dropout")


class KeptShares:
    """What is kept of the shares of queries that lie as `queries`, of keys that all lie somewhere
    in `keys`; `shape` is [batch, heads].

    The mask has one byte for every share of these queries, as long as this object is there.
    """

    def __init__(
        self,
        dropout: ShareDropout,
        shape: tuple[int, int],
        *,
        queries: Chunks,
        keys: Chunks,
        device: torch.device,
        state: Tensor | None = None,
    ) -> None:
        """Drawn from the stream; or, in backward, as it was drawn from `state`, which leaves the
        generator as it is."""
        self._p, self._queries, self._keys = dropout.p, _places(queries), _places(keys)
        context = dropout.stream() if state is None else _drawing_from(state, device)
        with context:
            self.state = default_generator(device).get_state()
            full = (sum(c.length for c in queries), sum(c.length for c in keys))
            drawn = F.dropout(torch.ones(*shape, *full, device=device), self._p)
        self._kept = drawn != 0

    def scale(self, queries: Chunk, keys: Chunk, *, dtype: torch.dtype) -> Tensor:
        """By what a block's shares are multiplied, [queries, batch, heads, keys]: 0 for those that
        are dropped, 1 / (1 - p) else."""
        rows, columns = self._queries[_key(queries)], self._keys[_key(keys)]
        block = self._kept[:, :, rows : rows + queries.tokens, columns : columns + keys.tokens]
        return block.permute(2, 0, 1, 3).to(dtype) / (1 - self._p)


def _key(chunk: Chunk) -> tuple[int, int]:
    return chunk.sequence, chunk.position


def _places(chunks: Chunks) -> Mapping[tuple[int, int], int]:
    """Where each chunk begins when they lie in the order of the whole sequence."""
    found, start = {}, 0
    for chunk in sorted(chunks, key=_key):
        found[_key(chunk)] = start
        start += chunk.length
    return found


@contextmanager
def _drawing_from(state: Tensor, device: torch.device) -> Iterator[None]:
    """The default generator draws what it drew after `state`, and then goes on as before."""
    generator = default_generator(device)
    before = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(before)
