"""Explanations in which the right values are in the wrong place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from math import prod

import torch
from torch import Tensor

from verify.diagnose.evidence import Evidence
from verify.finding import Explanation
from verify.placement import Placement, Shard, ZigzagShard


def other_placement(evidence: Evidence) -> Iterator[Explanation]:
    """The ranks hold the parts of another way to cut: contiguous, zigzag, or packed."""
    for axis in evidence.groups:
        dim = evidence.dim(axis)
        if dim is None:
            continue
        # Another axis may share the dimension out too.
        parts = prod(evidence.ranks.sizes[a] for a in evidence.groups if evidence.dim(a) == dim)
        ways: dict[str, Placement] = {
            "contiguous": Shard(dim),
            "zigzag": ZigzagShard(dim),
            "packed in two blocks": Shard(dim, stride=2),
        }
        own = next(
            (name for name, way in ways.items() if _same_way(evidence, axis, way)), "its own"
        )
        for name, way in ways.items():
            if name == own or evidence.full.shape[dim] % (2 * parts):
                continue
            placements = {**evidence.placements, axis: way}
            predicted = {r: evidence.cut(evidence.full, r, placements) for r in evidence.wrong}
            yield evidence.explain(
                f"the parts of dimension {dim} of {evidence.name} over {evidence.group_text(axis)}"
                f" are {name} instead of {own}",
                predicted,
            )


def ranks_exchanged(evidence: Evidence) -> Iterator[Explanation]:
    """Ranks of a group hold each other's parts."""
    for axis, groups in evidence.groups.items():
        if evidence.dim(axis) is None:
            continue
        holds = {
            rank: min(group, key=lambda other: _distance(evidence, rank, other))
            for group in groups
            for rank in group
        }
        if all(rank == other for rank, other in holds.items()):
            continue
        predicted = {rank: evidence.expected[holds.get(rank, rank)] for rank in evidence.wrong}
        pairs = [f"rank {rank} that of rank {holds.get(rank, rank)}" for rank in evidence.wrong[:4]]
        yield evidence.explain(
            f"ranks hold each other's parts over {evidence.group_text(axis)}: {', '.join(pairs)}",
            predicted,
        )


def chunks_permuted(evidence: Evidence) -> Iterator[Explanation]:
    """The chunks of a dimension, one or two for each rank of a group, are in another order."""
    shape = evidence.expected[evidence.wrong[0]].shape
    for axis in evidence.groups:
        size = evidence.ranks.sizes[axis]
        for dim, count in ((d, n) for d in range(len(shape)) for n in (size, 2 * size)):
            if shape[dim] % count or shape[dim] < count:
                continue
            order = _best_order(evidence, dim, count)
            if order == list(range(count)) or sorted(order) != list(range(count)):
                continue
            predicted = {
                rank: torch.cat([evidence.expected[rank].chunk(count, dim)[i] for i in order], dim)
                for rank in evidence.wrong
            }
            yield evidence.explain(
                f"the {count} chunks of dimension {dim} of {evidence.name} are in the order"
                f" {order} ({evidence.group_text(axis)})",
                predicted,
            )


def one_chunk(evidence: Evidence) -> Iterator[Explanation]:
    """Only one rank's part of the whole tensor is there and the rest is zero."""
    for axis, groups in evidence.groups.items():
        size = evidence.ranks.sizes[axis]
        if evidence.dim(axis) is not None or not groups:
            continue
        for dim in range(evidence.full.dim()):
            if evidence.full.shape[dim] % size or evidence.full.shape[dim] < size:
                continue
            alone = [_alone(evidence.full, dim, size, index) for index in range(size)]
            coordinates = evidence.ranks.coordinates
            own = {r: evidence.cut(alone[coordinates[r][axis]], r) for r in evidence.wrong}
            part = f"dimension {dim} of {evidence.name}"
            yield evidence.explain(
                f"every rank has only its own part of {part}, the others' are zero: the gather over"
                f" {evidence.group_text(axis)} is missing",
                own,
            )
            for index in range(size):
                same = {rank: evidence.cut(alone[index], rank) for rank in evidence.wrong}
                yield evidence.explain(f"only the part of {axis}={index} of {part} is there", same)


def transposed(evidence: Evidence) -> Iterator[Explanation]:
    """Two dimensions are exchanged, or memory in one order is read in another."""
    dims = evidence.full.dim()
    for one, other in combinations(range(dims), 2):
        dimensions = f"dimensions {one} and {other} of {evidence.name}"
        ways: dict[str, Callable[[Tensor], Tensor]] = {
            f"{dimensions} are exchanged": lambda t: t.transpose(one, other),  # noqa: B023
            f"{dimensions} are exchanged in memory: a transposed buffer is read as if not": (
                lambda t: t.transpose(one, other).reshape(t.shape)  # noqa: B023
            ),
            f"{dimensions} are exchanged in memory: a buffer is read as if transposed": (
                lambda t: _read_transposed(t, one, other)  # noqa: B023
            ),
        }
        for sentence, way in ways.items():
            yield from _everywhere(evidence, sentence, way)


