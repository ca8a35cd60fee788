"""Checkpoints of impl: one run saves, and another one, at another layout, loads and goes on."""

from __future__ import annotations

import dataclasses
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.nn.init import constant_

from impl.checkpoint.model import training_of
from impl.checkpoint.training import Progress, Training, load_checkpoint, save_checkpoint
from impl.groups import Groups, build_groups
from impl.optimizer.loss_scale import DynamicLossScale
from impl.optimizer.mixed import Optimizer
from impl.training import Trainer
from verify.case import Case
from verify.layout import Layout
from verify.oracle.checkpoint import (
    DRAWN,
    DRAWN_BEFORE,
    DRAWN_BELOW,
    RESUMED_OPTIONS,
    ROUND_TRIP_OPTIONS,
    ROUND_TRIP_TRAINED,
    STATES,
    STREAMS,
    VOCABULARIES,
    case_at,
    saved_layout,
    unlike,
)
from verify.oracle.gpt import AXES, gpt_training
from verify.placement import Placements, Shard, shard
from verify.replica import RankMap
from verify.target import Subject
from verify.targets.impl.gpt import GPTSubject, microbatches_of
from verify.targets.impl.subject import Builder, OperationSubject, Tensors

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "resumed_training": RESUMED_OPTIONS,
    "checkpoint": ROUND_TRIP_OPTIONS,
}
# What no run to be loaded has saved, and everything that is not loaded has.
_UNTOUCHED = 7.0
# In the last bytes of a file are values, and no names.
_END = 256


class Side:
    """A model at one of the two layouts, and what trains it."""

    def __init__(self, case: Case, layout: Layout, groups: Groups) -> None:
        self.case, self.layout = case_at(case, layout), layout
        self.ranks = RankMap(layout, AXES)
        self.subject = GPTSubject(self.case, groups)
        self._spoil_parameters()

    @cached_property
    def trainer(self) -> Trainer:
        """What trains the parameters, beginning with what they are when it is first asked for."""
        return self.subject.trainer()

    @property
    def optimizer(self) -> Optimizer:
        """That of the trainer."""
        return self.trainer.optimizer

    def spoil(self) -> None:
        """Make parameters and states of the optimizer what no run begins with."""
        self._spoil_parameters()
        for slot in self.optimizer.slots:
            for state in slot.state.values():
                state.fill_(_UNTOUCHED)

    def _spoil_parameters(self) -> None:
        for parameter in self.subject.own.values():
            constant_(parameter, _UNTOUCHED)

    def training(self) -> Training:
        """What a checkpoint has."""
        subject = self.subject
        return training_of(
            subject.chunks,
            subject.config,
            self.optimizer,
            subject.tracker,
            subject.groups,
            order={},
        )

    def local(self, full: Tensor, placements: Placements) -> Tensor:
        """This rank's part of a tensor."""
        return shard(full, placements, self.ranks.sizes, self.coordinates)

    @property
    def coordinates(self) -> Mapping[str, int]:
        """Where this rank is."""
        return self.ranks.coordinates[dist.get_rank()]

    def parts(self, name: str, full: Tensor) -> Iterator[tuple[Parameter, Tensor]]:
        """The parameters of a stack on this rank, each with its part of a tensor like the stack,
        to which rows of padding are added."""
        promised = self.subject.stacks.promised[name]
        padded = full.new_full(promised.full, _UNTOUCHED)
        padded[:, : full.shape[1]] = full
        yield from zip(
            self.subject.stacks.members(name),
            self.local(padded, promised.placements),
            strict=True,
        )

    def without_padding(self, name: str, values: Tensor) -> Tensor:
        """A stack [..., members, rows, columns] of this rank with zeros in rows of padding."""
        if name not in VOCABULARIES:
            return values
        rows = torch.zeros(self.subject.stacks.promised[name].full[1])
        rows[: self.case.shape["vocabulary"]] = 1
        mine = self.local(rows, {"tp": Shard(0)})
        return torch.where(mine[:, None] > 0, values, torch.zeros_like(values))

    def states(self, name: str, state: str) -> Tensor:
        """A state of the optimizer like a stack, with zeros around shares."""

        def whole(parameter: Parameter) -> Tensor:
            found = torch.zeros_like(parameter).view(-1)
            for slot in self.optimizer.slots:
                if slot.share.parameter is parameter:
                    values = slot.state[state]
                    found[slot.share.start : slot.share.start + values.numel()] = values
            return found.view(parameter.shape).detach()

        return self.subject.stacks.stacked(name, whole, dtype=self.subject.stacks.dtype)


def resumed_training(case: Case, groups: Groups) -> Subject:
    """Train at one layout, save, load at the other, and go on."""

    def call(inputs: Tensors) -> Tensors:
        after = int(case.options.get("after") or 1)
        with sides(case, groups) as (before, now, folder):
            for name in before.subject.stacks.names:
                full = inputs[f"given {name}"]
                with torch.no_grad():
                    for parameter, part in before.parts(name, full / 2 if full.dim() > 2 else full):
                        parameter.copy_(part)
            for step in range(after):
                with before.subject.overflowing(step):
                    before.trainer.train_step(microbatches_of(_own(before, inputs), step))
            save_checkpoint(folder, before.training(), Progress(after, 0))
            load_checkpoint(folder, now.training())
            steps = range(after, case.shape["steps"])
            told = dict(now.subject.train(now.trainer, _own(now, inputs), steps))
        for name in now.subject.stacks.names:
            told[f"new {name}"] = now.without_padding(name, told[f"new {name}"])
        return told

    return OperationSubject(call)


