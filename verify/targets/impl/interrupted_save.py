"""Saves of impl that are interrupted: a run is stopped while it saves, and another one goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from impl.checkpoint.folder import LATEST
from impl.checkpoint.training import CheckpointError, Progress, load_checkpoint, save_checkpoint
from impl.groups import Groups
from impl.optimizer.loss_scale import DynamicLossScale
from verify.case import Case
from verify.oracle.checkpoint import ROUND_TRIP_TRAINED
from verify.oracle.interrupted_save import INTERRUPTED_OPTIONS
from verify.target import Subject
from verify.targets.impl.checkpoint import Side, begin, draw, end, sides
from verify.targets.impl.subject import Builder, OperationSubject, Tensors
from verify.targets.interrupted_saves import NothingSaved, Run, interrupted

OPTIONS: Mapping[str, tuple[str, ...]] = {"interrupted_save": INTERRUPTED_OPTIONS}


def interrupted_save(case: Case, groups: Groups) -> Subject:
    """Save and be stopped at that; a run at the other layout goes on."""
    trained = dataclasses.replace(case, options={**case.options, **ROUND_TRIP_TRAINED})

    def call(inputs: Tensors) -> Tensors:
        with sides(trained, groups) as (before, now, root):
            folder = root / "runs" / "one"
            runs = _run(before, folder, inputs), _run(now, folder, inputs)
            reached = interrupted(case, *runs, root, folder)
            return end(now, inputs, reached)

    return OperationSubject(call)


def _run(side: Side, folder: Path, inputs: Tensors) -> Run[Progress]:
    return Run(
        begin=partial(begin, side, inputs),
        step=partial(_step, side),
        save=lambda reached: save_checkpoint(folder, side.training(), reached),
        load=partial(_load, side, folder),
        spoil=side.spoil,
    )


def _load(side: Side, folder: Path) -> Progress:
    try:
        return load_checkpoint(folder, side.training())
    except CheckpointError as error:
        if (folder / LATEST).exists():
            raise
        raise NothingSaved(str(error)) from error


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


BUILDERS: Mapping[str, Builder] = {"interrupted_save": interrupted_save}
