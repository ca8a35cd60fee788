"""One run of a program on a pool of workers: what each rank answered, and who is to blame."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from verify.cluster import wire
from verify.cluster.base import Deadlock, RankFailure, RankFailures
from verify.cluster.wire import Closed
from verify.cluster.worker import CutConnections, Raised, Returned, Whereabouts, WhereAreYou

if TYPE_CHECKING:
    from verify.cluster.pool import WorkerPool

_FIRST_LOOK = 0.5
_LOOK_EVERY = 0.25
_LOOK_EVERY_AFTER_FAILURE = 0.05
_SETTLED = 0.25
_GRACE = 10.0
_RELEASE = 3.0
_LOST_PEER = re.compile(
    "Connection closed by peer|Connection reset|Broken pipe|Socket closed|Connection refused"
    "|remote process exited|Connection was likely closed|Failed to recv, got 0 bytes"
)


@dataclass
class _Sight:
    """Where a rank was last seen, and since when it has been there without computing."""

    stack: str = ""
    communicating: bool = False
    since: float = 0.0
    cpu: float = 0.0
    seen: float = 0.0

    def update(self, now: float, report: Whereabouts) -> None:
        """Take in a new look; the rank has moved if its stack differs or it used its CPU."""
        idle = report.cpu_seconds - self.cpu <= 0.02 + 0.1 * (now - self.since)
        if report.stack != self.stack or not report.communicating or not idle:
            self.since, self.cpu = now, report.cpu_seconds
        self.stack, self.communicating, self.seen = report.stack, report.communicating, now

    def waited(self, now: float) -> float:
        """For how long the rank has stood still inside torch.distributed; 0 if it does not."""
        recent = now - self.seen < 2.0
        return self.seen - self.since if self.communicating and recent else 0.0


class Attempt:
    """Collects the answers of the ranks of one run. `finish` returns or raises, in bounded time."""

    def __init__(self, pool: WorkerPool, number: int, size: int) -> None:
        self.pool, self.number, self.size = pool, number, size
        self._results: dict[int, Any] = {}
        self._counts: dict[int, dict[str, int]] = {}
        self._failed: dict[int, RankFailure] = {}
        self._echoes: dict[int, RankFailure] = {}
        self._sights = {rank: _Sight() for rank in range(size)}
        self._answered = time.monotonic()
        self._cut = False

    def unanswered(self) -> list[int]:
        """The ranks of which nothing final is known."""
        known = {*self._results, *self._failed, *self._echoes}
        return [rank for rank in range(self.size) if rank not in known]

    def lost(self, rank: int) -> None:
        """The rank's process is gone: that is its failure, with what it left to say why."""
        how = self.pool.discard(rank)
        fate = self.pool.launcher.fate(rank)
        stack = fate[1] if fate else ""
        self._answered = time.monotonic()
        self._failed[rank] = RankFailure(rank, "WorkerDied", f"its process {how}", stack)

    def finish(self) -> tuple[list[Any], bool]:
        """The results by rank, and whether the world may be used again.

        Raises RankFailures with every rank that failed of itself, or for ranks that do not finish.
        """
        overdue = self._collect()
        if not overdue and not self._failed and not self._echoes:
            return [self._results[rank] for rank in range(self.size)], self._balanced()
        error = self._hang(overdue) if overdue else None
        self._release()
        raise error or self._blame()

    def _collect(self) -> str | None:
        """Wait until nothing more can come: None, or `stalled` or `overdue`."""
        start = time.monotonic()
        failed_at, look = None, start + _FIRST_LOOK
        while self.unanswered():
            now = time.monotonic()
            if failed_at is None and (self._failed or self._echoes):
                failed_at, look = now, now
            if failed_at is not None and (self._still(_SETTLED) or now - failed_at > _GRACE):
                return None
            if failed_at is None and self._still(self.pool.stall):
                return "stalled"
            if now - start > self.pool.timeout:
                return "overdue"
            if now >= look:
                self._ask()
                look = now + (_LOOK_EVERY if failed_at is None else _LOOK_EVERY_AFTER_FAILURE)
            self._take(min(look, start + self.pool.timeout) - now)
        return None

    def _still(self, seconds: float) -> bool:
        """Whether all ranks without an answer have waited for a peer for so long, and were still
        seen waiting that long after the last answer, which may be what they waited for."""
        now = time.monotonic()
        sights = [self._sights[rank] for rank in self.unanswered()]
        return all(
            sight.waited(now) >= seconds and sight.seen - self._answered >= seconds
            for sight in sights
        )

    def _ask(self) -> None:
        for rank in self.unanswered():
            self._tell(rank, WhereAreYou())

    def _tell(self, rank: int, message: object) -> None:
        channel = self.pool.channel(rank)
        if channel is None:
            return
        try:
            channel.send(wire.encode(message))
        except Closed:
            if rank in self.unanswered():
                self.lost(rank)

    def _take(self, seconds: float) -> None:
        """Take in what comes within so many seconds, or the first part of it."""
        channels = {rank: self.pool.channel(rank) for rank in self.unanswered()}
        by_file = {channel.fileno(): rank for rank, channel in channels.items() if channel}
        self.pool.launcher.check()
        for descriptor in wire.readable(by_file, min(seconds, 0.5)):
            rank = by_file[descriptor]
            try:
                for message in channels[rank].receive():  # type: ignore[union-attr]
                    self._note(rank, message)
            except Closed:
                self.lost(rank)

    def _note(self, rank: int, message: Any) -> None:
        if message.run != self.number:
            return
        if isinstance(message, Whereabouts):
            self._sights[rank].update(time.monotonic(), message)
            return
        self._answered = time.monotonic()
        if isinstance(message, Returned):
            self._results[rank], self._counts[rank] = message.result, message.counts
        elif isinstance(message, Raised):
            failure = RankFailure(rank, message.kind, message.message, message.traceback)
            echo = message.communicating and (self._cut or _LOST_PEER.search(message.message))
            (self._echoes if echo else self._failed)[rank] = failure

    def _describe(self, rank: int) -> RankFailure:
        """A rank that did not finish, by where it was last seen."""
        sight = self._sights[rank]
        if time.monotonic() - sight.seen < 2.0:
            doing = "waits in torch.distributed" if sight.communicating else "was still computing"
            return RankFailure(rank, "Unfinished", f"{doing}: {_place(sight.stack)}", sight.stack)
        state, stack = self.pool.launcher.examine(rank)
        return RankFailure(rank, "Unresponsive", f"its process {state}", stack or sight.stack)

    def _release(self) -> None:
        """Free the ranks that wait for a failed one; replace those that cannot be freed."""
        self._cut = True
        for rank in self.unanswered():
            if not self._sights[rank].waited(time.monotonic()):
                self.pool.discard(rank)
        for rank in range(self.size):
            self._tell(rank, CutConnections())
        until = time.monotonic() + _RELEASE
        while self._reachable() and (left := until - time.monotonic()) > 0:
            self._take(left)
        for rank in self._reachable():
            self.pool.discard(rank)

    def _reachable(self) -> list[int]:
        return [rank for rank in self.unanswered() if self.pool.channel(rank)]

    def _blame(self) -> RankFailures:
        """What ranks raised; lost connections only where nothing else explains them."""
        if self._failed:
            return RankFailures([self._failed[rank] for rank in sorted(self._failed)])
        done = sorted(self._results)
        finished = f"; {_ranks(done)} had already finished" if done else ""
        failures = [self._echoes[rank] for rank in sorted(self._echoes)]
        return RankFailures(failures, f"the connection to a peer was lost{finished}")

    def _hang(self, overdue: str) -> RankFailures:
        """Ranks that did not finish. Those that wait for a rank that is stuck elsewhere are not
        themselves to blame; the headline says where they wait."""
        hung = {rank: self._describe(rank) for rank in self.unanswered()}
        done = sorted(self._results)
        finished = f"{_ranks(done)} finished" if done else "no rank finished"
        if overdue == "stalled":
            waits = f"{_ranks(sorted(hung))} waited for each other for {self.pool.stall:g} s"
            return Deadlock(list(hung.values()), f"{waits} without progress; {finished}")
        late = f"{_ranks(sorted(hung))} did not finish within {self.pool.timeout:g} s; {finished}"
        waiting = [rank for rank in hung if self._sights[rank].waited(time.monotonic())]
        blamed = [failure for rank, failure in hung.items() if rank not in waiting]
        if blamed:
            late += "".join(f"; rank {rank} {hung[rank].message}" for rank in waiting)
        return RankFailures(blamed or list(hung.values()), late)

    def _balanced(self) -> bool:
        """Whether all ranks issued equally much, so that no message of this run is left over."""
        counts = list(self._counts.values())
        collectives = {count["collectives"] for count in counts}
        sends, receives = (sum(count.get(name, 0) for count in counts) for name in ("send", "recv"))
        left = any(count["groups left"] for count in counts)
        return len(collectives) == 1 and -1 not in collectives and sends == receives and not left


def _ranks(ranks: list[int]) -> str:
    word = "rank" if len(ranks) == 1 else "ranks"
    return f"{word} {', '.join(map(str, ranks))}"


def _place(stack: str) -> str:
    """The innermost place of a stack that is not torch's: `file.py:12 in function`."""
    places = re.findall(r'File "(.*?)", line (\d+), in (\S+)', stack)
    own = [place for place in places if "/torch/" not in place[0]] or places
    return "{}:{} in {}".format(*own[-1]) if own else "an unknown place"
