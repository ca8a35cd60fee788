"""What travels between a driver and its workers: plain data and tensors in frames, never a pickle.

A frame is an eight-byte length, a four-byte header length, a JSON header and the buffers of its
tensors, arrays and byte strings, each aligned to 16 bytes. Decoding calls no code of the value's
type: a dataclass is made by setting its fields, and functions, classes and enumerations travel as
`module:qualname` and are imported.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import json
import secrets
import select
import socket
import struct
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType, MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from verify.errors import BadArgument, HarnessError

_LENGTHS = struct.Struct("!QI")
_GREETING = struct.Struct("!32sI")
_ALIGN = 16
_PLAIN = (type(None), bool, int, float, str)
_GROUPS: dict[type, str] = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset"}
_MAKERS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "size": torch.Size,
}  # fmt: skip


def reference(thing: Callable[..., Any]) -> str:
    """`module:qualname` of a function or class that another process can import.

    Raises BadArgument for lambdas, nested functions and instances.
    """
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", "")
    try:
        found = resolve(f"{module}:{name}")
    except (ImportError, AttributeError, BadArgument):
        found = None
    if found is not thing:
        raise BadArgument(
            f"program: {thing!r} cannot be sent to another process; allowed are functions and "
            "classes at the top level of an importable module"
        )
    return f"{module}:{name}"


def resolve(name: str) -> Any:
    """The object that `reference` named."""
    module, _, path = name.partition(":")
    if not module or not path:
        raise BadArgument(f"reference: {name!r} is not module:qualname")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


class _Encoder:
    """Turns values into JSON nodes, collecting buffers on the way."""

    def __init__(self) -> None:
        self.buffers: list[memoryview] = []
        self.size = 0

    def buffer(self, data: memoryview) -> list[int]:
        """Append `data` and say where it will lie: [offset, bytes]."""
        place = [self.size, data.nbytes]
        padding = -data.nbytes % _ALIGN
        self.buffers += [data, memoryview(bytes(padding))]
        self.size += data.nbytes + padding
        return place

    def node(self, value: Any) -> Any:
        """The JSON node of a value. Raises BadArgument for a type that does not travel."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind in _GROUPS:
            return [_GROUPS[kind], [self.node(item) for item in value]]
        if kind is dict or kind is MappingProxyType:
            return ["dict", [[self.node(key), self.node(item)] for key, item in value.items()]]
        if kind is Tensor or kind is Parameter:
            return self._tensor(value)
        if kind is torch.Size:
            return ["size", list(value)]
        if kind in (torch.dtype, torch.device):
            return [kind.__name__, str(value).removeprefix("torch.")]
        if kind in (bytes, bytearray):
            return ["bytes", self.buffer(memoryview(value))]
        if isinstance(value, np.ndarray | np.generic):
            return self._array(value)
        return self._object(value, kind)

    def _tensor(self, value: Tensor) -> Any:
        if value.layout is not torch.strided or value.is_quantized:
            raise BadArgument(
                f"a tensor of layout {value.layout} does not travel; allowed is strided"
            )
        local = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        # A tensor of one element counts as contiguous whatever its strides, and keeps them.
        flat = local.as_strided((local.numel(),), (1,)).view(torch.uint8)
        dtype = str(value.dtype).removeprefix("torch.")
        return ["tensor", dtype, list(value.shape), self.buffer(flat.numpy().data)]

    def _array(self, value: Any) -> Any:
        array = np.ascontiguousarray(value)
        if array.dtype.hasobject:
            raise BadArgument("a numpy array of objects does not travel")
        raw = array.reshape(-1).view(np.uint8).data
        shape = list(np.shape(value))
        return ["array", array.dtype.str, shape, self.buffer(raw), isinstance(value, np.generic)]

    def _object(self, value: Any, kind: type) -> Any:
        if isinstance(value, enum.Enum):
            return ["enum", reference(kind), value.name]
        if isinstance(value, FunctionType | type):
            return ["reference", reference(value)]
        if dataclasses.is_dataclass(value):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return ["dataclass", reference(kind), {k: self.node(v) for k, v in fields.items()}]
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            return ["namedtuple", reference(kind), [self.node(item) for item in value]]
        if isinstance(value, slice | range):
            return [kind.__name__, [value.start, value.stop, value.step]]
        if kind is complex:
            return ["complex", [value.real, value.imag]]
        raise BadArgument(
            f"a {kind.__module__}.{kind.__qualname__} does not travel between processes; allowed "
            "are numbers, strings, bytes, lists, tuples, sets, dictionaries, dataclasses, "
            "enumerations, tensors, arrays, dtypes and top-level functions"
        )


