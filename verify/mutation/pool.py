"""Worker processes that keep what they imported from one task to the next.

A worker that dies or takes too long is replaced, and its task is `Lost`; the others go on. One
that has needed much memory is replaced too: many threads that allocate leave holes in it that
nothing gives back.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Generic, TypeVar

from verify.errors import BadArgument
from verify.parent import die_with_parent

K = TypeVar("K")
T = TypeVar("T")
_MOST_BYTES = 2**31

# Picklable, called in a worker.
Task = Callable[[], T]


@dataclass(frozen=True)
class Lost:
    """A task without a result, and why in words."""

    reason: str


class Pool:
    """At most `size` workers, begun when there is something to do. A context manager.

    A task takes at most `timeout` seconds, and after one in which a worker had more than `memory`
    bytes at once, another takes its place."""

    def __init__(self, size: int, *, timeout: float, memory: int = _MOST_BYTES) -> None:
        self.size, self.timeout, self.memory = size, timeout, memory
        self._idle: list[_Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._idle:
            worker.end()
        self._idle.clear()

    def run(
        self, tasks: Mapping[K, Task[T]], *, started: Callable[[K], None] = lambda key: None
    ) -> Iterator[tuple[K, T | Lost]]:
        """The result of each task, as they come; `started` is told when one begins."""
        waiting = list(tasks.items())[::-1]
        busy: dict[Connection, _Job[K]] = {}
        try:
            while waiting or busy:
                while waiting and len(busy) < self.size:
                    key, task = waiting.pop()
                    worker = self._given(task)
                    busy[worker.connection] = _Job(worker, key, time.monotonic() + self.timeout)
                    started(key)
                yield from self._finished(busy)
        finally:
            for job in busy.values():
                job.worker.end()

    def _given(self, task: Task[Any]) -> _Worker:
        """A worker that was sent the task: an idle one, unless it died meanwhile, or a new one."""
        while self._idle:
            worker = self._idle.pop()
            try:
                worker.connection.send(task)
            except OSError:
                worker.end()
            else:
                return worker
        worker = _Worker(self.memory)
        # Of one that died already, the task is lost when its result is waited for.
        with suppress(OSError):
            worker.connection.send(task)
        return worker

    def _finished(self, busy: dict[Connection, _Job[K]]) -> Iterator[tuple[K, Any]]:
        """What is ready, after waiting for something to be; takes it off `busy`."""
        first = min(job.deadline for job in busy.values())
        ready = wait(list(busy), timeout=max(first - time.monotonic(), 0.0))
        for connection in list(ready):
            job = busy.pop(connection)  # type: ignore[call-overload]
            try:
                result, spent = job.worker.connection.recv()
            except (EOFError, ConnectionError):
                job.worker.process.join()
                yield job.key, Lost(f"its process ended with code {job.worker.process.exitcode}")
                continue
            if spent:
                job.worker.end()
            else:
                self._idle.append(job.worker)
            yield job.key, result
        late = [each for each, job in busy.items() if job.deadline <= time.monotonic()]
        for connection in late:
            job = busy.pop(connection)
            job.worker.end()
            yield job.key, Lost(f"it did not end within {self.timeout:g} s")


@dataclass(frozen=True)
class _Job(Generic[K]):
    worker: _Worker
    key: K
    deadline: float


class _Worker:
    """A process that does one task at a time, and the connection to it."""

    process: SpawnProcess

    def __init__(self, memory: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, memory), daemon=True)
        self.process.start()
        theirs.close()

    def end(self) -> None:
        """End the process, whatever it does."""
        self.connection.close()
        self.process.kill()
        self.process.join()


def _serve(connection: Connection, memory: int) -> None:
    """Do tasks until the connection ends, or the process that asked; interrupts are for that. With
    each result is told whether the process has had more than `memory` bytes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            result = task()
        except BaseException:
            result = Lost(traceback.format_exc())
        connection.send((result, _most_bytes() > memory))


def _most_bytes() -> int:
    """The most memory that this process had so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # What getrusage says begins with what the parent had.
        lines = status.read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def number_of_workers(given: str | None) -> int:
    """`-n` as a number: one without it, one for each processor with `auto`. Raises BadArgument."""
    if given is None:
        return 1
    if given == "auto":
        return (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
    if not given.isdigit() or int(given) < 1:
        raise BadArgument(f"-n: {given!r} is not a number of workers from 1 up, nor auto")
    return int(given)
