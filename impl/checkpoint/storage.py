"""The files of a checkpoint: safetensors for the boxes, JSON for where they are and for numbers.

torch.distributed.checkpoint's own format is a pickle, and unpickling executes what a file says. So
these are a writer and a reader of its protocol that know no Python object: a file from anywhere can
at worst be refused.

    step-00000200/rank-00000.safetensors    what a rank wrote, each box under KEY@OFFSET,OFFSET
                  metadata.json             {"format", "version", "crc32", "content"}

`content` names the boxes of every tensor with their checksums, so that nothing damaged is loaded;
`crc32` is its own.
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from impl.checkpoint.folder import METADATA, Draft, synchronise

FORMAT, VERSION = "shardproof-checkpoint", 2
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8)
}


class Writer(StorageWriter):
    """Writes the boxes of this rank to a draft; the coordinator then publishes it with `values`,
    which are of JSON types."""

    def __init__(self, draft: Draft, *, rank: int, values: Mapping[str, Any]) -> None:
        self.draft, self.rank, self.values = draft, rank, values

    def reset(self, checkpoint_id: object = None) -> None:
        """Nothing is kept between checkpoints."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The draft is there already."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """One file with all boxes of the plan, on the disk when this returns; none without any."""
        tensors, results = {}, []
        name = f"rank-{self.rank:05d}.safetensors"
        for item in plan.items:
            values = planner.resolve_data(item)
            assert isinstance(values, Tensor)
            # A file has no two tensors of one storage.
            values = values.cpu().clone(memory_format=torch.contiguous_format)
            tensors[_name(item.index)] = values
            results.append(WriteResult(item.index, values.nbytes, (name, _checksum(values))))
        if tensors:
            path = self.draft.folder / name
            safetensors.torch.save_file(tensors, path)
            synchronise(path)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, when every rank has written: the metadata, and out with it."""
        where = {result.index: result.storage_data for each in results for result in each}
        tensors = {}
        for key, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            chunks = [
                [list(c.offsets), list(c.sizes), *where[MetadataIndex(key, c.offsets)]]
                for c in tensor.chunks
            ]
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            tensors[key] = {"dtype": dtype, "size": list(tensor.size), "chunks": chunks}
        content = {"tensors": tensors, "values": dict(self.values)}
        text = _canonical(content)
        document = f'{{"format": "{FORMAT}", "version": {VERSION}, "crc32": {_crc(text)},\n'
        self.draft.publish(f'{document}"content": {text}}}\n')

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Nothing asks: folders are chosen elsewhere."""
        raise NotImplementedError


class Contents:
    """What the metadata of a checkpoint says: `values`, `tensors`, the `places` of their boxes, and
    a `fingerprint` of it all. ValueError where it is not one's."""

    def __init__(self, text: str) -> None:
        content = _content(text)
        try:
            self.values: dict[str, Any] = dict(content["values"])
            self.tensors = {key: _tensor(each) for key, each in content["tensors"].items()}
            self.places = {
                MetadataIndex(key, offsets): (str(file), int(crc))
                for key, each in content["tensors"].items()
                for offsets, _, file, crc in each["chunks"]
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{METADATA} has not the fields of version {VERSION}") from error
        self.fingerprint = _crc(text)
        if any(Path(file).name != file for file, _ in self.places.values()):
            raise ValueError(f"{METADATA} names files outside of its folder")


class Reader(StorageReader):
    """Reads boxes from a folder, each once, and none whose checksum is wrong."""

    def __init__(self, folder: Path, contents: Contents) -> None:
        self.folder, self.contents = folder, contents

    def reset(self, checkpoint_id: object = None) -> None:
        """Nothing is kept between checkpoints."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """All tensors."""
        return Metadata(dict(self.contents.tensors))

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """The contents are known already."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """What the plan names, into the planner's tensors."""
        by_file: dict[str, dict[MetadataIndex, list[ReadItem]]] = defaultdict(dict)
        for item in plan.items:
            file, _ = self.contents.places[item.storage_index]
            by_file[file].setdefault(item.storage_index, []).append(item)
        for file, boxes in by_file.items():
            self._read(file, boxes, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Nothing asks: folders are chosen elsewhere."""
        raise NotImplementedError

    def _read(
        self, file: str, boxes: Mapping[MetadataIndex, list[ReadItem]], planner: LoadPlanner
    ) -> None:
        try:
            with safetensors.safe_open(self.folder / file, framework="pt") as opened:
                for index, items in boxes.items():
                    values = opened.get_tensor(_name(index))
                    if _checksum(values) != self.contents.places[index][1]:
                        raise ValueError(
                            f"{file} is damaged: {index.fqn} is not what was saved; take another"
                            " checkpoint"
                        )
                    for item in items:
                        _copy(values, item, planner)
        except FileNotFoundError as error:
            raise ValueError(f"{file} is missing; take another checkpoint") from error
        except (OSError, safetensors.SafetensorError) as error:
            said = " ".join(str(error).split())
            raise ValueError(
                f"{file} is truncated or damaged ({said}); take another checkpoint"
            ) from error


def _copy(values: Tensor, item: ReadItem, planner: LoadPlanner) -> None:
    """Put what was read where it goes. `LoadPieces` has nothing to commit then."""
    for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        values = values.narrow(dim, offset, length)
    planner.resolve_tensor(item).copy_(values)


def _content(text: str) -> Any:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{METADATA} is no JSON, or truncated") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{METADATA} is not of a {FORMAT}; give one that this program saved")
    if document.get("version") != VERSION:
        raise ValueError(
            f"{METADATA} has version {document.get('version')!r}; this program reads {VERSION}"
        )
    content = document.get("content")
    if _crc(_canonical(content)) != document.get("crc32"):
        raise ValueError(f"{METADATA} is damaged; take another checkpoint")
    return content


def _tensor(data: Mapping[str, Any]) -> TensorStorageMetadata:
    chunks = [
        ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        for offsets, sizes, _, _ in data["chunks"]
    ]
    dtype = _DTYPES[data["dtype"]]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(data["size"]), chunks)


def _name(index: MetadataIndex) -> str:
    assert index.offset is not None
    return f"{index.fqn}@{','.join(map(str, index.offset))}"


def _canonical(content: object) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _crc(text: str) -> int:
    return zlib.crc32(text.encode())


def _checksum(values: Tensor) -> int:
    octets = values.reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(octets.data)