class _Decoder:
    """Turns JSON nodes and their buffers back into values."""

    def __init__(self, data: memoryview) -> None:
        self.data = data

    def node(self, node: Any) -> Any:
        if not isinstance(node, list):
            return node
        kind, body = node[0], node[1]
        if kind in _MAKERS:
            return _MAKERS[kind]([self.node(item) for item in body])
        if kind == "dict":
            return {self.node(key): self.node(item) for key, item in body}
        method = getattr(self, f"_{kind}", None)
        if method is None:
            raise HarnessError(f"a frame holds an unknown node {kind!r}")
        return method(*node[1:])

    def _tensor(self, dtype: str, shape: list[int], place: list[int]) -> Tensor:
        kind = getattr(torch, dtype)
        if not place[1]:
            return torch.empty(shape, dtype=kind)
        part = self.data[place[0] : place[0] + place[1]]
        return torch.frombuffer(part, dtype=kind).reshape(shape)

    def _array(self, dtype: str, shape: list[int], place: list[int], scalar: bool) -> Any:
        part = self.data[place[0] : place[0] + place[1]]
        array = np.frombuffer(part, dtype=np.dtype(dtype)).reshape(shape)
        return array[()] if scalar else array

    def _bytes(self, place: list[int]) -> bytes:
        return bytes(self.data[place[0] : place[0] + place[1]])

    def _dtype(self, name: str) -> torch.dtype:
        return getattr(torch, name)

    def _device(self, name: str) -> torch.device:
        return torch.device(name)

    def _enum(self, name: str, member: str) -> enum.Enum:
        return resolve(name)[member]

    def _reference(self, name: str) -> Any:
        return resolve(name)

    def _dataclass(self, name: str, fields: Mapping[str, Any]) -> Any:
        kind = resolve(name)
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            raise HarnessError(f"a frame calls {name} a dataclass; it is not")
        value = object.__new__(kind)
        for field, node in fields.items():
            object.__setattr__(value, field, self.node(node))
        return value

    def _namedtuple(self, name: str, items: list[Any]) -> Any:
        return tuple.__new__(resolve(name), [self.node(item) for item in items])

    def _slice(self, parts: list[Any]) -> slice:
        return slice(*parts)

    def _range(self, parts: list[int]) -> range:
        return range(*parts)

    def _complex(self, parts: list[float]) -> complex:
        return complex(*parts)


def encode(value: Any) -> bytes:
    """One frame. Tensors come back on the CPU, contiguous, without gradient history."""
    encoder = _Encoder()
    header = json.dumps(encoder.node(value), separators=(",", ":")).encode()
    header += b" " * (-(len(header) + _LENGTHS.size) % _ALIGN)
    lengths = _LENGTHS.pack(len(header) + encoder.size, len(header))
    return b"".join([lengths, header, *encoder.buffers])


def decode(frame: bytearray) -> Any:
    """The value of one whole frame; its tensors share the frame's memory."""
    _, header = _LENGTHS.unpack_from(frame)
    start = _LENGTHS.size + header
    node = json.loads(bytes(frame[_LENGTHS.size : start]))
    return _Decoder(memoryview(frame)[start:]).node(node)


def introduce(connection: socket.socket, secret: str, slot: int) -> None:
    """Say who connects, before anything that is decoded."""
    connection.sendall(_GREETING.pack(secret.encode(), slot))


def admit(connection: socket.socket, secret: str, timeout: float = 10.0) -> int | None:
    """The slot of whoever connected and said the secret; None for anyone else."""
    connection.settimeout(timeout)
    said = bytearray()
    try:
        while len(said) < _GREETING.size and (data := connection.recv(_GREETING.size - len(said))):
            said += data
    except OSError:
        return None
    if len(said) < _GREETING.size:
        return None
    word, slot = _GREETING.unpack(said)
    return slot if secrets.compare_digest(word, secret.encode()) else None


def readable(files: Iterable[int], timeout: float | None) -> list[int]:
    """Which of these descriptors can be read, or have ended, within `timeout` seconds."""
    poll = select.poll()
    for descriptor in files:
        poll.register(descriptor, select.POLLIN)
    return [found for found, _ in poll.poll(None if timeout is None else 1000 * max(timeout, 0.0))]


class Closed(Exception):
    """The other end is gone."""


class Channel:
    """Frames over a connected stream socket. Sending takes at most `timeout` seconds; `receive`
    reads what has come without waiting for the rest of a frame."""

    def __init__(self, sock: socket.socket, timeout: float = 60.0) -> None:
        self.sock = sock
        sock.settimeout(timeout)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pending = bytearray()

    def fileno(self) -> int:
        """The socket's descriptor, for select."""
        return self.sock.fileno()

    def send(self, frame: bytes) -> None:
        """Send one encoded frame. Raises Closed when the other end is gone or does not read."""
        try:
            self.sock.sendall(frame)
        except OSError as error:
            raise Closed(str(error)) from error

    def wait(self, timeout: float | None = None) -> bool:
        """Whether something has come within `timeout` seconds (None: however long it takes)."""
        return bool(readable([self.fileno()], timeout))

    def receive(self) -> list[Any]:
        """The values of the frames that are complete after one read. Call it when readable."""
        try:
            data = self.sock.recv(1 << 20)
        except OSError as error:
            raise Closed(str(error)) from error
        if not data:
            raise Closed("end of stream")
        self._pending += data
        values = []
        while (size := self._next()) is not None:
            frame, self._pending = self._pending[:size], self._pending[size:]
            values.append(decode(frame))
        return values

    def _next(self) -> int | None:
        if len(self._pending) < _LENGTHS.size:
            return None
        size = _LENGTHS.size + _LENGTHS.unpack_from(self._pending)[0]
        return size if len(self._pending) >= size else None

    def close(self) -> None:
        """Close the connection."""
        self.sock.close()
