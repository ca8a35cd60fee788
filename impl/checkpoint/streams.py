"""Which saved state a stream of random numbers goes on from, and seeds for those that have none."""

from __future__ import annotations

import torch
from torch import Tensor

from impl.random import RandomTracker, axes_of, seed_of, stream_seeds
from verify.layout import Layout


def row_of(stream: str, *, saved: Layout, layout: Layout, rank: int) -> int | None:
    """The rank of the layout `saved` whose state of a stream is that of `rank` of `layout`.

    At one and the same layout that is the rank itself. Otherwise it is one with the same index on
    the axes that the stream differs over, and None if these have other sizes: then what was split
    over them is split in another way, and no state belongs to this rank.
    """
    if saved == layout:
        return rank
    axes = axes_of(stream)
    if any(_size(saved, axis) != _size(layout, axis) for axis in axes):
        return None
    here = _coordinates(layout, rank)
    for other in range(saved.world_size):
        there = _coordinates(saved, other)
        if all(there[axis] == here[axis] for axis in axes):
            return other
    return None


def reseeded(
    tracker: RandomTracker, fingerprint: int, *, step: int, layout: Layout, rank: int
) -> dict[str, Tensor]:
    """States of all streams of a tracker that no run has used before: their seeds are made from the
    `fingerprint` of a checkpoint and the number of its `step`. Ranks share them as ever."""
    seeds = stream_seeds(seed_of(f"{fingerprint}/{step}"), layout=layout, rank=rank)
    generator = torch.Generator(tracker.device)
    return {name: generator.manual_seed(seeds[name]).get_state() for name in tracker.names}


def _size(layout: Layout, axis: str) -> int:
    return {**layout.expert_sizes, **layout.sizes}[axis]


def _coordinates(layout: Layout, rank: int) -> dict[str, int]:
    return {**layout.expert_coordinates(rank), **layout.coordinates(rank)}
