"""The `process` cluster: persistent worker processes on this machine, over gloo or nccl.

Workers are forked by a server that has imported torch once, so replacing one takes milliseconds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from verify.cluster.pool import WorkerPool
from verify.cluster.worker import Berth, serve
from verify.errors import BadArgument

_LOOPBACK = "127.0.0.1"
_PRELOADED = ["torch", "torch.distributed", "numpy", "verify.cluster.worker"]
_STATES = {"T": "is stopped (SIGSTOP)", "t": "is stopped by a debugger", "D": "waits for a device"}


class LocalLauncher:
    """A `Launcher` of workers on this machine; `devices[slot]` is the GPU of a slot, if any.

    `method` is `forkserver`, or `fork` in a process that has one thread and did nothing with torch.
    """

    def __init__(self, devices: Mapping[int, int | None], *, method: str = "forkserver") -> None:
        self._devices = devices
        self._context = multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload(_PRELOADED)
        self._processes: dict[int, BaseProcess] = {}
        self._folder = tempfile.mkdtemp(prefix="shardproof-")
        self._finalizer = weakref.finalize(self, _clean, self._processes, self._folder)

    def start(self, slot: int, address: tuple[str, int], secret: str) -> None:
        """Fork the worker of a slot."""
        dump = self._dump(slot)
        dump.write_text("")
        berth = Berth(slot, address, secret, self._devices[slot], str(dump))
        process = self._context.Process(  # type: ignore[attr-defined]
            target=serve, args=(berth,), name=f"shardproof-{slot}", daemon=True
        )
        process.start()
        self._processes[slot] = process

    def kill(self, slot: int) -> str:
        """End the worker of a slot if it lives; how it ended."""
        process = self._processes.get(slot)
        if process is None:
            return "never started"
        process.join(0.2)
        if process.exitcode is None:
            process.kill()
            process.join(10)
        return _ending(process.exitcode)

    def fate(self, slot: int) -> tuple[str, str] | None:
        """How the worker of a slot ended, and the stack of a crash; None while it lives."""
        process = self._processes.get(slot)
        if process is None or process.exitcode is None:
            return None
        return _ending(process.exitcode), self._dump(slot).read_text()

    def examine(self, slot: int) -> tuple[str, str]:
        """State and stack of a worker that does not answer, by the kernel and by a signal."""
        process = self._processes[slot]
        if process.exitcode is not None:
            return _ending(process.exitcode), self._dump(slot).read_text()
        state = _kernel_state(process.pid)
        if state in _STATES:
            return _STATES[state], ""
        dump = self._dump(slot)
        before = dump.stat().st_size
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid or 0, signal.SIGUSR1)
        until = time.monotonic() + 1.0
        while dump.stat().st_size == before and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.05)
        return "does not answer: it holds the interpreter lock", dump.read_text()[before:]

    def check(self) -> None:
        """Workers can always be started here."""

    def close(self) -> None:
        """End every worker."""
        self._finalizer()

    def _dump(self, slot: int) -> Path:
        return Path(self._folder, f"{slot}.txt")


class ProcessCluster(WorkerPool):
    """Worker processes, started once and reused for every run of any size up to the maximum.

    `timeout` bounds a run in seconds; ranks that wait for each other without any progress for
    `stall` seconds are taken to be deadlocked. With backend `nccl` every rank has a GPU of its own,
    which is its current device, and CPU tensors go over gloo.
    """

    name = "process"

    def __init__(
        self,
        world_size: int,
        *,
        backend: str = "gloo",
        timeout: float = 60.0,
        stall: float = 5.0,
    ) -> None:
        devices: dict[int, int | None] = dict.fromkeys(range(world_size))
        if backend == "nccl":
            present = torch.cuda.device_count()
            if present < world_size:
                raise BadArgument(
                    f"backend: nccl needs one GPU a rank; world_size is {world_size}, "
                    f"this machine has {present} GPUs"
                )
            devices = {rank: rank for rank in range(world_size)}
        super().__init__(
            LocalLauncher(devices),
            world_size=world_size,
            backend=backend,
            timeout=timeout,
            stall=stall,
            host=_LOOPBACK,
        )


def _ending(code: int | None) -> str:
    if code is None:
        return "could not be killed"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _kernel_state(pid: int | None) -> str:
    """The one-letter state of a process in /proc; empty where there is none."""
    if sys.platform != "linux":
        return ""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _clean(processes: dict[int, BaseProcess], folder: str) -> None:
    """End every worker, first by asking, and remove what they wrote."""
    for process in processes.values():
        process.join(0.5)
        if process.exitcode is None:
            process.kill()
    for process in processes.values():
        process.join(10)
    processes.clear()
    shutil.rmtree(folder, ignore_errors=True)
