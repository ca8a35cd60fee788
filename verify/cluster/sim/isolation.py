"""State that a process has once and every rank must have for itself.

The scheduler calls `save` when a rank hands over and `load` when it goes on, so both must be cheap.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterable
from operator import itemgetter
from types import ModuleType
from typing import Any

import torch
from torch.distributed import distributed_c10d

_memcmp = ctypes.PyDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return _memcmp(one.data_ptr(), other.data_ptr(), one.nbytes) == 0


def reset_thread_state() -> None:
    """What torch keeps for each thread, as a rank starts: autograd on and on the rank's own thread,
    no autocast, and one thread for each operation, as more would each need a pool."""
    torch.set_grad_enabled(True)
    torch._C._set_multithreading_enabled(False)
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    for device in ("cpu", "cuda"):
        torch.set_autocast_enabled(device, False)


class ModuleGlobals:
    """The named globals of a module. A rank starts with deep copies of what the module holds when
    this object is made; assignments and changes in place are then its own."""

    def __init__(self, module: ModuleType, names: Iterable[str]) -> None:
        self.namespace = vars(module)
        self.names = tuple(names)
        self._get = itemgetter(*self.names)
        self._start = {name: copy.deepcopy(self.namespace[name]) for name in self.names}

    def fresh(self) -> dict[str, Any]:
        return copy.deepcopy(self._start)

    def save(self) -> dict[str, Any]:
        values = self._get(self.namespace)
        return (
            dict(zip(self.names, values, strict=True))
            if len(self.names) > 1
            else {self.names[0]: values}
        )

    def load(self, value: object) -> None:
        self.namespace.update(value)  # type: ignore[call-overload]


class RandomGenerator:
    """A default random generator. A rank starts with seed 0, as a new process would be seeded by
    its program.

    States are thousands of bytes, and most ranks draw nothing between two hand-overs: they share
    one tensor, which is loaded once.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._start = torch.Generator(generator.device).manual_seed(0).get_state()
        self._generator = generator
        self._held: torch.Tensor | None = None

    def fresh(self) -> torch.Tensor:
        return self._start

    def save(self) -> torch.Tensor:
        state = self._generator.get_state()
        if self._held is None or not _same_bytes(state, self._held):
            self._held = state
        return self._held

    def load(self, value: object) -> None:
        if value is not self._held:
            self._generator.set_state(value)  # type: ignore[arg-type]
            self._held = value  # type: ignore[assignment]


class DefaultDtype:
    """The default dtype. A rank starts with float32, as a new process does."""

    def fresh(self) -> torch.dtype:
        return torch.float32

    def save(self) -> torch.dtype:
        return torch.get_default_dtype()

    def load(self, value: object) -> None:
        if value is not torch.get_default_dtype():
            torch.set_default_dtype(value)  # type: ignore[arg-type]


class C10dWorld:
    """torch.distributed's registry of process groups: the globals behind `distributed_c10d._world`
    and the attributes of that one object, which other modules hold by reference."""

    NAMES = (
        "_pg_map",
        "_pg_names",
        "_pg_group_ranks",
        "_pg_backend_config",
        "_group_count",
        "_tags_to_pg",
        "_pg_to_tag",
        "_default_pg_init_method",
    )

    def __init__(self) -> None:
        self._world = distributed_c10d._world
        self._namespace = vars(distributed_c10d)
        self._get = itemgetter(*self.NAMES)

    def fresh(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ({}, {}, {}, {}, 0, {}, {}, None), vars(type(self._world)())

    def save(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self._get(self._namespace), self._world.__dict__

    def load(self, value: object) -> None:
        saved: tuple[tuple[Any, ...], dict[str, Any]] = value  # type: ignore[assignment]
        self._namespace.update(zip(self.NAMES, saved[0], strict=True))
        self._world.__dict__ = saved[1]
