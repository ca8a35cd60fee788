"""Which part of a tensor of the whole model a rank holds: boxes, by their offsets in the full one.

A box is what torch.distributed.checkpoint calls a chunk. A parameter is one box, or one for each of
its blocks ([gate | up] has two, far apart in the full parameter). A share of a distributed
optimizer is a run of the flat parameter, which begins and ends anywhere: of d dimensions it is up
to 2d - 1 boxes, and each may be cut again by blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from impl.groups import Groups
from impl.parameters import is_shard, of_expert

Offsets = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """Elements `offsets` to `offsets + sizes` of a tensor."""

    offsets: Offsets
    sizes: tuple[int, ...]

    @property
    def ends(self) -> Offsets:
        """Where it ends in each dimension."""
        return tuple(map(sum, zip(self.offsets, self.sizes, strict=True)))


@dataclass(frozen=True)
class Split:
    """Dimension `dim` of the full tensor is `blocks` equal blocks, each cut into `parts`, of which
    this rank holds number `part`."""

    dim: int
    blocks: int
    part: int
    parts: int


@dataclass(frozen=True)
class Pieces:
    """What this rank has of a tensor of `size`: a view of its memory for each box, by its offsets.

    The views are what is saved, and what is loaded into. With `saved` False another rank saves the
    same, cut in another way, and this one only loads.
    """

    size: tuple[int, ...]
    dtype: torch.dtype
    views: dict[Offsets, Tensor]
    saved: bool = True


def row_of_many(values: Tensor, *, row: int, rows: int) -> Pieces:
    """A tensor as row number `row` of `rows`, of which the others are other ranks'."""
    offsets = (row, *(0 for _ in values.shape))
    return Pieces((rows, *values.shape), values.dtype, {offsets: values.unsqueeze(0)})


def pieces_of(
    parameter: Parameter,
    *,
    groups: Groups,
    rows: int | None,
    saved: bool,
    values: Tensor | None = None,
    start: int = 0,
) -> Pieces:
    """This rank's pieces of a parameter; or, with flat `values`, of something that is laid out like
    it, of which this rank has the elements from `start` on.

    How the parameter lies on the ranks is read from the attributes that `impl.parameters` and
    `impl.moe.experts` give it. `rows` is the size of dimension 0 where the rest of it is padding,
    which depends on the layout and belongs to no checkpoint.
    """
    splits = _splits(parameter, groups)
    size = list(parameter.shape)
    for each in splits:
        size[each.dim] *= each.parts
    size[0] = size[0] if rows is None else min(rows, size[0])
    flat = parameter.detach().view(-1) if values is None else values
    views: dict[Offsets, Tensor] = {}
    at = 0
    for box in run_of(parameter.shape, start, start + flat.numel()):
        part = flat[at : at + prod(box.sizes)].view(box.sizes)
        at += part.numel()
        views |= _placed(box, part, parameter.shape, splits, size)
    return Pieces(tuple(size), flat.dtype, views, saved)


def run_of(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The boxes of elements `start` to `stop` of a flat tensor, in order: the rest of a row, whole
    rows, the beginning of a row."""
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row
    if start % row:
        index = start // row
        end = min(stop - index * row, row)
        yield from _in_row(index, run_of(shape[1:], start - index * row, end))
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    if last >= first:
        yield from _in_row(last, run_of(shape[1:], 0, stop - last * row))


def overlap(one: Box, other: Box) -> Box | None:
    """What two boxes of a tensor have in common, None for nothing."""
    starts = tuple(map(max, one.offsets, other.offsets))
    ends = map(min, one.ends, other.ends)
    sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
    return Box(starts, sizes) if all(size > 0 for size in sizes) else None


def _in_row(index: int, boxes: Iterator[Box]) -> Iterator[Box]:
    for box in boxes:
        yield Box((index, *box.offsets), (1, *box.sizes))


def _splits(parameter: Parameter, groups: Groups) -> list[Split]:
    """The dimensions of a parameter that are cut."""
    found, expert = [], of_expert(parameter)
    if expert:
        found.append(Split(0, 1, dist.get_rank(groups.ep), dist.get_world_size(groups.ep)))
    if is_shard(parameter):
        group = groups.etp if expert else groups.tp
        dim, blocks = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
        found.append(Split(dim, blocks, dist.get_rank(group), dist.get_world_size(group)))
    return found


def _placed(
    box: Box, part: Tensor, shape: Sequence[int], splits: Sequence[Split], size: Sequence[int]
) -> dict[Offsets, Tensor]:
    """The box of the local tensor by where its elements are in the full one, `size`."""
    found = [(box.offsets, part)]
    for each in splits:
        length = shape[each.dim] // each.blocks
        found = [cut for offsets, view in found for cut in _by_block(offsets, view, each, length)]
    inside = {}
    for offsets, view in found:
        rows = min(view.shape[0], size[0] - offsets[0]) if view.dim() else 1
        if rows > 0:
            inside[offsets] = view[:rows] if view.dim() else view
    return inside


def _by_block(
    offsets: Offsets, view: Tensor, split: Split, length: int
) -> Iterator[tuple[Offsets, Tensor]]:
    """A view cut where the blocks of a dimension end, of which this rank has `length` each."""
    dim, first = split.dim, offsets[split.dim]
    stop = first + view.shape[dim]
    while first < stop:
        block, within = divmod(first, length)
        count = min(length - within, stop - first)
        there = (block * split.parts + split.part) * length + within
        part = view.narrow(dim, first - offsets[dim], count)
        yield (*offsets[:dim], there, *offsets[dim + 1 :]), part
        first += count
