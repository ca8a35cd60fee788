"""How random generators are left: backward draws no numbers that a later forward would, and what is
computed again leaves no trace.

1. After backward every generator is as forward left it, whatever was drawn again in between.
2. With recomputation every generator is left, by forward and by backward, as it is without.

Law 1 alone would miss a forward that draws more with recomputation than without; law 2 alone, what
moves a generator in backward either way. Only subjects that tell their states are judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from verify.rank_program import Observation


def moved_by_backward(observations: Sequence[Observation]) -> tuple[str, ...]:
    """How the ranks break law 1, one line for each."""
    return tuple(
        f"rank {rank}: backward leaves the generator {name} in another state than forward left"
        for rank, each in enumerate(observations)
        for name in _changed(each.between, each.states)
    )


def left_elsewhere(plain: Sequence[Observation], again: Sequence[Observation]) -> tuple[str, ...]:
    """How the ranks break law 2, and those that drop other elements in forward."""
    return tuple(_left(plain, again))


def _left(plain: Sequence[Observation], again: Sequence[Observation]) -> Iterator[str]:
    for rank, (one, other) in enumerate(zip(plain, again, strict=True)):
        if not all(map(torch.equal, one.masks, other.masks)):
            yield f"rank {rank} draws other dropout masks in forward"
        for when, before, after in (
            ("forward", one.between, other.between),
            ("backward", one.states, other.states),
        ):
            for name in _changed(before, after):
                yield f"rank {rank}: the generator {name} is left in another state by {when}"


def _changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """The generators with another state, or that are told of once only."""
    apart = sorted(before.keys() ^ after.keys())
    both = [name for name in before if name in after]
    return apart + [name for name in both if not torch.equal(before[name], after[name])]