def gathered_along_another_dim(evidence: Evidence) -> Iterator[Explanation]:
    """Chunks of one dimension are joined along the first and read in the full shape, or the
    reverse: what a gather into a flat buffer gives for a dimension other than the first."""
    for axis in evidence.groups:
        size = evidence.ranks.sizes[axis]
        for dim in range(1, evidence.full.dim()):
            if evidence.full.shape[dim] % size:
                continue

            # Both are also asked of a rank's part, whose dimension need not divide.
            def joined(full: Tensor, dim: int = dim, size: int = size) -> Tensor:
                if full.shape[dim] % size:
                    return full.new_empty(0)
                return torch.cat(full.chunk(size, dim), 0).reshape(full.shape)

            def cut(full: Tensor, dim: int = dim, size: int = size) -> Tensor:
                narrow = [*full.shape]
                if narrow[dim] % size:
                    return full.new_empty(0)
                narrow[dim] //= size
                return torch.cat([p.reshape(narrow) for p in full.reshape(-1).chunk(size)], dim)

            part = (
                f"the parts of dimension {dim} of {evidence.name} over {evidence.group_text(axis)}"
            )
            yield from _everywhere(evidence, f"{part} are joined along dimension 0", joined)
            yield from _everywhere(evidence, f"{part} are taken along dimension 0", cut)


def shifted(evidence: Evidence) -> Iterator[Explanation]:
    """Everything is one step further along a dimension; what comes in at its end counts for
    nothing."""
    for dim, length in enumerate(evidence.full.shape):
        if length < 3:
            continue
        for step in (1, -1):
            moved = evidence.full.roll(step, dim)
            moved.narrow(dim, 0 if step == 1 else length - 1, 1).fill_(torch.nan)
            predicted = {}
            for rank in evidence.wrong:
                part = evidence.cut(moved, rank)
                predicted[rank] = torch.where(part.isnan(), evidence.candidate[rank], part)
            yield evidence.explain(
                f"{evidence.name} is shifted by {step:+d} along dimension {dim}", predicted
            )


def _everywhere(
    evidence: Evidence, sentence: str, way: Callable[[Tensor], Tensor]
) -> Iterator[Explanation]:
    """The explanation by which the full tensor was changed, or else every local one."""
    full = way(evidence.full)
    if full.shape == evidence.full.shape:
        yield evidence.explain(sentence, {r: evidence.cut(full, r) for r in evidence.wrong})
    sharded = any(isinstance(p, Shard | ZigzagShard) for p in evidence.placements.values())
    parts = {rank: way(evidence.expected[rank]) for rank in evidence.wrong} if sharded else {}
    if parts and all(part.shape == evidence.expected[rank].shape for rank, part in parts.items()):
        yield evidence.explain(f"{sentence} (within each rank's part)", parts)


def _read_transposed(tensor: Tensor, one: int, other: int) -> Tensor:
    shape = [*tensor.shape]
    shape[one], shape[other] = shape[other], shape[one]
    return tensor.reshape(shape).transpose(one, other)


def _same_way(evidence: Evidence, axis: str, way: Placement) -> bool:
    own = evidence.placements.get(axis)
    if isinstance(own, Shard) and isinstance(way, Shard):
        return own.stride == way.stride
    return type(own) is type(way)


def _distance(evidence: Evidence, rank: int, other: int) -> float:
    """How far a rank's tensor is from what another should have; its own first among equals."""
    return float((evidence.candidate[rank] - evidence.expected[other]).norm())


def _best_order(evidence: Evidence, dim: int, count: int) -> list[int]:
    """For every chunk of the first wrong rank's tensor, the expected chunk that is nearest."""
    rank = evidence.wrong[0]
    found = evidence.candidate[rank].chunk(count, dim)
    expected = evidence.expected[rank].chunk(count, dim)
    return [
        min(range(count), key=lambda j: (float((mine - expected[j]).norm()), j != i))
        for i, mine in enumerate(found)
    ]


def _alone(full: Tensor, dim: int, size: int, index: int) -> Tensor:
    kept = torch.zeros_like(full)
    length = full.shape[dim] // size
    kept.narrow(dim, index * length, length).copy_(full.narrow(dim, index * length, length))
    return kept
