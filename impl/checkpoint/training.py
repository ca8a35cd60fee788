"""Saving all of a training run, and going on with it at another layout.

What is saved belongs to the model, not to ranks: tensors are known by their names in the whole
model (a layer by its number there, whichever stage and chunk has it; experts stacked) and by
offsets in the full tensor. Whoever loads takes what lies in its own pieces.

| key | is |
|---|---|
| `model.NAME` | a parameter, without rows of padding |
| `optimizer.main.NAME` | its main values, where the model has rounded copies of them |
| `optimizer.STATE.NAME` | what the update rule keeps: exp_avg, exp_avg_sq, momentum |
| `random.STREAM` | the state of a stream, a row for each rank |

and, as numbers, the steps, the samples that were consumed, the updates that the schedule and Adam
count, the loss scale, the schedule and the layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn import Parameter

from impl.checkpoint.folder import METADATA, Draft, begin_draft, find
from impl.checkpoint.pieces import Pieces, pieces_of, row_of_many
from impl.checkpoint.planner import LoadPieces, SavePieces
from impl.checkpoint.storage import Contents, Reader, Writer
from impl.checkpoint.streams import reseeded, row_of
from impl.groups import Groups
from impl.optimizer.loss_scale import LossScale
from impl.optimizer.mixed import Optimizer
from impl.random import RandomTracker
from verify.layout import Layout

T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint that is damaged, foreign, or of something else, or that cannot be written. The
    message is one line for who named it."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a rank has of a training run.

    `parameters` are its own, trained or not, by their names in the whole model. `rows` says how
    many rows of a parameter, of dimension 0, are no padding. `copies` names the parameters that are
    another's copy on another stage, such as a tied embedding, and the other. `order` says what the
    order of samples depends on: without it a number of consumed ones means nothing. `model` are its
    choices that no shape of a parameter tells.
    """

    parameters: Mapping[str, Parameter]
    optimizer: Optimizer
    tracker: RandomTracker
    groups: Groups
    rows: Mapping[str, int] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    order: Mapping[str, int | str] = field(default_factory=dict)
    model: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """How far a run is: `steps`, also those that were skipped, and the samples they `consumed`."""

    steps: int
    consumed: int


def save_checkpoint(folder: Path, training: Training, progress: Progress) -> Path:
    """Save everything, and make it the newest checkpoint of `folder`. Collective over the world.

    Each box of a tensor is written by one rank that has it. Until all of it is on the disk,
    `folder` is as it was before, also where a rank or the whole run dies. CheckpointError, on every
    rank, where it cannot be written.
    """
    training.optimizer.data_parallel.finish_parameters()
    name = _on_first_rank(lambda: begin_draft(folder, step=progress.steps).name, folder)
    draft = Draft(folder, name)
    states = training.tracker.states()
    row, rows = dist.get_rank(), dist.get_world_size()
    pieces = _pieces(training) | {
        f"random.{name}": row_of_many(state, row=row, rows=rows) for name, state in states.items()
    }
    writer = Writer(draft, rank=row, values=_values(training, progress))
    try:
        dcp.save(pieces, storage_writer=writer, planner=SavePieces())
    except CheckpointException as error:
        raise _first(error, folder, "cannot be saved to") from error
    return draft.published


def load_checkpoint(
    folder: Path, training: Training, *, override_schedule: bool = False
) -> Progress:
    """Load the checkpoint that `folder` is, or the newest in it. Collective over the world.

    The model, the optimizer and the layout are made before, and may be of other sizes than when it
    was saved in tp, cp, dp, pp, vpp, ep and etp. A stream of random numbers goes on where it was,
    if the sizes of the axes that it differs over are the same; otherwise it is seeded anew, from
    the checkpoint, so that no numbers come again. The schedule of learning rates has to be the one
    that was saved, unless `override_schedule` keeps the present one, from the saved update on.

    CheckpointError, on every rank, for one that is damaged or foreign, and for another model,
    optimizer or schedule; what was loaded till then stays loaded.
    """
    found, text = _on_first_rank(lambda: _read(folder), folder)
    path = Path(found)
    try:
        contents = Contents(text)
        _check_values(contents.values, training, override_schedule=override_schedule)
        progress = _progress(contents.values)
        saved = Layout.from_json(contents.values["layout"])
    except ValueError as error:
        raise CheckpointError(f"checkpoint: {path}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint: {path}: {METADATA} is not a training run's") from error
    training.optimizer.data_parallel.finish_parameters()
    states = _random_states(contents, training, saved, progress)
    pieces = _pieces(training) | {f"random.{name}": each for name, (_, each) in states.items()}
    optional = [key for key in contents.tensors if key.startswith("random.")]
    try:
        planner = LoadPieces(optional=optional)
        dcp.load(pieces, storage_reader=Reader(path, contents), planner=planner)
    except CheckpointException as error:
        raise _first(error, path, "cannot be loaded from") from error
    training.tracker.set_states({name: state for name, (state, _) in states.items()})
    _put_back(contents.values, training.optimizer)
    return progress


