"""The `torchrun` cluster: ranks in the processes that torchrun or Slurm started, on any nodes.

Rank 0 drives: it alone runs pytest, draws, shrinks and prints. Every other rank serves it. What a
rank does for a program happens in a worker that it forks, as in the `process` cluster; so a program
that dies or hangs costs its worker and not the world. Three kinds of connection are apart: the
store that torchrun or MASTER_ADDR names, used once to meet; one connection from each rank to rank
0, by which workers are started and ended; and the workers' process groups, made and dropped at
will.

A rank that is lost ends the run everywhere: rank 0 raises `WorldLost`, and the others exit non-zero
when rank 0 is gone or says so.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import secrets
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any

from verify.cluster import wire
from verify.cluster.place import Place
from verify.cluster.pool import WorkerPool, listen
from verify.cluster.process import LocalLauncher
from verify.cluster.wire import Channel, Closed
from verify.errors import BadArgument, HarnessError, WorldLost

EXIT_WORLD_LOST = 70
_KEY = "shardproof/driver"
_REPLY_WITHIN = 60.0


@dataclass(frozen=True)
class StartWorker:
    """Rank 0 asks a rank to start its worker."""

    address: tuple[str, int]
    secret: str


@dataclass(frozen=True)
class KillWorker:
    """Rank 0 asks a rank to end its worker; the answer says how it ended."""


@dataclass(frozen=True)
class AskFate:
    """Rank 0 asks whether a worker has ended, and how."""


@dataclass(frozen=True)
class ExamineWorker:
    """Rank 0 asks about a worker that does not answer."""


@dataclass(frozen=True)
class Leave:
    """Rank 0 ends the run; `reason` is empty where nothing went wrong with the world, and then all
    ranks exit with `code`."""

    reason: str
    code: int


@dataclass(frozen=True)
class Joined:
    """A rank's first message: on which host it is and with which GPU."""

    host: str
    device: int | None


def serve(place: Place, *, join_timeout: float = 300.0) -> int:
    """What every rank but 0 does: start and end its worker as rank 0 says. The exit code.

    An interrupt from the keyboard is for rank 0, which ends the others in order.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    store = place.store(join_timeout)
    try:
        meeting = json.loads(store.get(_KEY))
    except RuntimeError as error:
        return _lost(place, f"rank 0 did not open the cluster within {join_timeout:.0f} s: {error}")
    host, port = meeting["address"]
    try:
        connection = socket.create_connection((host, port), timeout=join_timeout)
        wire.introduce(connection, meeting["secret"], place.rank)
    except OSError as error:
        return _lost(place, f"rank 0 cannot be reached at {host}:{port}: {error}")
    channel = Channel(connection)
    keep_alive(connection)
    device = place.device()
    launcher = LocalLauncher({place.rank: device}, method="fork")
    try:
        channel.send(wire.encode(Joined(socket.gethostname(), device)))
        while True:
            channel.wait()
            for message in channel.receive():
                if isinstance(message, Leave):
                    return _lost(place, message.reason) if message.reason else message.code
                channel.send(wire.encode(_obey(launcher, place.rank, message)))
    except Closed:
        return _lost(place, "rank 0 is gone")
    finally:
        launcher.close()


def _obey(launcher: LocalLauncher, rank: int, message: Any) -> Any:
    if isinstance(message, StartWorker):
        return launcher.start(rank, message.address, message.secret)
    if isinstance(message, KillWorker):
        return launcher.kill(rank)
    if isinstance(message, AskFate):
        return launcher.fate(rank)
    if isinstance(message, ExamineWorker):
        return launcher.examine(rank)
    raise HarnessError(f"a rank that serves got {type(message).__name__}")


def _lost(place: Place, reason: str) -> int:
    print(f"shardproof: rank {place.rank} ends: {reason}", file=sys.stderr, flush=True)
    return EXIT_WORLD_LOST


def keep_alive(connection: socket.socket) -> None:
    """Have the kernel notice within half a minute that the other end's machine is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Command:
    """Rank 0's connections to the ranks that serve; one for the life of the process."""

    def __init__(self, place: Place, join_timeout: float) -> None:
        self.place = place
        self.devices: dict[int, int | None] = {0: place.device()}
        self._hosts: dict[int, str] = {}
        self._channels: dict[int, Channel] = {}
        self._lost = ""
        self._store = place.store(join_timeout)
        self._gather(join_timeout)
        atexit.register(self.leave)

    def call(self, rank: int, message: object) -> Any:
        """Have a rank do something and return its answer, within a bound."""
        self.check()
        channel = self._channels[rank]
        try:
            channel.send(wire.encode(message))
            if channel.wait(_REPLY_WITHIN):
                (answer,) = channel.receive()
                return answer
        except Closed:
            self._lose(rank)
        return self._lose(rank, f"has not answered for {_REPLY_WITHIN:.0f} s")

    def check(self) -> None:
        """Raise WorldLost if a rank is gone."""
        if self._lost:
            raise WorldLost(self._lost)
        by_file = {channel.fileno(): rank for rank, channel in self._channels.items()}
        for descriptor in wire.readable(by_file, 0):
            self._lose(by_file[descriptor])

    def leave(self, code: int = 0) -> int:
        """End the ranks that serve, with this exit code or, where the world was lost, with
        EXIT_WORLD_LOST; the code with which they end."""
        for channel in self._channels.values():
            with contextlib.suppress(Closed):
                channel.send(wire.encode(Leave(self._lost, code)))
            channel.close()
        self._channels.clear()
        return EXIT_WORLD_LOST if self._lost else code

    def _lose(self, rank: int, how: str = "is gone: its process ended or its node is lost") -> None:
        self._lost = f"rank {rank} on {self._hosts.get(rank, 'an unknown host')} {how}"
        raise WorldLost(self._lost)

    def _gather(self, timeout: float) -> None:
        secret, door = secrets.token_hex(16), listen(self.place.master, self.place.world_size)
        address = (self.place.master, door.getsockname()[1])
        self._store.set(_KEY, json.dumps({"address": address, "secret": secret}))
        deadline, missing = time.monotonic() + timeout, set(range(1, self.place.world_size))
        while missing:
            if not wire.readable([door.fileno()], deadline - time.monotonic()):
                ranks = ", ".join(map(str, sorted(missing)))
                raise HarnessError(f"ranks {ranks} did not join within {timeout:.0f} s")
            connection, _ = door.accept()
            rank = wire.admit(connection, secret)
            if rank not in missing:
                connection.close()
                continue
            keep_alive(connection)
            self._channels[rank] = Channel(connection)
            if not self._channels[rank].wait(30):
                self._lose(rank, "has not said where it is")
            (joined,) = self._channels[rank].receive()
            self._hosts[rank], self.devices[rank] = joined.host, joined.device
            missing.discard(rank)
        door.close()


