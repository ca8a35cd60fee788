"""Training steps of impl: data parallelism and the optimizer around a small model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import one_hot

from impl.data_parallel import DataParallel, sum_over_tokens
from impl.gradients import finalise_gradients
from impl.groups import Groups
from impl.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from impl.mlp import MLP
from impl.moe.experts import Experts
from impl.moe.layer import make_dispatcher
from impl.norm import RMSNorm
from impl.optimizer.adam import AdamW
from impl.optimizer.loss_scale import DynamicLossScale, LossScale, StaticLossScale
from impl.optimizer.mixed import Optimizer, ParameterGroup, Rule
from impl.optimizer.schedule import Schedule
from impl.optimizer.sgd import SGD
from impl.parameters import of_expert
from impl.partition import split
from verify.case import Case
from verify.cluster.history import mark_step
from verify.placement import Placements, Shard
from verify.targets.impl.subject import Builder, OperationSubject, Tensors, common, switches
from verify.targets.megatron_attributes import placements_of
from verify.targets.training_steps import new_values, reads_spare

_RATES = ("schedule", "warmup", "decay", "annealing", "minimum")
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "learning_rates": (*_RATES, "step"),
    "training_steps": (
        *_RATES,
        "optimizer",
        "momentum",
        "weight_decay",
        "clip",
        "norm",
        "groups",
        "frozen",
        "spare",
        "loss_scale",
        "hysteresis",
        "minimum_scale",
        "overflow",
        "bucket",
        "distributed",
        "overlap",
    ),
}
MAXIMUM = 2.0**-8
FACTORS = {"one": ((1.0, 1.0),), "several": ((1.0, 1.0), (0.5, 2.0), (1.0, 0.0), (4.0, 1.0))}


class _Model(Module):
    """z = x + mlp(norm(x)), in some calls + spare(x); with experts z + expert(z), each token's by
    its choice."""

    def __init__(self, case: Case, groups: Groups) -> None:
        super().__init__()
        shape, arguments = case.shape, common(case, groups)
        plain = {n: arguments[n] for n in ("sequence_parallel", "dtype") if n in arguments}
        self.groups, self.sequence_parallel = groups, case.layout.sequence_parallel
        self.norm = RMSNorm(shape["hidden"], **plain)
        self.spare = RMSNorm(shape["hidden"], **plain) if case.options.get("spare") else None
        self.mlp = MLP(shape["hidden"], ffn=shape["ffn"], **arguments)
        self.experts = None
        if "experts" in shape:
            self.dispatch = make_dispatcher("all_to_all", top_k=1, groups=groups)
            self.experts = Experts(
                shape["hidden"],
                ffn=shape["ffn"],
                num_experts=shape["experts"],
                ep_group=groups.ep,
                etp_group=groups.etp,
                init=arguments["init"],
                dtype=arguments["dtype"],
            )
            self.num_experts = shape["experts"]

    def forward(self, x: Tensor, choice: Tensor | None, *, spare: bool) -> Tensor:
        """Whole tokens over tp, of tokens that sequence parallelism may split."""
        y = x + self.mlp(self.norm(x))
        if spare:
            assert self.spare is not None
            y = y + self.spare(x)
        if self.experts is not None:
            assert choice is not None
            y = y + self._routed(y.flatten(0, 1), choice.flatten()).view(y.shape)
        return _whole(y, self.groups) if self.sequence_parallel else y

    def _routed(self, tokens: Tensor, choice: Tensor) -> Tensor:
        apart = self.groups.size("tp") > 1 and not self.sequence_parallel
        if apart:
            tokens = scatter_to_sequence_parallel_region(tokens, group=self.groups.tp)
            choice = split(choice, dim=0, group=self.groups.tp)
        chosen = one_hot(choice, self.num_experts).bool()
        dispatched = self.dispatch(tokens, chosen)
        assert self.experts is not None
        outputs = self.experts(dispatched.tokens, dispatched.counts)
        y = dispatched.combine(outputs, chosen.to(tokens.dtype))
        return _whole(y, self.groups) if apart else y


def _whole(y: Tensor, groups: Groups) -> Tensor:
    return gather_from_sequence_parallel_region(
        y, group=groups.tp, tensor_parallel_output_grad=False
    )


class TrainingSubject:
    """Trains in its forward pass. Data parallelism and the optimizer begin there, because only then
    the parameters are those of the case."""

    def __init__(self, case: Case, groups: Groups) -> None:
        self.case, self.groups = case, groups
        self.model = _Model(case, groups)
        frozen = str(case.options.get("frozen") or "")
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not frozen or not name.startswith(frozen))
        self.bucket = case.options.get("bucket")
        self.loss_scale = loss_scale_of(case)
        self.schedule = schedule_of(case)

    def parameters(self) -> Mapping[str, tuple[Parameter, Placements]]:
        """Every parameter by its name, with the placement that its attributes say."""
        return {name: (p, _placements(p)) for name, p in self.model.named_parameters()}

    def forward(self, inputs: Tensors) -> Tensors:
        """All steps; what is told of each, stacked."""
        data_parallel = DataParallel(
            self.model,
            groups=self.groups,
            bucket_size=self.bucket,  # type: ignore[arg-type]
            **switches(self.case, "overlap", "distributed"),
        )
        optimizer = _optimizer(self.case, self.model, data_parallel, self.groups, self)
        told: dict[str, list[Tensor]] = {}
        after: list[dict[str, Tensor]] = []
        for step in range(self.case.shape["steps"]):
            mark_step(step)
            mine = {name: tensor[step] for name, tensor in inputs.items()}
            found = self._step(step, mine, data_parallel, optimizer, after)
            for name, value in found.items():
                told.setdefault(name, []).append(value)
        data_parallel.finish_parameters()
        self._look(after)
        return {name: torch.stack(values) for name, values in (told | new_values(after)).items()}

    def finish_gradients(self) -> None:
        """Nothing: every step does."""

    def _look(self, after: list[dict[str, Tensor]]) -> None:
        after.append({n: p.detach().clone() for n, p in self.model.named_parameters()})

    def _step(
        self,
        step: int,
        inputs: Tensors,
        data_parallel: DataParallel,
        optimizer: Optimizer,
        after: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        data_parallel.zero_gradients()
        scale = 1.0 if optimizer.loss_scale is None else optimizer.loss_scale.value
        rounds, total = self.case.shape["rounds"], data_parallel.zero
        for index in range(rounds):
            mine = {name: each[index] for name, each in inputs.items() if name != "overflow"}
            loss = self._loss(mine, spare=reads_spare(self.case, step, index))
            if index == 0:
                self._look(after)
            total = total + loss.detach()
            scaled = optimizer.scaled(loss)
            if inputs["overflow"].any():
                scaled = scaled * math.inf
            if index + 1 < rounds:
                with data_parallel.no_sync():
                    scaled.backward()
            else:
                scaled.backward()
        loss, tokens = sum_over_tokens(total, inputs["mask"].sum(), group=self.groups.dp_cp)
        finalise_gradients(data_parallel, tp_group=self.groups.tp, tokens=tokens)
        gradients = self._gradients(data_parallel, scale)
        done = optimizer.step()
        found = {
            name: torch.zeros_like(each) if done.skipped else each
            for name, each in gradients.items()
        }
        report: dict[str, Any] = {"scale": scale, "skipped": done.skipped, "rates": done.rates}
        found |= {name: torch.tensor(v, dtype=torch.float64) for name, v in report.items()}
        return found | {"loss": loss / tokens.clamp_min(1), "norm": done.norm}

    def _loss(self, inputs: Tensors, *, spare: bool) -> Tensor:
        """The sum over this rank's tokens that count."""
        y = self.model(inputs["x"], inputs.get("choice"), spare=spare)
        away = y - inputs["wanted"]
        away = away.to(torch.promote_types(away.dtype, torch.float32))
        loss: Tensor = (0.5 * away.square().mean(-1) * inputs["mask"]).sum()
        return loss

    def _gradients(self, data_parallel: DataParallel, scale: float) -> dict[str, Tensor]:
        """Main gradients without the scale; of shards, zeros around them."""
        found = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            whole = parameter.main_grad.detach()  # type: ignore[attr-defined]
            if data_parallel.distributed:
                whole = shards_only(parameter, data_parallel)
            found[f"gradient {name}"] = whole / scale
        return found


