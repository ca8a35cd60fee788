"""What runs N ranks, whichever way: the interface, and the errors that every cluster raises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from verify.adversary import NONE, Adversary
from verify.cluster.history import History
from verify.errors import BadArgument, ShardproofError

T = TypeVar("T")


@dataclass(frozen=True)
class RankFailure:
    """What one rank raised: its type's name, its message, and its traceback as text."""

    rank: int
    kind: str
    message: str
    traceback: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.kind}: {self.message}"


class RankFailures(ShardproofError):
    """One or more ranks raised. `failures` holds every rank that failed of itself, in rank order;
    ranks that were only stopped because of them are not listed."""

    def __init__(self, failures: Sequence[RankFailure], headline: str | None = None) -> None:
        self.failures = tuple(failures)
        self.headline = headline
        lines = [headline] if headline else []
        lines += [str(failure) for failure in self.failures]
        super().__init__("\n".join(lines))


class Deadlock(RankFailures):
    """No rank can go on. The message says what every rank waits for, and where."""


class CollectiveMismatch(RankFailures):
    """Members of a group issued collectives that do not fit each other."""


class BufferRace(CollectiveMismatch):
    """A rank wrote to what an operation was still reading or writing."""


class Cluster(Protocol):
    """A pool of ranks. Ordinary `torch.distributed` code runs on it and cannot tell which."""

    name: str
    max_world_size: int

    def run(
        self,
        program: Callable[..., T],
        *args: Any,
        world_size: int,
        rank_states: Iterable[object] = (),
        adversary: Adversary = NONE,
        history: History | None = None,
    ) -> list[T]:
        """Run `program(*args)` on every rank with torch.distributed initialised; results by rank.

        `rank_states` (`verify.target.RankState`) is process-global state to keep apart for each
        rank, where ranks share a process. The `sim` cluster alone can have an `adversary` and fill
        a `history`; the others raise BadArgument.
        Raises RankFailures (or Deadlock, CollectiveMismatch) and stays usable.
        """
        ...

    def close(self) -> None:
        """Stop every rank. Nothing is left behind."""
        ...


def refuse_what_only_sim_has(name: str, adversary: Adversary, history: History | None) -> None:
    """Raise BadArgument for an adversary or a history asked of a real cluster."""
    if adversary:
        raise BadArgument(f"adversary: {adversary}: the cluster {name} has none; take sim")
    if history is not None:
        raise BadArgument(f"history: the cluster {name} keeps none; take sim")
