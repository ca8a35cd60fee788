"""The `sim` cluster: all ranks are threads of this process, and exactly one runs at a time."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from verify.adversary import NONE, Adversary
from verify.cluster.base import RankFailures
from verify.cluster.history import History
from verify.cluster.sim.backend import (
    BACKEND,
    SimGroup,
    every_backend_is_simulated,
    register,
)
from verify.cluster.sim.clock import acquired
from verify.cluster.sim.exchange import Exchange
from verify.cluster.sim.isolation import C10dWorld, DefaultDtype, RandomGenerator
from verify.cluster.sim.opponent import Opponent
from verify.cluster.sim.processor import current, share_one_arena, staying_on
from verify.cluster.sim.scheduler import HERE, RankThread, Run
from verify.cluster.sim.store import SimStore
from verify.cluster.world import install_default_group
from verify.errors import BadArgument, HarnessError

T = TypeVar("T")

DEVICES = ("cpu", "cuda")
_ONE_RUN = threading.Lock()


class SimCluster:
    """Rank threads, made on first use and reused for every run of any size up to the maximum.

    `timeout` bounds a run in seconds, which on a busy machine are those that the ranks have of a
    processor (`verify.cluster.sim.clock`); a deadlock needs no timeout. Each rank has its own
    process groups, default dtype, default random generator (seeded with 0) and what `rank_states`
    names; arguments are copied for every rank where they could be changed. The generators of
    Python's `random` and of NumPy are shared.

    With `device` "cuda" all ranks are on one GPU, which is then their current and default device;
    each has a generator of it, and their kernels follow each other in its default stream. Raises
    BadArgument for a timeout that is not positive and a device that is not there.
    """

    name = "sim"

    def __init__(self, world_size: int, *, timeout: float = 300.0, device: str = "cpu") -> None:
        if timeout <= 0:
            raise BadArgument(f"timeout: {timeout} is not positive")
        if device not in DEVICES:
            raise BadArgument(f"device: {device!r} is not one of {', '.join(DEVICES)}")
        if device == "cuda" and not torch.cuda.is_available():
            raise BadArgument("device: cuda needs a GPU, and torch sees none here; take cpu")
        register()
        share_one_arena()
        self.max_world_size, self.timeout, self.device = world_size, timeout, device
        self._threads: list[RankThread] = []
        self._closed = False
        generators = [torch.default_generator]
        if device == "cuda":
            torch.cuda.init()
            generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
        self._own: tuple[Any, ...] = (
            C10dWorld(),
            DefaultDtype(),
            *map(RandomGenerator, generators),
        )

    def run(
        self,
        program: Callable[..., T],
        *args: Any,
        world_size: int,
        rank_states: Iterable[Any] = (),
        adversary: Adversary = NONE,
        history: History | None = None,
    ) -> list[T]:
        """Run `program(*args)` on every rank; results by rank. `history` is filled as far as the
        run came. Raises RankFailures, Deadlock or CollectiveMismatch; BadArgument for a world size
        that the cluster does not have."""
        if not 1 <= world_size <= self.max_world_size:
            raise BadArgument(
                f"world_size: {world_size} is not in 1 to {self.max_world_size}, the size of this"
                " cluster"
            )
        if self._closed:
            raise HarnessError("the cluster is closed")
        if HERE.run is not None:
            raise HarnessError("a rank of a sim cluster cannot itself run a sim cluster")
        with _ONE_RUN:
            processor = current() if self.device == "cpu" else None
            run = Run(world_size, (*self._own, *rank_states), processor)
            opponent = Opponent(adversary, run) if adversary else None
            run.exchange = Exchange(run, opponent, history)
            try:
                return self._run(run, program, args)
            finally:
                # Nothing of a run that succeeds waits for the collector of cycles.
                run.exchange = None

    def close(self) -> None:
        """Stop every rank thread; no run is possible afterwards."""
        self._closed = True
        threads, self._threads = self._threads, []
        for thread in threads:
            thread.end()

    def __enter__(self) -> SimCluster:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, run: Run, program: Callable[..., T], args: tuple[Any, ...]) -> list[T]:
        world_size, states, exchange = run.size, run.states, run.exchange
        store = SimStore(run)

        def whole(rank: int) -> T:
            name = "0"
            group = SimGroup(exchange, name, tuple(range(world_size)), rank)
            install_default_group(
                group,
                name=name,
                size=world_size,
                backend=BACKEND,
                config=f"cpu:{BACKEND},cuda:{BACKEND}",
                store=store,
            )
            try:
                with _default_device(self.device):
                    return program(*_own(args))
            finally:
                if not run.is_lost(rank):
                    distributed_c10d._unregister_all_process_groups()

        while len(self._threads) < world_size:
            self._threads.append(RankThread(len(self._threads)))
        outside = [state.save() for state in states]
        forced = None
        try:
            with every_backend_is_simulated(), staying_on(run.processor):
                run.start(self._threads[:world_size], whole)
                forced = self._await(run)
        finally:
            for state, value in zip(states, outside, strict=True):
                state.load(value)
        if forced is not None:
            raise forced
        results = run.outcome()
        exchange.settle()
        return results

    def _await(self, run: Run) -> RankFailures | None:
        """Wait for the end of a run, and bring it about where it does not come."""
        ended = False
        try:
            ended = acquired(run.finished, within=self.timeout)
            return None if ended else run.force()
        except BaseException:
            if not ended:
                run.force()
            raise
        finally:
            self._threads = [thread for thread in self._threads if not thread.retired]


def _default_device(device: str) -> AbstractContextManager[object]:
    """Make a GPU the default device of the calling thread; the CPU is that already."""
    return nullcontext() if device == "cpu" else torch.device(device)


def _own(value: Any) -> Any:
    """A rank's own copy of an argument: containers, dataclasses, tensors and arrays are copied, the
    rest cannot be changed or is meant to be shared."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(map(_own, value))
    if isinstance(value, list):
        return [_own(each) for each in value]
    if isinstance(value, dict):
        return {key: _own(each) for key, each in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        mine = copy.copy(value)
        for each in dataclasses.fields(value):
            object.__setattr__(mine, each.name, _own(getattr(value, each.name)))
        return mine
    return copy.copy(value) if isinstance(value, set) else value


__all__ = ["SimCluster"]
