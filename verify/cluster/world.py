"""The default process groups of a worker: one for each world size, kept from run to run.

Connecting n processes over gloo costs tens of milliseconds, so a worker keeps the group and gives
every run a fresh view of it: no subgroups, a group counter at zero, and a store of its own. The
driver names a new generation when what is connected must not be used again.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Its functions take the default group at import as a default argument; imported by a rank, that
# would be the group of one rank and one run.
import torch.distributed.nn.functional
from torch.distributed import ProcessGroup, distributed_c10d

BACKENDS = {"gloo": "gloo", "nccl": "cpu:gloo,cuda:nccl"}


@dataclass(frozen=True)
class WorldSpec:
    """The world of one run: rank and size, its store's address, the generation of connections."""

    run: int
    rank: int
    size: int
    generation: int
    backend: str
    store: tuple[str, int]
    timeout: float


@dataclass
class _Kept:
    """A default group and torch.distributed's entries for it."""

    group: ProcessGroup
    backend: str
    config: str
    name: Any


class PointToPoint:
    """Counts this process' sends and receives, so that a driver can tell whether a run left
    messages behind. It wraps the methods of ProcessGroup that every Python path ends in."""

    def __init__(self) -> None:
        self.balance: Counter[str] = Counter()
        for name in ("send", "recv", "recv_anysource"):
            self._wrap(name)

    def _wrap(self, name: str) -> None:
        method, balance = getattr(ProcessGroup, name), self.balance

        def counted(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            balance[name.partition("_")[0]] += 1
            return method(group, *args, **kwargs)

        setattr(ProcessGroup, name, counted)


class Worlds:
    """Enters and leaves the worlds of runs. `driver` is the descriptor of the driver's end."""

    def __init__(self, driver: int) -> None:
        self._driver = driver
        # No rank may be done with a group, and close its connections, while another still opens
        # its own: gloo would fail there, and a right program look wrong.
        os.environ["TORCH_DIST_INIT_BARRIER"] = "1"
        self._kept: dict[int, _Kept] = {}
        self._leftover: list[ProcessGroup] = []
        self._generation = -1
        self._connection: dist.Store | None = None
        self._messages = PointToPoint()

    def enter(self, spec: WorldSpec) -> None:
        """Make `spec`'s world the default one. Connects all its ranks if the generation is new."""
        self._messages.balance.clear()
        if spec.generation != self._generation:
            self._forget()
            self._generation = spec.generation
        kept = self._kept.get(spec.size)
        if kept is None:
            kept = self._connect(spec)
        else:
            self._restore(kept, spec)
        store = dist.PrefixStore(f"run{spec.run}", self._store(spec))
        distributed_c10d._world.pg_map[kept.group] = (kept.backend, store)

    def leave(self) -> dict[str, int]:
        """Take the world away again. How many operations of each kind this rank issued on it, which
        must be equal on all ranks (and sends equal to receives) for it to be used again; and how
        many groups were left, of which there must be none."""
        world = distributed_c10d._world
        group = world.default_pg
        left = [other for other in world.pg_map if other is not group]
        self._leftover += left
        counts = {**self._messages.balance, "groups left": len(left)}
        counts["collectives"] = -1 if group is None else _sequence(group)
        distributed_c10d._update_default_pg(None)
        for registry in (
            world.pg_map,
            world.pg_names,
            world.pg_group_ranks,
            world.pg_backend_config,
            world.pg_to_tag,
            world.tags_to_pg,
            world.pg_coalesce_state,
        ):
            registry.clear()
        world.comms.clear()
        distributed_c10d._unregister_all_process_groups()
        world.group_count = 0
        return counts

    def _forget(self) -> None:
        """Drop every connection. They are cut first, because gloo waits in `shutdown` for what is
        still in flight, which may wait for a peer that never answers."""
        cut_connections(self._driver)
        for group in [*self._leftover, *(kept.group for kept in self._kept.values())]:
            group.shutdown()
        self._leftover.clear()
        self._kept.clear()
        self._connection = None

    def _store(self, spec: WorldSpec) -> dist.Store:
        if self._connection is None:
            self._connection = dist.TCPStore(
                *spec.store, is_master=False, timeout=timedelta(seconds=spec.timeout)
            )
        return self._connection

    def _connect(self, spec: WorldSpec) -> _Kept:
        prefix = f"world{spec.size}.{spec.generation}"
        store = dist.PrefixStore(prefix, self._store(spec))
        hook = sys.excepthook
        dist.init_process_group(
            BACKENDS[spec.backend],
            store=store,
            rank=spec.rank,
            world_size=spec.size,
            timeout=timedelta(seconds=spec.timeout),
        )
        sys.excepthook = hook
        world, group = distributed_c10d._world, distributed_c10d._get_default_group()
        kept = _Kept(
            group,
            world.pg_map[group][0],
            world.pg_backend_config[group],
            world.pg_names[group],
        )
        self._kept[spec.size] = kept
        return kept

    def _restore(self, kept: _Kept, spec: WorldSpec) -> None:
        install_default_group(
            kept.group,
            name=kept.name,
            size=spec.size,
            backend=kept.backend,
            config=kept.config,
            store=None,
        )


def install_default_group(
    group: Any, *, name: Any, size: int, backend: str, config: str, store: dist.Store | None
) -> None:
    """Make `group` the default one of a process that has none: torch.distributed's registries as
    `init_process_group` leaves them."""
    world = distributed_c10d._world
    world.pg_map[group] = (backend, store)  # type: ignore[assignment]
    world.pg_names[group] = name
    world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    world.pg_backend_config[group] = config
    world.pg_to_tag[group] = f"ptd:{name}"
    world.tags_to_pg.update({"": [group], f"ptd:{name}": [group]})
    world.group_count = 1
    distributed_c10d._update_default_pg(group)
    distributed_c10d._register_process_group(group.group_name, group)


def _sequence(group: Any) -> int:
    return group._get_sequence_number_for_group()


def network_connections() -> list[int]:
    """The descriptors of this process that are connected TCP sockets."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                listens = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if connection.family in (socket.AF_INET, socket.AF_INET6) and not listens:
                    found.append(int(name))
        except OSError:
            continue
    return found


def cut_connections(kept: int) -> None:
    """Shut down every network connection of this process but the descriptor `kept`.

    gloo's abort does not wake a thread that waits for a peer; the end of the connection does.
    """
    for descriptor in network_connections():
        if descriptor != kept:
            with (
                contextlib.suppress(OSError),
                socket.socket(fileno=os.dup(descriptor)) as connection,
            ):
                connection.shutdown(socket.SHUT_RDWR)


def reset_process_state() -> None:
    """What a program may leave behind and the next must not see: seed, default dtype, grad mode."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)
