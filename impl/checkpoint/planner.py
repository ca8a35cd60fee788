"""What torch.distributed.checkpoint is told of `Pieces`: which boxes to write and to read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from impl.checkpoint.pieces import Box, Pieces, overlap


class SavePieces(DefaultSavePlanner):
    """Every rank offers its boxes. Of equal ones one is written, by a rank with little to write;
    the base class refuses boxes that overlap or do not make up the tensor."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)

    def create_local_plan(self) -> SavePlan:
        """This rank's boxes."""
        items = [
            WriteItem(
                index=MetadataIndex(key, offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(offsets), view.shape),
                    properties=TensorProperties(dtype=pieces.dtype),
                    size=torch.Size(pieces.size),
                ),
            )
            for key, pieces in self.state_dict.items()
            if pieces.saved
            for offsets, view in pieces.views.items()
        ]
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The values of a box."""
        return _view(self.state_dict, index)


class LoadPieces(DefaultLoadPlanner):
    """Every rank reads, of what was saved, what lies in its boxes.

    ValueError where a tensor is missing, has another size or dtype, or does not cover a box,
    and where the ranks together leave out a tensor that is not `optional`.
    """

    def __init__(self, *, optional: Iterable[str] = ()) -> None:
        super().__init__()
        self.optional = frozenset(optional)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Keep what the plans are made of."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """What this rank reads."""
        items = [
            item for key, pieces in self.state_dict.items() for item in self._reads(key, pieces)
        ]
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are, if they read everything."""
        assert self.metadata is not None
        read = {item.dest_index.fqn for plan in global_plan for item in plan.items}
        rest = sorted(set(self.metadata.state_dict_metadata) - read - self.optional)
        if rest:
            raise ValueError(
                f"it has {rest[0]}, one of {len(rest)} that this model and optimizer do not have;"
                " build what was saved"
            )
        return global_plan

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Where the values of a box go."""
        return _view(self.state_dict, index)

    def _reads(self, key: str, pieces: Pieces) -> list[ReadItem]:
        if not pieces.views:
            return []
        assert self.metadata is not None
        found = self.metadata.state_dict_metadata.get(key)
        if not isinstance(found, TensorStorageMetadata):
            raise ValueError(
                f"it has no {key}, which this model and optimizer have; build what was saved"
            )
        if (tuple(found.size), found.properties.dtype) != (pieces.size, pieces.dtype):
            raise ValueError(
                f"{key} is {_told(found.size, found.properties.dtype)} in it and"
                f" {_told(pieces.size, pieces.dtype)} here; build what was saved"
            )
        return [
            item
            for offsets, view in pieces.views.items()
            for item in _read(key, Box(offsets, tuple(view.shape)), found)
        ]


def _read(key: str, box: Box, saved: TensorStorageMetadata) -> list[ReadItem]:
    """What makes up a box."""
    found = []
    for number, chunk in enumerate(saved.chunks):
        there = Box(tuple(chunk.offsets), tuple(chunk.sizes))
        if (common := overlap(box, there)) is not None:
            found.append(
                ReadItem(
                    type=LoadItemType.TENSOR,
                    dest_index=MetadataIndex(key, box.offsets),
                    dest_offsets=_from(common, box),
                    storage_index=MetadataIndex(key, chunk.offsets, number),
                    storage_offsets=_from(common, there),
                    lengths=torch.Size(common.sizes),
                )
            )
    if sum(prod(item.lengths) for item in found) != prod(box.sizes):
        raise ValueError(f"{key} is incomplete in it; take another checkpoint")
    return found


def _from(inner: Box, outer: Box) -> torch.Size:
    return torch.Size(a - b for a, b in zip(inner.offsets, outer.offsets, strict=True))


def _view(state: Mapping[str, Pieces], index: MetadataIndex) -> Tensor:
    assert index.offset is not None
    return state[index.fqn].views[tuple(index.offset)]


def _told(size: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{list(size)} {str(dtype).removeprefix('torch.')}"