def shards_only(parameter: Parameter, data_parallel: DataParallel) -> Tensor:
    """The main gradient of a parameter, with zeros where another rank has the sum."""
    whole = parameter.main_grad.detach()  # type: ignore[attr-defined]
    kept = torch.zeros_like(whole).view(-1)
    for share in data_parallel.shares():
        if share.parameter is parameter:
            kept[share.start : share.start + share.gradient.numel()] = share.gradient
    return kept.view(whole.shape)


def _placements(parameter: Parameter) -> Placements:
    if not of_expert(parameter):
        return placements_of(parameter)
    return {"ep": Shard(0), **placements_of(parameter, axis="etp")}


def _optimizer(
    case: Case,
    model: Module,
    data_parallel: DataParallel,
    groups: Groups,
    subject: TrainingSubject,
) -> Optimizer:
    options, clip = case.options, case.options.get("clip")
    return Optimizer(
        data_parallel,
        groups=groups,
        parameter_groups=_parameter_groups(model, str(options.get("groups", "one"))),
        rule=rule_of(case),
        schedule=subject.schedule,
        weight_decay=number(case, "weight_decay", 0.0),
        max_norm=None if clip is None else float(clip),
        norm_order=number(case, "norm", 2.0),
        loss_scale=subject.loss_scale,
    )


