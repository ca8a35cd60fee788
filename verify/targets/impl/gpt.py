"""impl's whole model and its training as a subject.

The contract has a stack of each parameter over the layers, a stage's part of which is filled into
the modules when training begins, and read from them again after each step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.init import constant_

from impl.data_parallel import DataParallel, of_expert
from impl.groups import Groups
from impl.model import ModelConfig, build_model, layers_of, model_parameters, tie_embeddings
from impl.moe.layer import ExpertsConfig
from impl.moe.router import Choice
from impl.optimizer.mixed import Optimizer, ParameterGroup
from impl.training import Microbatch, Trainer, TrainResult
from impl.transformer import LayerConfig
from verify.case import Case
from verify.layout import Layout
from verify.oracle.gpt.model import OPTIONS as _OPTIONS
from verify.oracle.gpt.model import Model
from verify.oracle.gpt.parameters import stacks_of
from verify.placement import Listed, Placements, Shard
from verify.targets.impl.context import attention_arguments
from verify.targets.impl.dropout import tracker_of
from verify.targets.impl.positions import rotary_of
from verify.targets.impl.subject import Builder, Tensors, switches
from verify.targets.impl.training import (
    FACTORS,
    loss_scale_of,
    number,
    rule_of,
    schedule_of,
    shards_only,
)
from verify.targets.megatron_attributes import placements_of

OPTIONS: Mapping[str, tuple[str, ...]] = {"gpt_training": _OPTIONS}
_SIZES = ("hidden", "heads", "groups", "head_size", "ffn")
_GIVEN = ("norm", "activation", "hidden_dropout", "attention_dropout", "recompute")


def config_of(case: Case, groups: Groups) -> ModelConfig:
    """The model that a case describes."""
    attention = attention_arguments(case, groups)
    layer: dict[str, Any] = {name: case.options[name] for name in _GIVEN if name in case.options}
    layer |= {name: case.shape[name] for name in _SIZES}
    layer |= {name: attention[name] for name in ("algorithm", "placement", "mask")}
    turned = case.options.get("rotary_dim") is not None
    named = {"multiple": "vocabulary_multiple", "every": "experts_every"}
    named |= {"first": "first_stage_layers", "last": "last_stage_layers"}
    given: dict[str, Any] = {
        argument: case.options[name] for name, argument in named.items() if name in case.options
    }
    if text := case.options.get("split"):
        given["split"] = tuple(int(each) for each in str(text).split(","))
    return ModelConfig(
        layer=LayerConfig(
            rotary=rotary_of(case, case.shape["head_size"]) if turned else None,
            experts=_experts(case),
            **switches(case, "zero_centered", "qk_norm", "bias"),
            **layer,
        ),
        layers=case.shape["layers"],
        vocabulary=case.shape["vocabulary"],
        max_sequence=case.shape["sequence"],
        positions=case.options.get("positions", "none"),  # type: ignore[arg-type]
        **switches(case, "tied"),
        **given,
    )


def _experts(case: Case) -> ExpertsConfig | None:
    if "experts" not in case.shape:
        return None
    given: dict[str, Any] = {n: case.options[n] for n in ("dispatcher",) if n in case.options}
    return ExpertsConfig(
        number=case.shape["experts"],
        ffn=case.shape["ffn"],
        choice=Choice(top_k=case.shape["top_k"]),
        shared_ffn=case.shape.get("shared_ffn"),
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
        self.stacks = _Stacks(case, self.config, self.own)
        self.given = {name: self.stacks.empty(name) for name in self.stacks.names}

    def parameters(self) -> Mapping[str, tuple[Parameter, Placements]]:
        """This stage's part of every stack."""
        return {name: (each, self.stacks.placements(name)) for name, each in self.given.items()}

    def forward(self, inputs: Tensors) -> Tensors:
        """All steps; what is told of each, stacked."""
        self._fill()
        return self.train(self.trainer(), inputs, range(self.case.shape["steps"]))

    def train(self, trainer: Trainer, inputs: Tensors, steps: range) -> Tensors:
        """These steps; what is told of each, stacked."""
        told: dict[str, list[Tensor]] = {}
        after: list[dict[str, Tensor]] = []
        for step in steps:
            data = microbatches_of(inputs, step)
            for name, value in self._step(trainer, data, after).items():
                told.setdefault(name, []).append(value)
        trainer.data_parallel.finish_parameters()
        self._look(after)
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
        with torch.no_grad():
            for name, stack in self.given.items():
                for value, parameter in zip(stack, self.stacks.members(name), strict=True):
                    if not getattr(parameter, "shared", False):
                        parameter.copy_(value)
        tie_embeddings(self.chunks, groups=self.groups)

    def trainer(self) -> Trainer:
        """What trains the modules, with their parameters as they are."""
        case, options = self.case, self.case.options
        parallel = DataParallel(
            self.chunks,
            groups=self.groups,
            bucket_size=options.get("bucket"),  # type: ignore[arg-type]
            overlap=bool(options.get("overlap", False)),
            distributed=bool(options.get("distributed", False)),
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
        for name, parameter in self.own.items():
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
        self, trainer: Trainer, data: list[Microbatch], after: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        gradients: dict[str, Tensor] = {}

        def finalised() -> None:
            # What the forward passes of a step have seen is what the step before has left.
            self._look(after)
            gradients.update(self._gradients(trainer.data_parallel, scale))

        result: TrainResult = trainer.train_step(data, finalised=finalised)
        told = {"scale": scale, "rates": result.step.rates}
        found = {name: torch.tensor(v, dtype=torch.float64) for name, v in told.items()}
        found |= {**gradients, "loss": result.loss, "norm": result.step.norm}
        if self.case.options.get("evaluated", False):
            found["evaluation"] = trainer.evaluate(data)
        return found

    def _look(self, after: list[dict[str, Tensor]]) -> None:
        after.append(
            {
                f"new {n}": self.stacks.stacked(n, Parameter.detach, dtype=self.stacks.dtype)
                for n in self.stacks.names
            }
        )

    def _gradients(self, parallel: DataParallel, scale: float) -> dict[str, Tensor]:
        """Main gradients without the scale; of shards, zeros around them."""

        def gradient(parameter: Parameter) -> Tensor:
            if parallel.distributed:
                return shards_only(parameter, parallel) / scale
            whole: Tensor = parameter.main_grad  # type: ignore[attr-defined]
            return whole.detach() / scale

        wide = parallel.zero.dtype
        return {
            f"gradient {name}": self.stacks.stacked(name, gradient, dtype=wide)
            for name in self.stacks.names
        }


class _Stacks:
    """The parameters of this stage as parts of the contract's stacks."""

    def __init__(self, case: Case, config: ModelConfig, own: Mapping[str, Parameter]) -> None:
        self.case, self.dtype = case, getattr(torch, case.dtype)
        self.promised = stacks_of(Model.of(case))
        self.names = tuple(self.promised)
        self.layers = [_layers(case.layout, config, stage) for stage in range(case.layout.pp)]
        self._members: dict[str, list[Parameter]] = {name: [] for name in self.names}
        for name, parameter in own.items():
            self._members[self._stack_of(name)].append(parameter)

    def members(self, name: str) -> list[Parameter]:
        """What this stage has of a stack, in the order of the model."""
        return self._members[name]

    def stacked(
        self, name: str, value: Callable[[Parameter], Tensor], *, dtype: torch.dtype
    ) -> Tensor:
        """A tensor of every member, stacked; of none an empty one of this dtype."""
        parts = [value(parameter) for parameter in self._members[name]]
        return torch.stack(parts) if parts else self.empty(name).detach().to(dtype)

    def empty(self, name: str) -> Parameter:
        """A part of a stack with values that are not numbers."""
        members = self._members[name]
        if members:
            shape: tuple[int, ...] = tuple(members[0].shape)
        else:
            shape = self._local(name)
        full = torch.full((len(members), *shape), math.nan, dtype=self.dtype)
        return Parameter(full, requires_grad=False)

    def placements(self, name: str) -> Placements:
        """Over pp by the layers that stages have; on the ranks of a stage by the attributes."""
        held = self._held(name)
        members = self._members[name]
        if not members:
            within = {a: p for a, p in self.promised[name].placements.items() if a != "pp"}
            return {"pp": Listed(0, held), **within}
        expert = of_expert(members[0])
        within = placements_of(members[0], axis="etp" if expert else "tp")  # type: ignore[assignment]
        later: dict[str, Any] = {"pp": Listed(0, held)}
        later |= {"ep": Shard(1)} if expert else {}
        for axis, placement in within.items():
            assert isinstance(placement, Shard)
            later[axis] = Shard(placement.dim + 1, placement.stride)
        return later

    def _held(self, name: str) -> tuple[tuple[int, ...], ...]:
        promised, pp = self.promised[name], self.case.layout.pp
        if name.startswith("layers."):
            members = promised.members
            return tuple(
                tuple(members.index(each) for each in own if each in members) for own in self.layers
            )
        stages = {0} if name.startswith("embedding.") else {pp - 1}
        if name == "embedding.tokens.weight" and self.case.options.get("tied", True):
            stages |= {pp - 1}
        return tuple((0,) if stage in stages else () for stage in range(pp))

    def _stack_of(self, name: str) -> str:
        """The stack of a parameter by its name in the model."""
        if name == "output.weight" and name not in self.names:
            return "embedding.tokens.weight"
        return re.sub(r"^layers\.\d+\.", "layers.", name)

    def _local(self, name: str) -> tuple[int, ...]:
        """The shape of one member on this rank, of which it has none."""
        sizes = {**self.case.layout.sizes, **self.case.layout.expert_sizes}
        shape = [0, *self.promised[name].shape]
        for axis, placement in self.promised[name].placements.items():
            if isinstance(placement, Shard):
                shape[placement.dim] //= sizes[axis]
        return tuple(shape[1:])


def _layers(layout: Layout, config: ModelConfig, stage: int) -> list[int]:
    """The layers of all chunks of a stage."""
    chunks = [
        layers_of(config, layout=layout, stage=stage, chunk=chunk) for chunk in range(layout.vpp)
    ]
    return [layer for chunk in chunks for layer in chunk]


def microbatches_of(inputs: Tensors, step: int) -> list[Microbatch]:
    """Those of a step, of inputs that have all."""
    given = (inputs[name][step] for name in ("tokens", "targets", "mask"))
    return [Microbatch(*each) for each in zip(*given, strict=True)]


BUILDERS: Mapping[str, Builder] = {"gpt_training": GPTSubject}
