"""impl's whole model and its training as a subject.

The contract has a stack of each parameter over the layers, a stage's part of which is filled into
the modules when training begins, and read from them again after each step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.nn.init import constant_

from impl.context_parallel.zigzag import PackedSequences
from impl.data_parallel import DataParallel
from impl.groups import Groups
from impl.model import build_model, model_parameters, tie_embeddings
from impl.model_config import ModelConfig, layers_of
from impl.moe.layer import ExpertsConfig
from impl.moe.router import Choice, Losses
from impl.optimizer.mixed import Optimizer, ParameterGroup
from impl.training import Microbatch, Trainer, TrainResult
from verify.case import Case
from verify.cluster.history import mark_step
from verify.oracle.gpt.model import OPTIONS as _OPTIONS
from verify.placement import Placements
from verify.targets.impl.dropout import tracker_of
from verify.targets.impl.subject import Builder, Tensors, switches
from verify.targets.impl.training import (
    FACTORS,
    loss_scale_of,
    number,
    rule_of,
    schedule_of,
    shards_only,
)
from verify.targets.impl.transformer import layer_config
from verify.targets.stacks import Stacks

OPTIONS: Mapping[str, tuple[str, ...]] = {"gpt_training": _OPTIONS}


def config_of(case: Case, groups: Groups) -> ModelConfig:
    """The model that a case describes."""
    named = {"multiple": "vocabulary_multiple", "every": "experts_every"}
    named |= {"first": "first_stage_layers", "last": "last_stage_layers"}
    named |= {"multi_token": "multi_token_layers", "multi_token_scaling": "multi_token_scaling"}
    given: dict[str, Any] = {
        argument: case.options[name] for name, argument in named.items() if name in case.options
    }
    if text := case.options.get("split"):
        given["split"] = tuple(int(each) for each in str(text).split(","))
    return ModelConfig(
        layer=layer_config(case, groups, experts=_experts(case), **switches(case, "layer_scaling")),
        layers=case.shape["layers"],
        vocabulary=case.shape["vocabulary"],
        max_sequence=case.options.get("max_sequence", case.shape["sequence"]),  # type: ignore[arg-type]
        positions=case.options.get("positions", "none"),  # type: ignore[arg-type]
        **switches(case, "tied", "multi_token_normalised"),
        **given,
    )


def _experts(case: Case) -> ExpertsConfig | None:
    if "experts" not in case.shape:
        return None
    given: dict[str, Any] = {n: case.options[n] for n in ("dispatcher",) if n in case.options}
    level = str(case.options.get("balance", "none"))
    return ExpertsConfig(
        number=case.shape["experts"],
        ffn=case.shape["ffn"],
        choice=Choice(top_k=case.shape["top_k"]),
        shared_ffn=case.shape.get("shared_ffn"),
        losses=Losses(
            level=None if level == "none" else level,
            balance=number(case, "coefficient", 1.0),
            z=number(case, "z_loss", 0.0),
        ),
        **given,
    )


class GPTSubject:
    """Trains in its forward pass."""

    def __init__(self, case: Case, groups: Groups) -> None:
        self.case, self.groups = case, groups
        self.config = config_of(case, groups)
        self.tracker = tracker_of(case.layout, seed=case.seed)
        self.chunks = build_model(
            self.config,
            groups=groups,
            tracker=self.tracker,
            init=partial(constant_, val=math.nan),
            dtype=getattr(torch, case.dtype),
        )
        self.own = model_parameters(self.chunks)
        self.schedule, self.loss_scale = schedule_of(case), loss_scale_of(case)
        self.stacks = Stacks(
            case,
            self.own,
            layers=[self._layers(stage) for stage in range(case.layout.pp)],
            copied=self.config.tied or self.config.multi_token_layers > 0,
        )

    def parameters(self) -> Mapping[str, tuple[Parameter, Placements]]:
        """This stage's part of every stack."""
        return self.stacks.parameters()

    def forward(self, inputs: Tensors) -> Tensors:
        """All steps; what is told of each, stacked."""
        self._fill()
        return self.train(self.trainer(), inputs, range(self.case.shape["steps"]))

    @contextmanager
    def overflowing(self, step: int) -> Iterator[None]:
        """While inside, a step whose gradients are not finite on the rank that is to overflow."""
        case, ranks = self.case, dist.get_world_size()
        if step + 1 != case.options.get("overflow") or dist.get_rank() != case.seed % ranks:
            yield
            return
        hook = self.chunks[0].register_forward_hook(
            lambda module, inputs, output: _Overflow.apply(output)
        )
        try:
            yield
        finally:
            hook.remove()

    def train(self, trainer: Trainer, inputs: Tensors, steps: range) -> Tensors:
        """These steps; what is told of each, stacked."""
        told: dict[str, list[Tensor]] = {}
        after: list[dict[str, Tensor]] = []
        for step in steps:
            mark_step(step)
            data = microbatches_of(inputs, step)
            for name, value in self._step(trainer, step, data, after).items():
                told.setdefault(name, []).append(value)
        trainer.data_parallel.finish_parameters()
        after.append(self.stacks.values())
        for name in after[0]:
            told[name] = [each[name] for each in after[1:]]
        return {name: torch.stack(values) for name, values in told.items()}

    def finish_gradients(self) -> None:
        """Nothing: every step does."""

    def random_states(self) -> Mapping[str, Tensor]:
        """The state of every stream."""
        return self.tracker.states()

    def _fill(self) -> None:
        """Write what was loaded into the modules. A tied copy gets its values from the original."""
        self.stacks.fill()
        tie_embeddings(self.chunks, groups=self.groups)

    def trainer(self) -> Trainer:
        """What trains the modules, with their parameters as they are."""
        case, options = self.case, self.case.options
        parallel = DataParallel(
            self.chunks,
            groups=self.groups,
            bucket_size=options.get("bucket"),  # type: ignore[arg-type]
            **switches(case, "overlap", "distributed"),
        )
        clip = options.get("clip")
        optimizer = Optimizer(
            parallel,
            groups=self.groups,
            parameter_groups=self._groups(),
            rule=rule_of(case),
            schedule=self.schedule,
            weight_decay=number(case, "weight_decay", 0.0),
            max_norm=None if clip is None else float(clip),
            norm_order=number(case, "order", 2.0),
            loss_scale=self.loss_scale,
        )
        kind = str(options.get("pipeline", "default"))
        return Trainer(
            self.chunks,
            groups=self.groups,
            data_parallel=parallel,
            optimizer=optimizer,
            schedule=None if kind == "default" else kind,
        )

    def _groups(self) -> list[ParameterGroup]:
        factors = FACTORS[str(self.case.options.get("groups", "one"))]
        members: list[list[Parameter]] = [[] for _ in factors]
        trained = {name: each for name, each in self.own.items() if each.requires_grad}
        for name, parameter in trained.items():
            index = 0
            if len(members) > 1 and name.endswith("fc2.weight"):
                index = 1
            elif len(members) > 1 and (name.endswith("bias") or "norm" in name):
                index = 2
            members[index].append(parameter)
        return [
            ParameterGroup(parameters=each, lr_multiplier=lr, weight_decay_multiplier=decay)
            for each, (lr, decay) in zip(members, factors, strict=True)
        ]

    def _step(
        self,
        trainer: Trainer,
        step: int,
        data: list[Microbatch],
        after: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        gradients: dict[str, Tensor] = {}

        def finalised() -> None:
            # What the forward passes of a step have seen is what the step before has left.
            after.append(self.stacks.values())
            gradients.update(self._gradients(trainer.data_parallel, scale))

        with self.overflowing(step):
            result: TrainResult = trainer.train_step(data, finalised=finalised)
        skipped = result.step.skipped
        told = {"scale": scale, "rates": result.step.rates, "skipped": float(skipped)}
        found = {name: torch.tensor(v, dtype=torch.float64) for name, v in told.items()}
        for name, gradient in gradients.items():
            found[name] = torch.zeros_like(gradient) if skipped else gradient
        found |= {"loss": result.loss, "norm": result.step.norm}
        if self.config.multi_token_layers:
            found["further"] = result.further
        if self.case.options.get("evaluated", False):
            found["evaluation"] = trainer.evaluate(data)
        return found

    def _gradients(self, parallel: DataParallel, scale: float) -> dict[str, Tensor]:
        """Main gradients without the scale; of shards, zeros around them."""

        def gradient(parameter: Parameter) -> Tensor:
            if parallel.distributed:
                return shards_only(parameter, parallel) / scale
            whole: Tensor = parameter.main_grad  # type: ignore[attr-defined]
            return whole.detach() / scale

        return self.stacks.gradients(gradient, dtype=parallel.zero.dtype)

    def _layers(self, stage: int) -> list[int]:
        """The layers of all chunks of a stage."""
        layout = self.case.layout
        return [
            layer
            for chunk in range(layout.vpp)
            for layer in layers_of(self.config, layout=layout, stage=stage, chunk=chunk)
        ]


class _Overflow(torch.autograd.Function):
    """`x`, whose gradient is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.inf


def microbatches_of(inputs: Tensors, step: int) -> list[Microbatch]:
    """Those of a step, of inputs that have all."""
    given = zip(*(inputs[name][step] for name in ("tokens", "targets", "mask")), strict=True)
    packed = _packed_of(inputs)
    return [
        Microbatch(tokens, targets, mask, None if packed is None else packed[m])
        for m, (tokens, targets, mask) in enumerate(given)
    ]


def _packed_of(inputs: Tensors) -> list[PackedSequences] | None:
    """The packed sequences of each microbatch, if there are any."""
    if "cu_seqlens" not in inputs:
        return None
    padded = inputs["cu_seqlens_padded"]
    return [PackedSequences.from_cumulative(each, padded) for each in inputs["cu_seqlens"]]


BUILDERS: Mapping[str, Builder] = {"gpt_training": GPTSubject}
