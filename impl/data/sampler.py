"""Which samples a step has, whatever the layout: a shuffle by seed and epoch, and a position in it.

Sample i of a text is tokens i * length to (i + 1) * length, and what should follow each. An epoch
has every sample once, in an order of its own. A run is at a position of this endless order, the
number of samples it has consumed; that number is all that there is to save.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from impl.random import seed_of


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The order of `count` samples, at least one."""

    count: int
    seed: int
    # That of the epoch in which the last position was.
    _orders: dict[int, Tensor] = field(default_factory=dict, init=False, compare=False, repr=False)

    def at(self, position: int) -> int:
        """The sample at a position, counted from 0."""
        epoch, index = divmod(position, self.count)
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = self._order(epoch)
        return int(self._orders[epoch][index])

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(f"{self.seed}/{epoch}"))
        return torch.randperm(self.count, generator=generator, device="cpu")

    def batch(
        self, consumed: int, *, size: int, dp_rank: int, dp_size: int, microbatch_size: int
    ) -> list[list[int]]:
        """This rank's samples of the `size` after `consumed`, by microbatch.

        Microbatch m of rank d of dp has the samples from (m * dp_size + d) * microbatch_size on, so
        all ranks together have the same ones, once, at any dp and microbatch size. ValueError for a
        size that these do not divide, and for fewer consumed than none.
        """
        if consumed < 0:
            raise ValueError(f"consumed: {consumed} is negative; give the samples before this step")
        each = dp_size * microbatch_size
        if size < 1 or microbatch_size < 1 or size % each:
            raise ValueError(
                f"global_batch_size: {size} does not divide by dp={dp_size} ranks of"
                f" microbatch_size={microbatch_size}; give a multiple of {each}"
            )
        return [
            [
                self.at(consumed + (m * dp_size + dp_rank) * microbatch_size + i)
                for i in range(microbatch_size)
            ]
            for m in range(size // each)
        ]


@dataclass(frozen=True)
class Samples:
    """Tokens cut into samples of `length`, each with the token after it. The last tokens, of which
    there are too few, are in none. ValueError where there is no sample."""

    tokens: np.ndarray
    length: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(
                f"length: {len(self.tokens)} tokens have no sample of {self.length} and the token"
                " after it; give a longer text or shorter samples"
            )

    @property
    def count(self) -> int:
        """How many there are."""
        return (len(self.tokens) - 1) // self.length

    def stack(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Tokens and targets of samples, int64 [samples, length]."""
        starts = [index * self.length for index in indices]
        rows = np.stack([self.tokens[start : start + self.length + 1] for start in starts])
        both = torch.from_numpy(rows.astype(np.int64))
        return both[:, :-1], both[:, 1:]
