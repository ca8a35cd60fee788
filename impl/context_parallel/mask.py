"""Which keys a query attends to, told block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from impl.context_parallel.zigzag import Chunk

Kind = Literal["causal", "full", "sliding_window"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class AttentionMask:
    """A query attends to keys of its own sequence: to all (`full`), to those up to its own position
    (`causal`), or to the last `window` of these (`sliding_window`).

    Raises ValueError for another kind, and for a window where none belongs or of less than one.
    """

    kind: Kind = "causal"
    window: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"mask: {self.kind!r} is not one of {', '.join(KINDS)}")
        if (self.window is not None) != (self.kind == "sliding_window"):
            raise ValueError(
                f"window: {self.window} does not go with mask={self.kind};"
                " give a window with mask=sliding_window, and only then"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window: {self.window} keys are too few; give at least 1")

    def attends(self, q: Chunk, k: Chunk) -> bool:
        """Whether any query of one chunk attends to any key of the other."""
        if q.sequence != k.sequence or not q.tokens or not k.tokens:
            return False
        nearest, farthest = self._distances(q, k)
        return farthest >= 0 and (self.window is None or nearest < self.window)

    def allowed(self, q: Chunk, k: Chunk, *, device: torch.device) -> Tensor | None:
        """Which query attends to which key, bool [queries, keys]; None where all do."""
        nearest, farthest = self._distances(q, k)
        if nearest >= 0 and (self.window is None or farthest < self.window):
            return None
        queries = torch.arange(q.tokens, device=device) + (q.position - k.position)
        distance = queries[:, None] - torch.arange(k.tokens, device=device)
        found = distance >= 0
        return found if self.window is None else found & (distance < self.window)

    def _distances(self, q: Chunk, k: Chunk) -> tuple[int, int]:
        """How far back the nearest and the farthest key of a chunk lie. With a full mask, that is
        no matter: 0."""
        if self.kind == "full":
            return 0, 0
        apart = q.position - k.position
        return apart - (k.tokens - 1), apart + (q.tokens - 1)
