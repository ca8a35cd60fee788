"""The peers of the sim cluster in its benchmark: other ways to run the ranks of a program."""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import workloads
from torch.testing._internal.distributed import fake_pg, multi_threaded_pg

_c10d: Any = torch._C._distributed_c10d


class Threaded:
    """torch's threaded process group. `persistent` threads keep their group from run to run, and
    use one intra-op thread each; otherwise every run has new threads with torch's own settings, as
    every test of MultiThreadedTestCase has."""

    def __init__(self, size: int, *, persistent: bool) -> None:
        self._size, self._persistent = size, persistent
        self._jobs: list[queue.SimpleQueue[Any]] = []
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        if persistent:
            self._with_world(self._start)

    def run(self, program: Callable[..., Any], *args: Any) -> list[Any]:
        if not self._persistent:
            return self._with_world(lambda: self._once(program, args))
        return self._with_world(lambda: self._send((program, args)))

    def close(self) -> None:
        if self._persistent:
            self._with_world(lambda: self._send(None))
            for thread in self._threads:
                thread.join()

    def _with_world(self, work: Callable[[], Any]) -> Any:
        _c10d._set_thread_isolation_mode(True)
        multi_threaded_pg._install_threaded_pg()
        try:
            return work()
        finally:
            multi_threaded_pg._uninstall_threaded_pg()
            _c10d._set_thread_isolation_mode(False)

    def _once(self, program: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        self._start()
        results = self._send((program, args))
        self._send(None)
        for thread in self._threads:
            thread.join()
        multi_threaded_pg.ProcessLocalGroup.reset()
        return results

    def _start(self) -> None:
        store = dist.HashStore()
        self._jobs = [queue.SimpleQueue() for _ in range(self._size)]
        self._threads = [
            threading.Thread(target=self._serve, args=(rank, store), daemon=True)
            for rank in range(self._size)
        ]
        for thread in self._threads:
            thread.start()
        self._collect()

    def _send(self, job: Any) -> list[Any]:
        for each in self._jobs:
            each.put(job)
        return self._collect()

    def _collect(self) -> list[Any]:
        results = dict(self._results.get() for _ in range(self._size))
        return [results[rank] for rank in range(self._size)]

    def _serve(self, rank: int, store: dist.Store) -> None:
        if self._persistent:
            torch.set_num_threads(1)
        dist.init_process_group("threaded", rank=rank, world_size=self._size, store=store)
        self._results.put((rank, None))
        while (job := self._jobs[rank].get()) is not None:
            program, args = job
            self._results.put((rank, program(*args)))
        dist.destroy_process_group()
        self._results.put((rank, None))


def spawn(program: Callable[..., Any], args: tuple[Any, ...], size: int) -> None:
    """New processes over gloo for one run, as a test that spawns its ranks has."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _spawned, args=(size, Path(folder, "store"), program, args), nprocs=size
        )


def _spawned(
    rank: int, size: int, path: Path, program: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(path), size)
    dist.init_process_group("gloo", rank=rank, world_size=size, store=store)
    program(*args)
    dist.destroy_process_group()


class Local:
    """torch's LocalTensorMode: one thread in which every tensor holds those of all ranks. It fits
    programs that are the same on all ranks but for their tensors."""

    def __init__(self, size: int) -> None:
        from torch.distributed._local_tensor import LocalTensor, LocalTensorMode

        self._size, self._tensor, self._mode = size, LocalTensor, LocalTensorMode

    def train(self, name: str) -> list[float]:
        work = workloads.WORKLOADS[name]
        dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=self._size)
        try:
            inputs = [work.inputs() for _ in range(self._size)]
            per_rank = [work.weights(rank, self._size) for rank in range(self._size)]
            x = self._hold(inputs)
            weights = [self._hold(list(each)) for each in zip(*per_rank, strict=True)]
            with self._mode(frozenset(range(self._size))):
                workloads.parallel(x, work.blocks(weights))
            gradients = x.grad._local_tensors
            return [gradients[rank].square().sum().item() for rank in range(self._size)]
        finally:
            dist.destroy_process_group()

    def _hold(self, tensors: list[torch.Tensor]) -> Any:
        held = self._tensor({rank: each.detach() for rank, each in enumerate(tensors)})
        return held.requires_grad_()
