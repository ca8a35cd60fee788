"""How a rank's local tensor relates to the full one.

`Placements` maps the name of a layout axis to a placement; an axis that is not named holds
replicas. Where two axes shard the same dimension, the one named first is the outer one. The words
are those of torch DTensor, with `ZigzagShard` for load-balanced context parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Replicate:
    """Every rank of the axis holds the same values."""


@dataclass(frozen=True)
class Shard:
    """Rank i of n holds the i-th of n equal parts of dimension `dim`.

    With `stride` s the dimension is first cut into s blocks and the i-th part of every block is
    held, as for packed projections ([gate | up] has stride 2; Megatron's `partition_stride`). With
    `lengths` the dimension is packed with sequences of these lengths, which are cut one by one.
    """

    dim: int
    stride: int = 1
    lengths: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class ZigzagShard:
    """Rank i of n holds chunks i and 2n-1-i of the 2n equal chunks of dimension `dim`.

    With `lengths` the dimension is packed with sequences of these lengths, each cut by itself.
    """

    dim: int
    lengths: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Listed:
    """Rank i of n holds the elements `indices[i]` of dimension `dim`, in this order: none, or ones
    that another rank holds too, as well as its own. So lie the layers of pipeline stages."""

    dim: int
    indices: tuple[tuple[int, ...], ...] = field(repr=False)


@dataclass(frozen=True)
class Partial:
    """The full tensor is the sum over the ranks of the axis."""


Cut = Shard | ZigzagShard | Listed
Placement = Replicate | Cut | Partial
Placements = Mapping[str, Placement]


def pieces(length: int, placement: Cut, size: int) -> list[list[slice]]:
    """For each of `size` ranks, the slices of a dimension of `length` it holds, in local order.

    Raises ValueError where the length, or that of a packed sequence, does not divide, and where
    what is listed is not there.
    """
    if isinstance(placement, Listed):
        return _listed_pieces(length, placement, size)
    if placement.lengths:
        return _packed_pieces(length, placement, size)
    if isinstance(placement, ZigzagShard):
        chunk, rest = divmod(length, 2 * size)
        order: list[tuple[int, ...]] = [(rank, 2 * size - 1 - rank) for rank in range(size)]
        needed = 2 * size
    else:
        chunk, rest = divmod(length, placement.stride * size)
        order = [
            tuple(block * size + rank for block in range(placement.stride)) for rank in range(size)
        ]
        needed = placement.stride * size
    if rest:
        raise ValueError(f"a dimension of {length} does not divide by {needed} ({placement})")
    return [[slice(i * chunk, (i + 1) * chunk) for i in indices] for indices in order]


def _listed_pieces(length: int, placement: Listed, size: int) -> list[list[slice]]:
    listed = {index for own in placement.indices for index in own}
    if len(placement.indices) != size or listed != set(range(length)):
        raise ValueError(
            f"{placement.indices} does not list a dimension of {length} for {size} ranks"
        )
    return [[slice(index, index + 1) for index in own] for own in placement.indices]


def _packed_pieces(length: int, placement: Shard | ZigzagShard, size: int) -> list[list[slice]]:
    if sum(placement.lengths) != length:
        raise ValueError(
            f"a dimension of {length} is not packed with sequences of {list(placement.lengths)}"
        )
    found: list[list[slice]] = [[] for _ in range(size)]
    first, alone = 0, replace(placement, lengths=())
    for each in placement.lengths:
        for mine, own in zip(found, pieces(each, alone, size), strict=True):
            mine += [slice(first + piece.start, first + piece.stop) for piece in own]
        first += each
    return found


def _take(full: Tensor, dim: int, slices: list[slice]) -> Tensor:
    parts = [full.narrow(dim, s.start, s.stop - s.start) for s in slices]
    if not parts:
        return full.narrow(dim, 0, 0)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def assemble(
    shape: Sequence[int],
    local: Mapping[int, Tensor],
    placements: Placements,
    sizes: Mapping[str, int],
    coordinates: Mapping[int, Mapping[str, int]],
) -> Tensor:
    """The full tensor of which each rank of `local` holds its part; where ranks hold copies, the
    last one's. `Partial` axes are taken for copies: sum them first."""
    places = torch.arange(prod(shape)).view(tuple(shape))
    first = next(iter(local.values()))
    full = first.new_zeros(tuple(shape)).reshape(-1)
    for rank, tensor in local.items():
        full[shard(places, placements, sizes, coordinates[rank]).reshape(-1)] = tensor.reshape(-1)
    return full.view(tuple(shape))


def shard(
    full: Tensor, placements: Placements, sizes: Mapping[str, int], coordinates: Mapping[str, int]
) -> Tensor:
    """The local part of `full` at `coordinates`. `Partial` axes are left as they are: see `lens`.

    `sizes` and `coordinates` give each axis' size and this rank's index on it.
    """
    local = full
    for axis, placement in placements.items():
        if isinstance(placement, Cut):
            slices = pieces(local.shape[placement.dim], placement, sizes[axis])[coordinates[axis]]
            local = _take(local, placement.dim % full.dim(), slices)
    return local