def _pieces(training: Training) -> dict[str, Pieces]:
    """Everything but random numbers, by key."""
    found: dict[str, Pieces] = {}
    names = {id(parameter): name for name, parameter in training.parameters.items()}

    def add(key: str, parameter: Parameter, **what: Any) -> None:
        name = names[id(parameter)]
        original, rows = training.copies.get(name), training.rows.get(name)
        piece = pieces_of(
            parameter, groups=training.groups, rows=rows, saved=original is None, **what
        )
        found[f"{key}.{original or name}"] = piece

    for parameter in training.parameters.values():
        add("model", parameter)
    for slot in training.optimizer.slots:
        share = slot.share
        kept = dict(slot.state)
        if slot.main is not share.values:
            kept["main"] = slot.main
        for name, values in kept.items():
            add(f"optimizer.{name}", share.parameter, values=values, start=share.start)
    return found


def _random_states(
    contents: Contents, training: Training, saved: Layout, progress: Progress
) -> dict[str, tuple[Tensor, Pieces]]:
    """For each stream of this rank the state to go on from, and where it is read into."""
    found, rank, layout = {}, dist.get_rank(), training.groups.layout
    fresh = reseeded(
        training.tracker, contents.fingerprint, step=progress.steps, layout=layout, rank=rank
    )
    for name, state in training.tracker.states().items():
        there = contents.tensors.get(f"random.{name}")
        row = row_of(name, saved=saved, layout=layout, rank=rank)
        if there is None or row is None or there.size[1:] != state.shape:
            found[name] = fresh[name], Pieces((), state.dtype, {})
        else:
            found[name] = state, row_of_many(state, row=row, rows=there.size[0])
    return found


def _values(training: Training, progress: Progress) -> dict[str, Any]:
    optimizer = training.optimizer
    return {
        "steps": progress.steps,
        "consumed": progress.consumed,
        "order": dict(training.order),
        "model": dict(training.model),
        "updates": optimizer.updates,
        "schedule": dataclasses.asdict(optimizer.schedule),
        "loss_scale": _moving(optimizer.loss_scale),
        "layout": training.groups.layout.to_json(),
    }


def _moving(scale: LossScale | None) -> dict[str, float] | None:
    """What changes of a loss scale as training goes on."""
    if scale is None:
        return None
    return {n: getattr(scale, n) for n in ("value", "steps", "overflows") if hasattr(scale, n)}


def _check_values(
    values: Mapping[str, Any], training: Training, *, override_schedule: bool
) -> None:
    optimizer = training.optimizer
    for name in sorted({*values["order"], *training.order}):
        if values["order"].get(name) != training.order.get(name):
            raise ValueError(
                f"its order of samples has {name}={values['order'].get(name)} and this run's"
                f" {training.order.get(name)}; give what was saved"
            )
    for name in sorted({*values["model"], *training.model}):
        if values["model"].get(name) != training.model.get(name):
            raise ValueError(
                f"its model has {name}={values['model'].get(name)} and this run's"
                f" {training.model.get(name)}; give what was saved"
            )
    saved, given = values["loss_scale"], _moving(optimizer.loss_scale)
    if (None if saved is None else set(saved)) != (None if given is None else set(given)):
        raise ValueError(
            f"it has a loss scale {saved} and this run {given}; give the kind that was saved"
        )
    here = dataclasses.asdict(optimizer.schedule)
    for name, value in here.items():
        if values["schedule"][name] != value and not override_schedule:
            raise ValueError(
                f"its schedule has {name}={values['schedule'][name]} and this run's {value}; give"
                " the schedule that was saved, or override it"
            )


def _progress(values: Mapping[str, Any]) -> Progress:
    for name in ("steps", "consumed", "updates"):
        if type(values[name]) is not int or values[name] < 0:
            raise ValueError(f"{METADATA} has {name}={values[name]!r}; take another checkpoint")
    return Progress(values["steps"], values["consumed"])


def _put_back(values: Mapping[str, Any], optimizer: Optimizer) -> None:
    optimizer.updates = values["updates"]
    for name, value in (values["loss_scale"] or {}).items():
        setattr(optimizer.loss_scale, name, value)


def _read(folder: Path) -> tuple[str, str]:
    path = find(folder)
    return str(path), (path / METADATA).read_text(encoding="utf-8", errors="replace")


def _on_first_rank(work: Callable[[], T], folder: Path) -> T:
    """What `work` returns on rank 0, of Python's own types, on every rank. Raises CheckpointError
    on every rank where it raises there."""
    done: T | None = None
    refused: str | None = None
    if dist.get_rank() == 0:
        try:
            done = work()
        except ValueError as error:
            refused = str(error)
        except OSError as error:
            refused = f"checkpoint: {folder}: {error.strerror or error}"
    told: list[Any] = [done, refused]
    dist.broadcast_object_list(told, src=0)
    done, refused = told
    if refused is not None:
        raise CheckpointError(refused)
    return cast(T, done)


def _first(error: CheckpointException, folder: Path, doing: str) -> CheckpointError:
    """What the first rank that failed said, in one line."""
    rank, (cause, _) = min(error.failures.items(), key=lambda each: each[0])
    said = " ".join(str(cause).split())
    if isinstance(cause, ValueError):
        return CheckpointError(f"checkpoint: {folder}: {said}")
    return CheckpointError(
        f"checkpoint: {doing} {folder}: rank {rank}: {type(cause).__name__}: {said}"
    )


__all__ = ["CheckpointError", "Progress", "Training", "load_checkpoint", "save_checkpoint"]
