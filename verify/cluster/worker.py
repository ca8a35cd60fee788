"""A worker: one process that runs one rank of one program after another, and says where it is.

The main thread runs programs; a second thread reads the driver's messages, so that the driver can
ask a rank that hangs where it is and cut its connections. A worker ends with its driver: at the end
of the stream, or, if it holds the interpreter lock, with the process that forked it.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from verify.cluster import wire
from verify.cluster.wire import Channel, Closed
from verify.cluster.world import (
    Worlds,
    WorldSpec,
    cut_connections,
    network_connections,
    reset_process_state,
)
from verify.errors import HarnessError
from verify.parent import die_with_parent

_DISTRIBUTED = os.path.dirname(os.path.abspath(dist.__file__)) + os.sep
_LINES = 60


@dataclass(frozen=True)
class Berth:
    """Where a worker belongs: its slot in the pool, the driver's address and the pool's secret."""

    slot: int
    address: tuple[str, int]
    secret: str
    device: int | None
    dump: str


@dataclass(frozen=True)
class Job:
    """Run a program. `path` is the driver's sys.path, by which the program can be imported."""

    world: WorldSpec
    program: str
    args: tuple[Any, ...]
    path: tuple[str, ...]


@dataclass(frozen=True)
class WhereAreYou:
    """Ask for `Whereabouts`."""


@dataclass(frozen=True)
class CutConnections:
    """Make whoever waits for a peer fail now."""


@dataclass(frozen=True)
class Stop:
    """End the process."""


@dataclass(frozen=True)
class Returned:
    """A rank's result. `counts` must agree between ranks for the world to be kept."""

    run: int
    result: Any
    counts: dict[str, int]


@dataclass(frozen=True)
class Raised:
    """A rank's exception, as text."""

    run: int
    kind: str
    message: str
    traceback: str
    communicating: bool


@dataclass(frozen=True)
class Whereabouts:
    """Where the rank's thread is: its stack, whether in torch.distributed, and CPU seconds used."""

    run: int
    stack: str
    communicating: bool
    cpu_seconds: float


def _let_go_of_the_fork_server() -> None:
    """Close the descriptor by which a fork server is kept alive.

    Each forked process holds one, so a worker that hangs would keep the server, and the server the
    worker, after their driver died.
    """
    descriptor = getattr(forkserver._forkserver, "_forkserver_alive_fd", None)
    if descriptor is not None:
        os.close(descriptor)


def _let_go_of_connections() -> None:
    """Put nothing in the place of connections that a fork copied. They are the parent's, and to cut
    them would cut the parent off; their owners' copies here may close the descriptor again."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in network_connections():
        os.dup2(nothing, descriptor)
    os.close(nothing)


def serve(berth: Berth) -> None:
    """The life of a worker: introduce oneself, then run what comes until told to stop."""
    die_with_parent()
    _let_go_of_the_fork_server()
    _let_go_of_connections()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    dump = open(berth.dump, "w")  # noqa: SIM115 - faulthandler needs it as long as the process lives
    faulthandler.enable(dump)
    faulthandler.register(signal.SIGUSR1, dump, all_threads=False)
    torch.set_num_threads(1)
    if berth.device is not None:
        torch.cuda.set_device(berth.device)
        torch.set_default_device(torch.device("cuda", berth.device))
    connection = socket.create_connection(berth.address, timeout=60)
    wire.introduce(connection, berth.secret, berth.slot)
    _Worker(Channel(connection)).run()


class _Worker:
    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.worlds = Worlds(channel.fileno())
        self.run_number = -1
        self._thread = threading.get_ident()
        self._send_lock = threading.Lock()

    def run(self) -> None:
        threading.Thread(target=self._listen, name="shardproof-driver", daemon=True).start()
        while True:
            job = self.jobs.get()
            try:
                self._send(self._perform(job))
            except Closed:
                os._exit(0)

    def _perform(self, job: Job) -> bytes:
        """The encoded answer to a job; a result that does not travel is the rank's failure."""
        self.run_number = job.world.run
        try:
            if list(job.path) != sys.path:
                sys.path[:] = job.path
            reset_process_state()
            try:
                self.worlds.enter(job.world)
                result = wire.resolve(job.program)(*job.args)
            finally:
                counts = self.worlds.leave()
            return wire.encode(Returned(job.world.run, result, counts))
        except BaseException as error:
            return wire.encode(_raised(job.world.run, error))

    def _send(self, frame: bytes) -> None:
        with self._send_lock:
            self.channel.send(frame)

    def _listen(self) -> None:
        try:
            while True:
                self.channel.wait()
                for message in self.channel.receive():
                    self._obey(message)
        except Closed:
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(70)

    def _obey(self, message: Any) -> None:
        if isinstance(message, Job):
            self.jobs.put(message)
        elif isinstance(message, WhereAreYou):
            self._send(wire.encode(self._whereabouts()))
        elif isinstance(message, CutConnections):
            cut_connections(self.channel.fileno())
        elif isinstance(message, Stop):
            os._exit(0)
        else:
            raise HarnessError(f"a worker got {type(message).__name__}")

    def _whereabouts(self) -> Whereabouts:
        frame = sys._current_frames().get(self._thread)
        return Whereabouts(
            self.run_number, program_stack(frame), _communicates(frame), time.process_time()
        )


def program_stack(frame: FrameType | None) -> str:
    """The stack of a program, without the frames of the worker around it."""
    summary = traceback.extract_stack(frame) if frame else []
    return "".join(traceback.format_list(_ours_removed(summary)))


def _ours_removed(summary: Sequence[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    last = max((i for i, f in enumerate(summary) if f.filename == __file__), default=-1)
    return list(summary[last + 1 :]) or list(summary)


def _communicates(frame: FrameType | None) -> bool:
    """Whether the innermost frame is one of torch.distributed's, or of our making of the world."""
    return frame is not None and frame.f_code.co_filename.startswith(_DISTRIBUTED)


def _raised(run: int, error: BaseException) -> Raised:
    summary = traceback.extract_tb(error.__traceback__)
    innermost = summary[-1].filename if summary else ""
    text = traceback.TracebackException.from_exception(error, lookup_lines=False)
    text.stack[:] = _ours_removed(text.stack)
    lines = "".join(text.format()).splitlines()
    if len(lines) > 2 * _LINES:
        lines[_LINES:-_LINES] = [f"  ... {len(lines) - 2 * _LINES} lines left out ..."]
    try:
        message = str(error)
    except Exception as broken:
        message = f"(its message could not be made: {type(broken).__name__})"
    communicating = innermost.startswith(_DISTRIBUTED)
    return Raised(run, type(error).__qualname__, message, "\n".join(lines), communicating)
