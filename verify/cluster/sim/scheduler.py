"""Runs the ranks of one program as threads of which exactly one runs at a time.

A rank gives way only when it has to wait: in a collective, a receive, `Work.wait` or a store. So a
run is deterministic, and a program that is stuck is known to be: no rank is ready. On every
hand-over the state that ranks must have for themselves is taken out and that of the next put in.

After a failure the other ranks go on until they finish, fail or wait; those that wait then are
stopped: `Stopped` is raised where they wait, and again at every further communication.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from verify.cluster.base import Deadlock, RankFailure, RankFailures
from verify.cluster.history import mark
from verify.cluster.sim.clock import acquired
from verify.cluster.sim.isolation import reset_thread_state
from verify.cluster.sim.processor import stay_on
from verify.errors import HarnessError
from verify.target import RankState

_GRACE = 5.0


class Stopped(BaseException):
    """Raised in a rank that has to end because another failed. Not for programs to catch."""


class Wait(Protocol):
    """What a rank waits for."""

    def describe(self) -> str:
        """`waits in all_reduce of float32 [4] over ranks 0, 1 at file.py:3 in f; ...`."""
        ...


Choose = Callable[[deque[int]], int]


def first(ready: deque[int]) -> int:
    """The rank that has been ready for longest."""
    return ready.popleft()


@dataclass
class _Rank:
    """What belongs to one rank of a run."""

    gate: threading.Lock
    state: list[object] | None = None
    wait: Wait | None = None
    done: bool = False
    lost: bool = False


@dataclass
class _Predicate:
    """A wait for a condition that others bring about, looked at whenever they make progress."""

    holds: Callable[[], bool]
    text: str

    def describe(self) -> str:
        return f"waits for {self.text}"


@dataclass
class Run:
    """One run. `states` are kept apart for each rank; `choose` takes the next of the ready ranks;
    all ranks run on `processor`, on any if None.

    `exchange` is where the ranks' communication meets (`verify.cluster.sim.exchange`).
    """

    size: int
    states: Sequence[RankState]
    processor: int | None = None
    choose: Choose = first
    exchange: Any = None
    current: int = -1
    results: list[Any] = field(default_factory=list)
    failures: dict[int, RankFailure] = field(default_factory=dict)
    interrupted: dict[int, RankFailure] = field(default_factory=dict)
    error: RankFailures | None = None
    broken: HarnessError | None = None
    stopping: bool = False
    finished: threading.Lock = field(default_factory=threading.Lock)
    _ranks: list[_Rank] = field(default_factory=list)
    _ready: deque[int] = field(default_factory=deque)
    _threads: list[RankThread] = field(default_factory=list)
    _ending: threading.Lock = field(default_factory=threading.Lock)

    def start(self, threads: Sequence[RankThread], program: Callable[[int], Any]) -> None:
        """Begin; `finished` is released when no rank is left."""
        self.results = [None] * self.size
        self._threads = list(threads)
        self._ranks = [_Rank(thread.gate) for thread in threads]
        self._ready.extend(range(self.size))
        self.finished.acquire()
        for rank, thread in enumerate(threads):
            thread.job = (self, rank, program)
        self.current = self.choose(self._ready)
        self._ranks[self.current].gate.release()

    def block(self, wait: Wait) -> None:
        """Let others run until somebody wakes the running rank. Raises Stopped if it has to end."""
        self.check()
        me = self.current
        mine = self._ranks[me]
        mine.wait = wait
        following = self._next()
        if following is not None and following != me:
            mine.state = self._save()
            self.current = following
            self._ranks[following].gate.release()
            mine.gate.acquire()
            self._load(mine.state)
        mine.wait = mine.state = None
        self.check()

    def wake(self, ranks: Iterable[int]) -> None:
        """What these ranks wait for has come."""
        self._ready.extend(ranks)

    def wait_for(self, holds: Callable[[], bool], text: str) -> None:
        """Block until a condition holds that other ranks bring about."""
        while not holds():
            self.block(_Predicate(holds, text))

    def give_way(self) -> None:
        """Let ranks that are ready run, and go on after them."""
        if self._ready:
            self._ready.append(self.current)
            self.block(_Predicate(lambda: True, "its turn"))

    def progress(self) -> None:
        """Something happened that conditions may depend on."""
        self.wake(
            rank
            for rank, each in enumerate(self._ranks)
            if isinstance(each.wait, _Predicate) and each.wait.holds() and rank not in self._ready
        )

    def check(self) -> None:
        """Raise Stopped where the run has failed and ranks are only to end."""
        if self.stopping:
            raise Stopped

    def abandon(self, error: RankFailures) -> None:
        """End the run with this error; the running rank ends with Stopped."""
        if self.error is None:
            self.error = error
        self.stopping = True
        raise Stopped

    def outcome(self) -> list[Any]:
        """Results by rank, or raise what went wrong: what ranks raised, together with what else did
        not fit. Exceptions that ranks were handling when they were stopped count where no other
        was raised."""
        if self.broken is not None:
            raise self.broken
        raised = self.failures or (self.interrupted if self.error is not None else {})
        if raised:
            others = () if self.error is None else self.error.failures
            found = {each.rank: each for each in others} | raised
            headline = None if self.error is None else self.error.headline
            raise RankFailures([found[rank] for rank in sorted(found)], headline)
        if self.error is not None:
            raise self.error
        return self.results

    def describe(self, rank: int, kind: str = "Unfinished") -> RankFailure:
        """Where a rank is, as its failure."""
        stack = self._threads[rank].stack()
        wait = self._ranks[rank].wait
        return RankFailure(rank, kind, wait.describe() if wait else "was still computing", stack)

    def execute(self, rank: int, program: Callable[[int], Any]) -> None:
        """What the thread of a rank does once its turn comes: the whole program."""
        mine = self._ranks[rank]
        mark("")
        self._load([state.fresh() for state in self.states])
        try:
            if not self.stopping:
                self.results[rank] = program(rank)
        except Stopped as stopped:
            handled = stopped.__context__
            if handled is not None and not isinstance(handled, Stopped):
                self.interrupted[rank] = failure_of(rank, handled)
        except BaseException as error:
            self.failures[rank] = failure_of(rank, error)
        with self._ending:
            if not mine.lost:
                self._end(mine)

    def _end(self, mine: _Rank) -> None:
        """Nothing more comes from the running rank: let another run."""
        mine.done = True
        # What it leaves in the process is not what the next one has.
        self._save()
        following = self._next(ended=True)
        if following is None:
            self.finished.release()
        else:
            self.current = following
            self._ranks[following].gate.release()

    def force(self) -> RankFailures:
        """The run takes too long: end it from outside. What the rank that did not give way was
        doing. A thread that cannot be ended is lost (`is_lost`); the other ranks end without it."""
        rank = self.current
        before, stuck = dict(self.failures), self.describe(rank)
        others = [r for r, each in enumerate(self._ranks) if not each.done and r != rank]
        waiting = "".join(f"; rank {r} {self.describe(r).message}" for r in others[:8])
        self.stopping = True
        self._threads[rank].interrupt()
        again = True
        while not acquired(self.finished, within=_GRACE):
            with self._ending:
                current = self._ranks[self.current]
                if current.done:
                    continue
                if again:
                    # Where Python drops exceptions, as in a callback of its collector, one is lost.
                    again = False
                    self._threads[self.current].interrupt()
                else:
                    current.lost = self._threads[self.current].retired = True
                    self._end(current)
        if self.is_lost(rank):
            text = f"its thread does not answer: {stuck.message}"
            stuck = RankFailure(rank, "Unresponsive", text, stuck.traceback)
        found = before | {rank: stuck}
        headline = f"rank {rank} did not give way in time{waiting}"
        return RankFailures([found[each] for each in sorted(found)], headline)

    def broke(self, error: BaseException) -> None:
        """The cluster itself failed: nobody can say what the ranks would have done."""
        text = "".join(traceback.format_exception(error))
        self.broken = HarnessError(f"the sim cluster broke: {text}")
        self.stopping = True
        for rank, each in enumerate(self._ranks):
            if not each.done:
                each.lost = self._threads[rank].retired = True
        self.finished.release()

    def is_lost(self, rank: int) -> bool:
        """Whether the thread of a rank was given up, and may run beside others."""
        return self._ranks[rank].lost

    def _next(self, ended: bool = False) -> int | None:
        """The rank to run next; the run is stopped first where none is ready but some wait. None
        only where a rank has `ended` and no other is left."""
        if self._ready and not self.stopping:
            return self.choose(self._ready)
        left = [rank for rank, each in enumerate(self._ranks) if not each.done]
        if not left:
            return None
        if not self.stopping:
            if not self.failures:
                self.error = self._deadlock(left)
            self.stopping = True
        return left[0]

    def _deadlock(self, waiting: list[int]) -> Deadlock:
        done = [rank for rank in range(self.size) if rank not in waiting]
        finished = f"{_ranks_text(done)} finished" if done else "no rank finished"
        headline = f"deadlock: no rank can go on; {finished}"
        return Deadlock([self.describe(rank) for rank in waiting], headline)

    def _save(self) -> list[object]:
        return [state.save() for state in self.states]

    def _load(self, values: list[object]) -> None:
        for state, value in zip(self.states, values, strict=True):
            state.load(value)


def failure_of(rank: int, error: BaseException) -> RankFailure:
    """A rank's exception as text, the frames of the cluster itself left out."""
    kind = type(error)
    name = (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )
    try:
        message = str(error)
    except Exception as broken:
        message = f"(its text cannot be made: {type(broken).__name__})"
    try:
        text = "".join(traceback.format_exception(error))
    except Exception as broken:
        text = f"(its traceback cannot be made: {type(broken).__name__})"
    return RankFailure(rank, name, message, text)


