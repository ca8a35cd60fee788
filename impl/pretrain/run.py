"""A pretraining run on one rank: everything is built, loaded, trained, logged and saved."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import ModuleList, Parameter

from impl.checkpoint.model import training_of
from impl.checkpoint.training import Progress, Training, load_checkpoint, save_checkpoint
from impl.data.batches import Batches
from impl.data.sampler import Sampler, Samples
from impl.data.tokenizer import ByteTokenizer
from impl.data.tokens import open_tokens, token_file
from impl.data_parallel import DataParallel
from impl.groups import Groups, build_groups
from impl.initialise import initialise_whole, transformer_rule
from impl.model import build_model, tie_embeddings
from impl.model_config import ModelConfig
from impl.optimizer.adam import AdamW
from impl.optimizer.loss_scale import DynamicLossScale
from impl.optimizer.mixed import Optimizer, ParameterGroup
from impl.parameters import defer, of_expert
from impl.pretrain.log import Log
from impl.pretrain.options import Options
from impl.pretrain.records import Record
from impl.random import RandomTracker, parallel_tracker
from impl.training import Trainer, TrainResult


@dataclass(frozen=True)
class Run:
    """What `pretrain` works with."""

    options: Options
    groups: Groups
    batches: Batches
    trainer: Trainer
    training: Training


def pretrain(options: Options) -> list[Record]:
    """Train to the end, and the records of the steps that this call made. Collective: every rank of
    `options.layout()` calls it, with torch.distributed initialised.

    ValueError where something does not fit, CheckpointError where a checkpoint does not.
    """
    groups = build_groups(options.layout())
    run = build(options, groups)
    progress, source = Progress(0, 0), options.source()
    if source is not None:
        override = options.override_schedule
        progress = load_checkpoint(source, run.training, override_schedule=override)
    log = Log(options, after=progress.steps) if dist.get_rank() == 0 else None
    records = []
    for record, reached in _steps(run, progress):
        records.append(record)
        if log is not None:
            log.add(record)
        due = reached.steps % options.save_interval == 0 or reached.steps == options.steps
        if options.save is not None and due:
            saved = save_checkpoint(options.save, run.training, reached)
            if log is not None:
                log.say(f"saved {saved}")
    if log is not None:
        log.end(already=progress.steps)
    groups.destroy()
    return records


def pretrain_plain(values: dict[str, Any]) -> list[Record]:
    """`pretrain` with the options that `Options.to_plain` told."""
    return pretrain(Options.from_plain(values))


def build(options: Options, groups: Groups) -> Run:
    """A run before its first step. Collective."""
    tokenizer = ByteTokenizer()
    config = options.model(vocabulary=tokenizer.vocabulary)
    device = torch.device(options.device)
    tracker = parallel_tracker(
        options.seed, layout=groups.layout, rank=dist.get_rank(), device=device
    )
    chunks = _model(config, options, groups, tracker, device)
    data_parallel = DataParallel(
        chunks,
        groups=groups,
        bucket_size=options.bucket,
        overlap=options.overlap,
        distributed=options.distributed_optimizer,
    )
    optimizer = Optimizer(
        data_parallel,
        groups=groups,
        parameter_groups=_parameter_groups(data_parallel),
        rule=AdamW(beta1=options.beta1, beta2=options.beta2),
        schedule=options.schedule(),
        weight_decay=options.weight_decay,
        max_norm=options.clip or None,
        norm_order=2.0,
        loss_scale=DynamicLossScale(value=options.initial_loss_scale) if options.fp16 else None,
    )
    trainer = Trainer(
        chunks,
        groups=groups,
        data_parallel=data_parallel,
        optimizer=optimizer,
        schedule=options.pipeline,
    )
    path = token_file(options.data, cache=options.cache, tokenizer=tokenizer)
    samples = Samples(open_tokens(path), options.sequence)
    batches = Batches(
        samples=samples,
        sampler=Sampler(count=samples.count, seed=options.seed),
        size=options.global_batch_size,
        microbatch_size=options.microbatch_size,
        groups=groups,
        placement=config.layer.placement,
        device=device,
    )
    order: dict[str, int | str] = {
        "seed": options.seed,
        "sequence": options.sequence,
        "data": path.stem.rpartition("-")[2],
    }
    training = training_of(chunks, config, optimizer, tracker, groups, order=order)
    return Run(options, groups, batches, trainer, training)


def _model(
    config: ModelConfig,
    options: Options,
    groups: Groups,
    tracker: RandomTracker,
    device: torch.device,
) -> ModuleList:
    """The chunks of this stage, with values that do not depend on the layout."""
    chunks = build_model(
        config,
        groups=groups,
        tracker=tracker,
        init=defer,
        dtype=options.dtype,
        device=device,
    )
    initialise_whole(
        chunks,
        seed=options.seed,
        rule=transformer_rule(options.init_std, num_layers=config.layers),
        groups=groups,
        name_of=lambda name: name.partition(".")[2],
    )
    tie_embeddings(chunks, groups=groups)
    return chunks


def _parameter_groups(data_parallel: DataParallel) -> list[ParameterGroup]:
    """Biases and norms do not decay. Those of experts are stacked."""
    matrices: list[Parameter] = []
    vectors: list[Parameter] = []
    for parameter in data_parallel.parameters:
        stacked = 1 if of_expert(parameter) else 0
        (matrices if parameter.dim() - stacked >= 2 else vectors).append(parameter)
    return [
        ParameterGroup(parameters=matrices),
        ParameterGroup(parameters=vectors, weight_decay_multiplier=0.0),
    ]


def _steps(run: Run, progress: Progress) -> Iterator[tuple[Record, Progress]]:
    """The steps that are left, each with how far the run is after it."""
    while progress.steps < run.options.steps:
        began = time.perf_counter()
        result = run.trainer.train_step(run.batches.after(progress.consumed))
        progress = Progress(progress.steps + 1, progress.consumed + run.batches.size)
        yield _record(result, progress, time.perf_counter() - began), progress


def _record(result: TrainResult, progress: Progress, seconds: float) -> Record:
    return Record(
        step=progress.steps,
        loss=float(result.loss),
        grad_norm=float(result.step.norm),
        lr=result.step.rates[0],
        tokens=int(result.tokens),
        consumed=progress.consumed,
        skipped=result.step.skipped,
        further=result.further.tolist(),
        seconds=seconds,
    )
