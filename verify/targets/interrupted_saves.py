"""The loop of `interrupted_save`, which adapters have in common: a run is stopped while it saves,
and another one goes on from what is left."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch.distributed as dist

from verify.case import Case
from verify.disk import Disk, Stop
from verify.errors import Mismatch, ShardproofError
from verify.oracle.interrupted_save import STOPS


class Reached(Protocol):
    """How far a run is. What is equal was saved at one moment."""

    @property
    def steps(self) -> int:
        """After how many steps."""


class NothingSaved(Exception):
    """There is no checkpoint, whole or not: to load was refused in these words."""


P = TypeVar("P", bound=Reached)


@dataclass(frozen=True)
class Run(Generic[P]):
    """One of the two runs, whose every call is collective. `begin` puts into it what is given,
    `step` goes on from there by a step of the contract, `save` returns when all is saved, and
    `load` loads the newest checkpoint, or raises NothingSaved. `spoil` makes all that it has what
    no run has."""

    begin: Callable[[], P]
    step: Callable[[P], P]
    save: Callable[[P], object]
    load: Callable[[], P]
    spoil: Callable[[], None]


def interrupted(case: Case, saving: Run[P], loading: Run[P], root: Path, folder: Path) -> P:
    """Let the runs, by turns, save to `folder` below `root` and be stopped at that. What the last
    one has loaded at the end is in `loading`; returned is how far it is."""
    numbers, machine = random.Random(case.seed), case.options.get("stopped") == "machine"
    there = case.seed % 2 == 1
    if there and dist.get_rank() == 0:
        folder.parent.mkdir(parents=True)
    # The first rank looks at the disk for all.
    disk = Disk(root) if dist.get_rank() == 0 else None
    if there:
        # As somebody does who has not flushed its name.
        with _watched(disk):
            if disk is not None:
                folder.mkdir()
    reached: P | None = None
    ahead = saving.begin()
    last = ahead.steps + STOPS
    then = "nothing was stopped"
    for _ in range(STOPS):
        if disk is not None:
            disk.pass_over()
        with _watched(disk), _told(root, then, "saving"):
            saving.save(ahead)
        stop = _everywhere(disk.stop(numbers, machine=machine) if disk else None)
        if stop.left_open:
            raise Mismatch(f"{stop.left_open} is still open after a checkpoint is saved")
        then = stop.text
        loading.spoil()
        # Before the first one was saved there may be nothing.
        refused = NothingSaved if reached is None and not stop.ended else ()
        with _told(root, then, "loading what was left"):
            try:
                found = loading.load()
            except refused:
                ahead = loading.begin()
            else:
                _check(found, reached, ahead, stop)
                reached, ahead = found, loading.step(found)
        saving, loading = loading, saving
    while ahead.steps < last:
        ahead = saving.step(ahead)
    with _watched(disk), _told(root, then, "saving"):
        saving.save(ahead)
    saving.spoil()
    return saving.load()


@contextmanager
def _watched(disk: Disk | None) -> Iterator[None]:
    """Look at what any rank writes while inside. Collective."""
    with nullcontext() if disk is None else disk.watching():
        dist.barrier()
        yield
        dist.barrier()


def _everywhere(stop: Stop | None) -> Stop:
    """What the first rank tells, on every rank."""
    told = [stop]
    dist.broadcast_object_list(told, src=0)
    assert told[0] is not None
    return told[0]


@contextmanager
def _told(root: Path, then: str, doing: str) -> Iterator[None]:
    """Tell of an error what the run had gone through. Raises Mismatch."""
    try:
        yield
    except ShardproofError:
        raise
    except Exception as error:
        # The name of a new folder is another one each time.
        said = f"{type(error).__name__}: {error}".replace(str(root), "ROOT")
        raise Mismatch(f"{then}; then, {doing}: {said}") from error


def _check(found: Reached, before: Reached | None, new: Reached, stop: Stop) -> None:
    """Raise Mismatch for a checkpoint that should not be the newest."""
    allowed = [new] if before is None or stop.ended else [before, new]
    if found not in allowed:
        told = " or ".join(str(each.steps) for each in allowed)
        done = "when it had been saved" if stop.ended else "while it was saved"
        raise Mismatch(
            f"{stop.text}; then the checkpoint after step {found.steps} is loaded; it should be"
            f" that after step {told}, as the run was stopped {done}"
        )


__all__ = ["NothingSaved", "Run", "interrupted"]