class RankThread(threading.Thread):
    """A thread that runs one rank of one run after another. It waits at `gate` in between."""

    def __init__(self, index: int) -> None:
        super().__init__(name=f"shardproof-rank-{index}", daemon=True)
        self.gate = threading.Lock()
        self.gate.acquire()
        self.job: tuple[Run, int, Callable[[int], Any]] | None = None
        self.retired = False
        self._processor: int | None = None
        self.start()

    def run(self) -> None:
        """Run jobs until there is none at the gate, or it is retired."""
        while not self.retired:
            self.gate.acquire()
            if self.job is None:
                return
            run, rank, program = self.job
            self.job = None
            HERE.run = run
            if run.processor is not None and run.processor != self._processor:
                self._processor = run.processor
                stay_on(run.processor)
            reset_thread_state()
            try:
                run.execute(rank, program)
            except BaseException as error:
                run.broke(error)
            finally:
                HERE.run = None
            del run, program

    def stack(self) -> str:
        """Where the thread is, as a traceback."""
        frame = sys._current_frames().get(self.ident or 0)
        return "" if frame is None else "".join(traceback.format_stack(frame))

    def interrupt(self) -> None:
        """Raise Stopped in the thread as soon as it runs Python code."""
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(self.ident or 0), ctypes.py_object(Stopped)
        )

    def end(self) -> None:
        """Let the thread finish; it must be idle."""
        self.gate.release()
        self.join()


class _Here(threading.local):
    """The run that the calling thread is a rank of; None outside."""

    run: Run | None = None


HERE = _Here()


def _ranks_text(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"
