"""The driver of a pool of workers: it hands every rank its job and learns what became of each.

Nothing here waits without a bound. A run ends when every rank has answered; or, after a failure,
when all the others wait for a peer; or when all ranks have waited for each other for `stall`
seconds; or after `timeout` seconds. Ranks that are then still inside have their connections cut,
and are replaced if that does not free them. A failure over nccl replaces every worker of the run,
because an aborted communicator may leave its GPU's streams blocked.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from verify.adversary import NONE, Adversary
from verify.cluster import wire
from verify.cluster.attempt import Attempt
from verify.cluster.base import Cluster, refuse_what_only_sim_has
from verify.cluster.history import History
from verify.cluster.wire import Channel, Closed
from verify.cluster.worker import Job, Stop
from verify.cluster.world import BACKENDS, WorldSpec
from verify.errors import BadArgument, HarnessError

T = TypeVar("T")

_RUNS_PER_STORE = 1000


class Launcher(Protocol):
    """Starts, ends and looks at the processes of workers, on this machine or another."""

    def start(self, slot: int, address: tuple[str, int], secret: str) -> None:
        """Start the worker of a slot; it will connect to `address` and say the secret."""
        ...

    def kill(self, slot: int) -> str:
        """End the worker of a slot if it lives. How it ended: `killed by SIGKILL`."""
        ...

    def fate(self, slot: int) -> tuple[str, str] | None:
        """How the worker of a slot ended and the stack it left if it crashed; None if it lives."""
        ...

    def examine(self, slot: int) -> tuple[str, str]:
        """For a worker that does not answer: its state in words, and its stack where possible."""
        ...

    def check(self) -> None:
        """Raise HarnessError if workers can no longer be started."""
        ...

    def close(self) -> None:
        """End every worker."""
        ...


def listen(host: str, backlog: int) -> socket.socket:
    """A listening socket on the interface that `host` names, or on all where that is not one of
    this machine's own (a name for the node that only others resolve to it)."""
    try:
        return socket.create_server((host, 0), backlog=backlog)
    except OSError:
        return socket.create_server(("", 0), backlog=backlog)


class WorkerPool(Cluster):
    """A cluster made of workers that some launcher starts."""

    name = "pool"

    def __init__(
        self,
        launcher: Launcher,
        *,
        world_size: int,
        backend: str,
        timeout: float,
        stall: float,
        host: str,
        start_timeout: float = 180.0,
    ) -> None:
        if world_size < 1:
            raise BadArgument(f"world_size: {world_size} is below 1")
        if backend not in BACKENDS:
            raise BadArgument(f"backend: {backend!r} is not one of {', '.join(BACKENDS)}")
        for name, seconds in (("timeout", timeout), ("stall", stall)):
            if not seconds > 0:
                raise BadArgument(f"{name}: {seconds} is not a positive number of seconds")
        self.max_world_size = world_size
        self.launcher = launcher
        self.backend, self.timeout, self.stall = backend, timeout, stall
        self._host, self._start_timeout = host, start_timeout
        self._secret = secrets.token_hex(16)
        self._door = listen(host, world_size)
        self._channels: dict[int, Channel] = {}
        self._numbers = itertools.count()
        self._generation = 0
        self._store = self._new_store()
        self._closed = False

    def run(
        self,
        program: Callable[..., T],
        *args: Any,
        world_size: int,
        rank_states: Iterable[object] = (),
        adversary: Adversary = NONE,
        history: History | None = None,
    ) -> list[T]:
        """Run `program(*args)` on every rank of a world; the results by rank, tensors on the CPU.

        `rank_states` says what state of a process each rank must have for itself, which workers
        have by being processes. Raises RankFailures, or Deadlock where ranks waited for each other.
        """
        refuse_what_only_sim_has(self.name, adversary, history)
        if self._closed:
            raise HarnessError(f"the {self.name} cluster is closed")
        if not 1 <= world_size <= self.max_world_size:
            raise BadArgument(
                f"world_size: {world_size} is not between 1 and {self.max_world_size}, the most "
                "this cluster was opened for"
            )
        reference = wire.reference(program)
        self._open(range(world_size))
        number = next(self._numbers)
        if number and number % _RUNS_PER_STORE == 0:
            self._store = self._new_store()
            self._generation += 1
        jobs = [self._job(number, rank, world_size, reference, args) for rank in range(world_size)]
        attempt = Attempt(self, number, world_size)
        try:
            for rank, job in enumerate(jobs):
                self._send(rank, job, attempt)
            results, clean = attempt.finish()
        except BaseException:
            self._generation += 1
            spent = range(world_size) if self.backend == "nccl" else attempt.unanswered()
            for rank in spent:
                self.discard(rank)
            raise
        if not clean:
            self._generation += 1
        return results

    def close(self) -> None:
        """Stop every worker. None is left behind."""
        if self._closed:
            return
        self._closed = True
        for channel in self._channels.values():
            with contextlib.suppress(Closed):
                channel.send(wire.encode(Stop()))
            channel.close()
        self._channels.clear()
        self._door.close()
        self.launcher.close()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def channel(self, slot: int) -> Channel | None:
        """The connection to a worker, None once it is gone."""
        return self._channels.get(slot)

    def discard(self, slot: int) -> str:
        """Kill a worker; the next run that needs its slot starts another."""
        channel = self._channels.pop(slot, None)
        if channel is not None:
            channel.close()
        return self.launcher.kill(slot)

    def _job(self, number: int, rank: int, size: int, program: str, args: tuple[Any, ...]) -> bytes:
        address = (self._host, self._store.port)
        spec = WorldSpec(
            number, rank, size, self._generation, self.backend, address, self.timeout + 30
        )
        return wire.encode(Job(spec, program, args, tuple(sys.path)))

    def _send(self, rank: int, frame: bytes, attempt: Attempt) -> None:
        try:
            self._channels[rank].send(frame)
        except Closed:
            attempt.lost(rank)

    def _new_store(self) -> dist.TCPStore:
        return dist.TCPStore(
            self._host,
            0,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=self.timeout),
        )

    def _open(self, slots: Iterable[int]) -> None:
        """Start the workers that are missing and wait, bounded, until each has said hello."""
        self.launcher.check()
        for slot in list(self._channels):
            self._drop_if_ended(slot)
        missing = {slot for slot in slots if slot not in self._channels}
        for slot in missing:
            self.launcher.kill(slot)
            self.launcher.start(slot, (self._host, self._door.getsockname()[1]), self._secret)
        deadline = time.monotonic() + self._start_timeout
        while missing:
            self.launcher.check()
            for slot in missing:
                if (fate := self.launcher.fate(slot)) is not None:
                    raise HarnessError(f"worker {slot} did not start: it {fate[0]}\n{fate[1]}")
            if time.monotonic() > deadline:
                raise HarnessError(
                    f"workers {sorted(missing)} did not start within {self._start_timeout:.0f} s"
                )
            if wire.readable([self._door.fileno()], 0.2):
                self._admit(missing)

    def _drop_if_ended(self, slot: int) -> None:
        """Forget a worker that ended between two runs (someone may have killed it)."""
        channel = self._channels[slot]
        while channel.wait(0):
            try:
                channel.receive()
            except Closed:
                self._channels.pop(slot).close()
                self._generation += 1
                return

    def _admit(self, missing: set[int]) -> None:
        """Let one worker in; whoever does not say the secret is turned away."""
        connection, _ = self._door.accept()
        slot = wire.admit(connection, self._secret)
        if slot not in missing:
            connection.close()
            return
        self._channels[slot] = Channel(connection)
        missing.discard(slot)