class _Command:
    """The process' only `Command`: torchrun starts one world, whatever is opened on it."""

    held: Command | None = None


def join(*, join_timeout: float = 300.0) -> Command:
    """Take this process' part in the world that torchrun or Slurm started.

    Returns on rank 0, once all ranks have joined. On every other rank it serves until rank 0 ends,
    and then ends the process. Call it before anything that only rank 0 should do.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise HarnessError(
            "a worker ran the main module again and came to open a cluster; put what the main "
            'module does under `if __name__ == "__main__":`'
        )
    if _Command.held is None:
        place = Place.from_environment()
        if place.rank:
            try:
                code = serve(place, join_timeout=join_timeout)
            except HarnessError as error:
                code = _lost(place, str(error))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _Command.held = Command(place, join_timeout)
    return _Command.held


class WorldLauncher:
    """Starts workers in the ranks of the world: rank 0's own here, the others' by their ranks."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self._own = LocalLauncher(command.devices)

    def start(self, slot: int, address: tuple[str, int], secret: str) -> None:
        """Start a rank's worker."""
        if slot:
            self._command.call(slot, StartWorker(address, secret))
        else:
            self._own.start(0, address, secret)

    def kill(self, slot: int) -> str:
        """End a rank's worker if it lives; how it ended."""
        return self._command.call(slot, KillWorker()) if slot else self._own.kill(0)

    def fate(self, slot: int) -> tuple[str, str] | None:
        """How a rank's worker ended, and the stack of a crash; None while it lives."""
        return self._command.call(slot, AskFate()) if slot else self._own.fate(0)

    def examine(self, slot: int) -> tuple[str, str]:
        """State and stack of a worker that does not answer."""
        return self._command.call(slot, ExamineWorker()) if slot else self._own.examine(0)

    def check(self) -> None:
        """Raise WorldLost if a rank is gone."""
        self._command.check()

    def close(self) -> None:
        """End every worker. The ranks stay until rank 0's process ends."""
        self._own.close()
        for rank in range(1, self._command.place.world_size):
            with contextlib.suppress(WorldLost):
                self._command.call(rank, KillWorker())


class TorchrunCluster(WorkerPool):
    """The world that torchrun or Slurm started, seen from rank 0; other ranks never get past it.

    Without a `backend`, nccl where every rank has a GPU and gloo elsewhere. `timeout` and `stall`
    are as for the `process` cluster; all ranks must join within `join_timeout` seconds.
    """

    name = "torchrun"

    def __init__(
        self,
        world_size: int,
        *,
        backend: str | None = None,
        timeout: float = 120.0,
        stall: float = 10.0,
        join_timeout: float = 300.0,
    ) -> None:
        command = join(join_timeout=join_timeout)
        started = command.place.world_size
        if world_size > started:
            raise BadArgument(
                f"world_size: {world_size} is more than the {started} ranks that were started"
            )
        without = sorted(rank for rank, device in command.devices.items() if device is None)
        if backend == "nccl" and without:
            raise BadArgument(
                "backend: nccl needs one GPU a rank; without one are ranks "
                + ", ".join(map(str, without))
            )
        super().__init__(
            WorldLauncher(command),
            world_size=world_size,
            backend=backend or ("gloo" if without else "nccl"),
            timeout=timeout,
            stall=stall,
            host=command.place.master,
        )