def rule_of(case: Case) -> Rule:
    """The update rule that the options of a case describe."""
    if case.options.get("optimizer") == "adam":
        return AdamW()
    return SGD(momentum=number(case, "momentum", 0.0))


def _parameter_groups(model: Module, kind: str) -> list[ParameterGroup]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    members: list[list[Parameter]] = [[] for _ in FACTORS.get(kind, FACTORS["several"])]
    for name, parameter in trained.items():
        index = 0
        if len(members) > 1 and name.endswith("fc2.weight"):
            index = 1
        elif len(members) > 1 and (name.endswith("bias") or name.startswith("norm")):
            index = 2
        members[index].append(parameter)
    if kind == "twice":
        members[3] = list(trained.values())[:1]
    elif kind == "incomplete":
        members[0] = []
    return [
        ParameterGroup(parameters=each, lr_multiplier=lr, weight_decay_multiplier=decay)
        for each, (lr, decay) in zip(members, FACTORS.get(kind, FACTORS["several"]), strict=True)
    ]


def loss_scale_of(case: Case) -> LossScale | None:
    """The loss scale that the options of a case describe."""
    kind = case.options.get("loss_scale", "none")
    if kind == "static":
        return StaticLossScale(value=2.0)
    if kind == "dynamic":
        hysteresis = int(number(case, "hysteresis", 1))
        return DynamicLossScale(
            value=4.0,
            minimum=number(case, "minimum_scale", 1.0),
            growth_interval=2,
            hysteresis=hysteresis,
        )
    return None


def schedule_of(case: Case) -> Schedule:
    """The learning rates that the options of a case describe."""
    decay = case.options.get("decay")
    return Schedule(
        style=str(case.options.get("schedule", "constant")),
        maximum=MAXIMUM,
        minimum=MAXIMUM * number(case, "minimum", 0.0),
        warmup_steps=int(number(case, "warmup", 0)),
        decay_steps=None if decay is None else int(decay),
        annealing_steps=int(number(case, "annealing", 0)),
    )


def number(case: Case, name: str, default: float) -> float:
    """An option that is a number."""
    value = case.options.get(name)
    return default if value is None else float(value)


def learning_rates(case: Case, groups: Groups) -> OperationSubject:
    """`Schedule`."""
    schedule = schedule_of(case)
    before = int(case.options.get("step") or 0)
    rates = [schedule.rate(before + step) for step in range(case.shape["steps"])]
    return OperationSubject(lambda inputs: {"rates": torch.tensor(rates, dtype=torch.float64)})


BUILDERS: Mapping[str, Builder] = {
    "learning_rates": learning_rates,
    "training_steps": TrainingSubject,
}