def round_trip(case: Case, groups: Groups) -> Subject:
    """Save what is given at one layout, and load it at the other."""
    trained = dataclasses.replace(case, options={**case.options, **ROUND_TRIP_TRAINED})

    def call(inputs: Tensors) -> Tensors:
        with sides(trained, groups) as (before, now, folder):
            progress = begin(before, inputs)
            another = case.options.get("another")
            # Its name comes before that of the other, or after it, or has the same number.
            steps = max(progress.steps + (-1, 1, 1, 0)[case.seed % 4], 0)
            other = Progress(steps, progress.consumed + 1)
            if another == "older":
                save_checkpoint(folder, now.training(), other)
            saved = save_checkpoint(folder, before.training(), progress)
            if another == "newer":
                save_checkpoint(folder, now.training(), other)
            place = saved if another == "newer" else folder
            if dist.get_rank() == 0:
                _damage(folder, str(case.options.get("checkpoint", "")), case.seed)
            dist.barrier()
            reached = load_checkpoint(place, now.training())
        # What should not have come so far has other things to tell, or nothing.
        refused = {"unlike", "checkpoint"} & set(case.options)
        return {} if refused else end(now, inputs, reached)

    return OperationSubject(call)


def _damage(folder: Path, how: str, seed: int) -> None:
    """Do what option `checkpoint` says to a folder, or to one of its files."""
    if how in ("no folder", "empty"):
        shutil.rmtree(folder)
        if how == "empty":
            folder.mkdir()
    elif how:
        numbers = random.Random(seed)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        file = numbers.choice([path for path in files if how != "altered" or _is_text(path)])
        content = bytearray(file.read_bytes())
        if how == "missing":
            file.unlink()
        elif how == "truncated":
            file.write_bytes(content[: len(content) // 2])
        elif how == "altered":
            content[max(at for at, octet in enumerate(content) if octet in b"0123456789")] ^= 1
            file.write_bytes(content)
        else:
            # Not of the end of a line, which says nothing.
            end = len(content.rstrip())
            content[numbers.randrange(max(end - _END, 0), end)] ^= 1
            file.write_bytes(content)


def _is_text(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


@contextmanager
def sides(case: Case, groups: Groups) -> Iterator[tuple[Side, Side, Path]]:
    """The run that saves, the run that loads, and a folder. Collective."""
    other = build_groups(saved_layout(case))
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder, src=0)
    path = Path(str(folder[0]))
    try:
        now = Side(unlike(case), case.layout, groups)
        now.spoil()
        yield Side(case, other.layout, other), now, path
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(path, ignore_errors=True)
    other.destroy()


def _own(side: Side, inputs: Tensors) -> Tensors:
    """This rank's tokens at a layout."""
    specs = gpt_training(side.case).inputs
    return {name: side.local(inputs[name], spec.placements) for name, spec in specs.items()}


def begin(side: Side, inputs: Tensors) -> Progress:
    """Write what is given into a run."""
    with torch.no_grad():
        for name in side.subject.stacks.names:
            for parameter, part in side.parts(name, inputs[name]):
                parameter.copy_(part)
            for state in STATES:
                _write_state(side, state, dict(side.parts(name, inputs[f"{state} {name}"])))
    steps, consumed, updates, *scale = (int(each) for each in inputs["progress"])
    side.optimizer.updates = updates
    found = side.optimizer.loss_scale
    assert isinstance(found, DynamicLossScale)
    found.value, found.steps, found.overflows = scale
    states = side.subject.tracker.states()
    for name, seeds in _seeds(inputs):
        at = tuple(side.coordinates[axis] for axis in STREAMS[name])
        states[name] = torch.Generator().manual_seed(int(seeds[at])).get_state()
    side.subject.tracker.set_states(states)
    draw(side, DRAWN_BEFORE)
    return Progress(steps, consumed)


def _write_state(side: Side, state: str, parts: Mapping[Parameter, Tensor]) -> None:
    for slot in side.optimizer.slots:
        if slot.share.parameter in parts:
            flat = parts[slot.share.parameter].reshape(-1)
            values = slot.state[state]
            values.copy_(flat[slot.share.start : slot.share.start + values.numel()])


def end(side: Side, inputs: Tensors, reached: Progress) -> Tensors:
    """Everything that a run has, by the names of the contract."""
    stacks, found = side.subject.stacks, {}
    for name in stacks.names:
        values = stacks.stacked(name, Parameter.detach, dtype=stacks.dtype)
        found[name] = side.without_padding(name, values.clone())
        for state in STATES:
            found[f"{state} {name}"] = side.without_padding(name, side.states(name, state))
    scale = side.optimizer.loss_scale
    assert isinstance(scale, DynamicLossScale)
    counts = (reached.steps, reached.consumed, side.optimizer.updates)
    told = (*counts, scale.value, scale.steps, scale.overflows)
    found["progress"] = torch.tensor(told, dtype=torch.float64)
    drawn = draw(side, DRAWN)
    for name, _ in _seeds(inputs):
        ones = (1,) * len(STREAMS[name])
        found[f"draws {name}"] = drawn[name].to(torch.float64).view(*ones, DRAWN)
    return found


def _seeds(inputs: Tensors) -> Iterator[tuple[str, Tensor]]:
    for name in STREAMS:
        if f"seed {name}" in inputs:
            yield name, inputs[f"seed {name}"]


def draw(side: Side, count: int) -> dict[str, Tensor]:
    """The next numbers of every stream."""
    found, tracker = {}, side.subject.tracker
    for name in tracker.names:
        with tracker.fork(name):
            found[name] = torch.randint(DRAWN_BELOW, (count,))
    return found


BUILDERS: Mapping[str, Builder] = {
    "resumed_training": resumed_training,
    "checkpoint": round_trip,
}
