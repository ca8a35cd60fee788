"""Which tokens of a sequence each rank of a context-parallel group holds.

A sequence is cut into equal chunks. `contiguous`: n chunks for n ranks, one each. `zigzag`: 2n
chunks, of which rank i holds i and 2n-1-i, an early and a late one, so that under a causal mask all
ranks have equally much to attend to (the load balancing of Megatron-LM and of Brandon et al.,
arXiv:2311.09431). Packed sequences are cut one by one, so that each lies on all ranks; each ends in
padding where its length would not divide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Placement = Literal["contiguous", "zigzag"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)


@dataclass(frozen=True)
class PackedSequences:
    """Sequences one after another along one dimension, alike in every row of a batch.

    `lengths` counts the tokens of each, `padded_lengths` the places that it takes; the tokens come
    first. Raises ValueError for lengths that do not fit.
    """

    lengths: tuple[int, ...]
    padded_lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.padded_lengths) or not self.lengths:
            raise ValueError(
                f"cu_seqlens: {len(self.lengths)} sequences, cu_seqlens_padded:"
                f" {len(self.padded_lengths)}; give both for the same sequences, at least one"
            )
        for length, padded in zip(self.lengths, self.padded_lengths, strict=True):
            if not 0 <= length <= padded:
                raise ValueError(
                    f"cu_seqlens: a sequence of {length} tokens in {padded} places of"
                    " cu_seqlens_padded; give 0 to as many tokens as there are places"
                )

    @staticmethod
    def from_cumulative(
        cu_seqlens: Tensor, cu_seqlens_padded: Tensor | None = None
    ) -> PackedSequences:
        """Of cumulative lengths [sequences + 1], int, from 0 on; without padding if not given.

        They are those of the whole sequences, not of a rank's parts. Copies them to the CPU.
        """
        padded = cu_seqlens if cu_seqlens_padded is None else cu_seqlens_padded
        return PackedSequences(
            _differences("cu_seqlens", cu_seqlens), _differences("cu_seqlens_padded", padded)
        )

    @property
    def total(self) -> int:
        """The places of all sequences."""
        return sum(self.padded_lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first place of each, in all of them together."""
        return tuple(accumulate((0, *self.padded_lengths[:-1])))


def _differences(name: str, cumulative: Tensor) -> tuple[int, ...]:
    found = cumulative.tolist()
    if cumulative.dim() != 1 or cumulative.is_floating_point() or not found or found[0] != 0:
        raise ValueError(f"{name}: {found} are not cumulative lengths; give integers from 0 on")
    return tuple(after - before for before, after in pairwise(found))


@dataclass(frozen=True)
class Chunk:
    """`length` consecutive places of one sequence, of which the first `tokens` hold tokens.

    `start` is where it lies in the tensor that holds it, `position` where in its sequence.
    """

    sequence: int
    position: int
    start: int
    length: int
    tokens: int

    @property
    def rows(self) -> slice:
        """Its tokens in the tensor that holds it."""
        return slice(self.start, self.start + self.tokens)


Chunks = tuple[Chunk, ...]


def chunks_by_rank(
    sequences: PackedSequences, *, size: int, placement: Placement
) -> tuple[Chunks, ...]:
    """The chunks that each of `size` ranks holds, in the order in which they lie in memory.

    ValueError for a length that does not divide by the number of chunks.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement: {placement!r} is not one of {', '.join(PLACEMENTS)}")
    pieces = size if placement == "contiguous" else 2 * size
    for padded in sequences.padded_lengths:
        if padded % pieces:
            raise ValueError(
                f"sequence: {padded} does not divide into the {pieces} chunks of {placement}"
                f" placement on {size} ranks; pad it to a multiple of {pieces}"
            )
    return tuple(
        side_by_side(
            [
                _chunk(sequences, sequence, index, pieces)
                for sequence in range(len(sequences.lengths))
                for index in ((rank,) if pieces == size else (rank, pieces - 1 - rank))
            ]
        )
        for rank in range(size)
    )


def chunks_of(
    length: int, *, size: int, placement: Placement, packed: PackedSequences | None
) -> tuple[Chunks, ...]:
    """`chunks_by_rank` of one sequence of so many places, or of the `packed` ones that fill them.

    ValueError where these end elsewhere, and as `chunks_by_rank`.
    """
    sequences = packed or PackedSequences((length,), (length,))
    if sequences.total != length:
        raise ValueError(
            f"cu_seqlens_padded: ends at {sequences.total}, the sequence is {length} long on"
            f" {size} ranks"
        )
    return chunks_by_rank(sequences, size=size, placement=placement)


def side_by_side(chunks: Sequence[Chunk]) -> Chunks:
    """The same chunks in one tensor, one after the other; those without a place left out."""
    found, start = [], 0
    for chunk in chunks:
        if chunk.length:
            found.append(replace(chunk, start=start))
            start += chunk.length
    return tuple(found)


def _chunk(sequences: PackedSequences, sequence: int, index: int, pieces: int) -> Chunk:
    length = sequences.padded_lengths[sequence] // pieces
    position = index * length
    tokens = min(max(sequences.lengths[sequence] - position, 0), length)
    return Chunk(sequence, position, 0, length, tokens)


def positions(
    length: int,
    *,
    group: ProcessGroup,
    placement: Placement,
    packed: PackedSequences | None = None,
) -> Tensor:
    """The position of each of this rank's places in its sequence, int64 [length / cp].

    `length` is that of the whole sequence, or of all packed ones. What is computed from positions
    (rotary embedding, learned positions) is computed from these. No collective.
    """
    chunks = _own_chunks(length, group=group, placement=placement, packed=packed)
    parts = [torch.arange(c.position, c.position + c.length) for c in chunks]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def split_sequence(
    x: Tensor,
    *,
    group: ProcessGroup,
    placement: Placement,
    packed: PackedSequences | None = None,
) -> Tensor:
    """This rank's chunks of `x` [sequence, ...], which every rank of the group holds in full.

    No collective. The gradient of `x` is zero outside the chunks: Partial over the group.
    """
    whole = packed or PackedSequences((x.shape[0],), (x.shape[0],))
    chunks = _own_chunks(x.shape[0], group=group, placement=placement, packed=packed)
    return torch.cat([x.narrow(0, whole.starts[c.sequence] + c.position, c.length) for c in chunks])


def _own_chunks(
    length: int, *, group: ProcessGroup, placement: Placement, packed: PackedSequences | None
) -> Chunks:
    by_rank = chunks_of(length, size=dist.get_world_size(group), placement=placement, packed=packed)
    return by_rank[dist.get_rank(group)]
