"""Rank programs that save and load the checkpoints of a small model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from impl.checkpoint.model import training_of
from impl.checkpoint.training import Progress, Training, load_checkpoint, save_checkpoint
from impl.data_parallel import DataParallel
from impl.groups import build_groups
from impl.initialise import initialise_whole, transformer_rule
from impl.model import build_model, tie_embeddings
from impl.model_config import ModelConfig
from impl.optimizer.adam import AdamW
from impl.optimizer.mixed import Optimizer, ParameterGroup
from impl.optimizer.schedule import Schedule
from impl.optimizer.sgd import SGD
from impl.parameters import defer
from impl.random import parallel_tracker
from impl.transformer import LayerConfig
from verify.layout import Layout

ONE = Layout()


@dataclass(frozen=True)
class Setting:
    """A run: where it is, and what is unlike the run of another setting."""

    layout: Layout = ONE
    layers: int = 2
    hidden: int = 4
    heads: int = 2
    scale: float | None = None
    alibi: bool = False
    layer_scaling: bool = False
    sink: bool = False
    tied: bool = True
    adam: bool = True
    bf16: bool = False
    distributed: bool = False
    lr: float = 0.5
    order: str = "a"
    seed: int = 1


def made(setting: Setting) -> Training:
    """A run at its beginning, its states of Adam those of one that has begun."""
    groups = build_groups(setting.layout)
    config = ModelConfig(
        layer=LayerConfig(
            hidden=setting.hidden,
            heads=setting.heads,
            head_size=4 // setting.heads,
            ffn=4,
            activation="swiglu",
            scale=setting.scale,
            alibi=setting.alibi,
            layer_scaling=setting.layer_scaling,
            sink=setting.sink,
        ),
        layers=setting.layers,
        vocabulary=7,
        max_sequence=4,
        positions="none",
        tied=setting.tied,
    )
    tracker = parallel_tracker(setting.seed, layout=setting.layout, rank=dist.get_rank())
    chunks = build_model(
        config,
        groups=groups,
        tracker=tracker,
        init=defer,
        dtype=torch.bfloat16 if setting.bf16 else torch.float32,
    )
    rule = transformer_rule(0.5, num_layers=setting.layers)
    named: Any = {"name_of": lambda name: name.partition(".")[2]}
    initialise_whole(chunks, seed=setting.seed, rule=rule, groups=groups, **named)
    tie_embeddings(chunks, groups=groups)
    parallel = DataParallel(chunks, groups=groups, overlap=False, distributed=setting.distributed)
    optimizer = Optimizer(
        parallel,
        groups=groups,
        parameter_groups=[ParameterGroup(parameters=parallel.parameters)],
        rule=AdamW() if setting.adam else SGD(momentum=0.5),
        schedule=Schedule(maximum=setting.lr),
        weight_decay=0.0,
        norm_order=2.0,
    )
    for slot in optimizer.slots:
        for state in slot.state.values():
            state.copy_(slot.main / 2)
    order = {"data": setting.order}
    return training_of(chunks, config, optimizer, tracker, groups, order=order)


def told(training: Training) -> dict[str, Tensor]:
    """What this rank has."""
    found = {n: p.detach().float().clone() for n, p in training.parameters.items()}
    names = {id(p): name for name, p in training.parameters.items()}
    for slot in training.optimizer.slots:
        for state, values in slot.state.items():
            found[f"{state} {names[id(slot.share.parameter)]}"] = values.clone()
    return found


def save(setting: Setting, folder: str, steps: int) -> tuple[str, dict[str, Tensor]]:
    """The folder of the checkpoint, and what was saved of this rank."""
    training = made(setting)
    path = save_checkpoint(Path(folder), training, Progress(steps, 8 * steps))
    return str(path), told(training)


def load(setting: Setting, folder: str, override: bool = False) -> tuple[int, dict[str, Tensor]]:
    """The steps that were made, and what this rank has then."""
    training = made(setting)
    progress = load_checkpoint(Path(folder), training, override_schedule=override)
    return progress.steps, told(training)


def streams(saved: Setting, setting: Setting, folder: str) -> list[dict[str, Tensor]]:
    """The states of all streams: when saved, loaded, and at the beginning."""
    before = made(saved)
    for name in before.tracker.names:
        with before.tracker.fork(name):
            torch.rand(3)
    # Of one process all trackers draw from one generator.
    kept = before.tracker.states()
    save_checkpoint(Path(folder), before, Progress(1, 8))
    after = made(setting)
    first = after.tracker.states()
    load_checkpoint(Path(folder), after)
    return [kept, after.tracker.states(), first]
