"""The microbatches of a step on one rank: its samples of dp, and of these its tokens of cp."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from impl.context_parallel.zigzag import Placement, split_sequence
from impl.data.sampler import Sampler, Samples
from impl.groups import Groups
from impl.training import Microbatch


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Steps of `size` samples, of which a rank has microbatches of `microbatch_size`. Every target
    counts."""

    samples: Samples
    sampler: Sampler
    size: int
    microbatch_size: int
    groups: Groups
    placement: Placement = "zigzag"
    device: torch.device | None = None

    def after(self, consumed: int) -> list[Microbatch]:
        """This rank's microbatches of the step after so many samples; alike on all ranks of tp and
        pp. ValueError for sizes that do not divide by dp and cp, and for fewer than none."""
        found = self.sampler.batch(
            consumed,
            size=self.size,
            dp_rank=self.groups.rank("dp"),
            dp_size=self.groups.size("dp"),
            microbatch_size=self.microbatch_size,
        )
        return [self._microbatch(indices) for indices in found]

    def _microbatch(self, indices: list[int]) -> Microbatch:
        tokens, targets = (self._own(each) for each in self.samples.stack(indices))
        return Microbatch(tokens, targets, torch.ones_like(targets))

    def _own(self, rows: Tensor) -> Tensor:
        """Of [samples, length] the tokens of this rank of cp."""
        parts = split_sequence(rows.t(), group=self.groups.cp, placement=self.placement)
        return parts.t().contiguous().to(self.device)
