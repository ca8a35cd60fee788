"""Saves of impl that are interrupted: a run is stopped while it saves, and another one goes on."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from impl.checkpoint.training import Progress, load_checkpoint, save_checkpoint
from impl.groups import Groups
from impl.optimizer.loss_scale import DynamicLossScale
from verify.case import Case
from verify.disk import Disk, Stop
from verify.errors import Mismatch
from verify.oracle.checkpoint import ROUND_TRIP_TRAINED
from verify.oracle.interrupted_save import INTERRUPTED_OPTIONS, STOPS
from verify.target import Subject
from verify.targets.impl.checkpoint import Side, begin, draw, end, sides
from verify.targets.impl.subject import Builder, OperationSubject, Tensors

OPTIONS: Mapping[str, tuple[str, ...]] = {"interrupted_save": INTERRUPTED_OPTIONS}


def interrupted_save(case: Case, groups: Groups) -> Subject:
    """Save after each step and be stopped at that; a run at the other layout goes on."""
    trained = dataclasses.replace(case, options={**case.options, **ROUND_TRIP_TRAINED})
    machine = case.options.get("stopped") == "machine"

    def call(inputs: Tensors) -> Tensors:
        with sides(trained, groups) as (saving, loading, root):
            folder, numbers = root / "runs" / "one", random.Random(case.seed)
            # The first rank looks at the disk for all.
            disk = Disk(root) if dist.get_rank() == 0 else None
            reached = begin(saving, inputs)
            last = reached.steps + STOPS
            with _watched(disk):
                save_checkpoint(folder, saving.training(), reached)
            if disk is not None:
                disk.pass_over()
            then = "nothing was stopped"
            for _ in range(STOPS):
                ahead = _step(saving, reached)
                with _watched(disk), _told(root, then, "saving again"):
                    save_checkpoint(folder, saving.training(), ahead)
                stop = _everywhere(disk.stop(numbers, machine=machine) if disk else None)
                if stop.left_open:
                    raise Mismatch(f"{stop.left_open} is still open after a checkpoint is saved")
                loading.spoil()
                then = stop.text
                with _told(root, then, "loading what was left"):
                    found = load_checkpoint(folder, loading.training())
                _check(found, (ahead,) if stop.ended else (reached, ahead), stop)
                reached, saving, loading = found, loading, saving
            while reached.steps < last:
                reached = _step(saving, reached)
            with _told(root, then, "saving again"):
                save_checkpoint(folder, saving.training(), reached)
            saving.spoil()
            return end(saving, inputs, load_checkpoint(folder, saving.training()))

    return OperationSubject(call)


def _step(side: Side, reached: Progress) -> Progress:
    """Add one to all that a run has, and draw a number of every stream."""
    with torch.no_grad():
        for parameter in side.subject.own.values():
            parameter.add_(1)
        for state in (state for slot in side.optimizer.slots for state in slot.state.values()):
            state.add_(1)
    side.optimizer.updates += 1
    scale = side.optimizer.loss_scale
    assert isinstance(scale, DynamicLossScale)
    for name in ("value", "steps", "overflows"):
        setattr(scale, name, getattr(scale, name) + 1)
    draw(side, 1)
    return Progress(reached.steps + 1, reached.consumed + 1)


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
    except Exception as error:
        # The name of a new folder is another one each time.
        said = f"{type(error).__name__}: {error}".replace(str(root), "")
        raise Mismatch(f"{then}; then, {doing}: {said}") from error


def _check(found: Progress, allowed: tuple[Progress, ...], stop: Stop) -> None:
    """Raise Mismatch for a checkpoint that should not be the newest."""
    if found not in allowed:
        told = " or ".join(str(each.steps) for each in allowed)
        done = "when it had been saved" if stop.ended else "while it was saved"
        raise Mismatch(
            f"{stop.text}; then the checkpoint after step {found.steps} is loaded; it should be"
            f" that after step {told}, as the run was stopped {done}"
        )


BUILDERS: Mapping[str, Builder] = {"interrupted_save": interrupted_save}
