"""How sizes and tensors are cut into the equal parts of a group's ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def divide(size: int, *, group: ProcessGroup, name: str) -> int:
    """The size of each rank's part. ValueError where `size`, called `name`, does not divide.

    Every rank of the group reaches the same answer without a collective.
    """
    parts = dist.get_world_size(group)
    if size < 1 or size % parts:
        raise ValueError(
            f"{name}: {size} does not divide by the {parts} ranks of its group;"
            f" give a positive multiple of {parts}"
        )
    return size // parts


def part_of(size: int, *, group: ProcessGroup, name: str) -> range:
    """The indices of this rank's part: the ranks hold consecutive parts, in group order."""
    length = divide(size, group=group, name=name)
    first = dist.get_rank(group) * length
    return range(first, first + length)


def split(x: Tensor, *, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part of dimension `dim` of `x`, which every rank holds in full.

    A copy, so that the full tensor can be freed. ValueError where the dimension does not divide.
    """
    dim %= x.dim()
    part = part_of(x.shape[dim], group=group, name=f"x, dimension {dim}")
    return x.narrow(dim, part.start, len(part)).clone(memory_format=torch.contiguous_format)
