"""Training steps of megatron-core: its data parallelism, optimizers and schedules around its MLP.

What is around them is this adapter's: the loop, a norm and the loss, as a training script has them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import Parameter, RMSNorm

from verify.case import Case
from verify.cluster.history import mark_step
from verify.placement import Placements
from verify.targets.megatron_attributes import placements_of
from verify.targets.megatron_core.subjects import OperationSubject, Tensors, config_of
from verify.targets.training_steps import new_values, reads_spare

_RATES = frozenset({"schedule", "warmup", "decay", "annealing", "minimum"})
OPTIONS: Mapping[str, frozenset[str]] = {
    "learning_rates": _RATES | {"step"},
    "training_steps": _RATES
    | {
        "optimizer",
        "momentum",
        "weight_decay",
        "clip",
        "frozen",
        "spare",
        "bucket",
        "distributed",
        "overlap",
    },
}
MAXIMUM, NO_CLIPPING, NO_END = 2.0**-8, 1e30, 10**6
# Weights of one dimension and biases too; versions before 0.16 are told so by a condition.
_ALL_DECAY: Mapping[str, Any] = (
    {"config_overrides": {}}
    if "config_overrides" in signature(get_megatron_optimizer).parameters
    else {"no_weight_decay_cond": lambda name, parameter: False}
)
_STYLES = {"wsd": "WSD", "inverse_square_root": "inverse-square-root"}


class _Model(MegatronModule):
    def __init__(self, config: TransformerConfig, *, spare: bool) -> None:
        super().__init__(config)
        self.norm = _norm(config)
        self.spare = _norm(config) if spare else None
        parts = MLPSubmodules(
            linear_fc1=tensor_parallel.ColumnParallelLinear,
            linear_fc2=tensor_parallel.RowParallelLinear,
        )
        self.mlp = MLP(config, parts, ffn_hidden_size=config.ffn_hidden_size)

    def forward(self, x: Tensor, *, spare: bool) -> Tensor:
        """x + mlp(norm(x)), in some calls + spare(x), whole over tp."""
        y, bias = self.mlp(self.norm(x))
        y = x + y + bias
        if spare:
            assert self.spare is not None
            y = y + self.spare(x)
        if not self.config.sequence_parallel:
            return y
        return mappings.gather_from_sequence_parallel_region(y, tensor_parallel_output_grad=False)


def _norm(config: TransformerConfig) -> RMSNorm:
    norm = RMSNorm(config.hidden_size, eps=config.layernorm_epsilon, dtype=config.params_dtype)
    # As Megatron's fused norms mark their weights.
    norm.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


class TrainingSubject:
    """Trains in its forward pass, where the parameters are those of the case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.config = config_of(
            case,
            hidden_size=case.shape["hidden"],
            ffn_hidden_size=case.shape["ffn"],
            calculate_per_token_loss=True,
            bf16=case.dtype == "bfloat16",
            context_parallel_size=case.layout.cp,
        )
        self.model = _Model(self.config, spare=bool(case.options.get("spare")))
        frozen = str(case.options.get("frozen") or "")
        for name, parameter in self._named():
            parameter.requires_grad_(not frozen or not name.startswith(frozen))

    def parameters(self) -> Mapping[str, tuple[Parameter, Placements]]:
        """Every parameter by the contract's name, with the placement that its attributes say."""
        return {name: (p, placements_of(p)) for name, p in self._named()}

    def forward(self, inputs: Tensors) -> Tensors:
        """All steps; what is told of each, stacked."""
        on = {n: bool(self.case.options.get(n, False)) for n in ("distributed", "overlap")}
        model = DistributedDataParallel(
            self.config, data_parallel_config(self.case, self.config), self.model
        )
        optimizer = optimizer_of(self.case, [model])
        schedule = schedule_of(self.case, optimizer)
        told: dict[str, list[Tensor]] = {}
        after: list[dict[str, Tensor]] = []
        for step in range(self.case.shape["steps"]):
            mark_step(step)
            mine = {name: tensor[step] for name, tensor in inputs.items()}
            found = self._step(step, mine, model, optimizer, schedule, after)
            for name, value in found.items():
                told.setdefault(name, []).append(value)
        if on["distributed"] and on["overlap"]:
            model.start_param_sync(force_sync=True)
        self._look(after)
        # The optimizer in float32 has left the gradients of the last step with the parameters.
        optimizer.zero_grad()
        return {name: torch.stack(values) for name, values in (told | new_values(after)).items()}

    def finish_gradients(self) -> None:
        """Nothing: every step does."""

    def _named(self) -> list[tuple[str, Parameter]]:
        return [(n.replace("linear_", ""), p) for n, p in self.model.named_parameters()]

    def _look(self, after: list[dict[str, Tensor]]) -> None:
        after.append({name: p.detach().clone() for name, p in self._named()})

    def _step(
        self,
        step: int,
        inputs: Tensors,
        model: DistributedDataParallel,
        optimizer: Any,
        schedule: OptimizerParamScheduler,
        after: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        rounds, losses = self.case.shape["rounds"], []
        for index in range(rounds):
            last = index + 1 == rounds
            with contextlib.nullcontext() if last else model.no_sync():
                y = model(inputs["x"][index], spare=reads_spare(self.case, step, index))
                if index == 0:
                    self._look(after)
                away = y - inputs["wanted"][index]
                away = away.to(torch.promote_types(away.dtype, torch.float32))
                loss = (0.5 * away.square().mean(-1) * inputs["mask"][index]).sum()
                losses.append(loss.detach().double())
                optimizer.scale_loss(loss).backward()
        tokens = inputs["mask"].sum()
        told = torch.stack([torch.stack(losses).sum(), tokens.double()])
        dist.all_reduce(told, group=parallel_state.get_data_parallel_group(True))
        finalize_model_grads([model], tokens.clone())
        gradients = main_gradients(
            [model],
            [parameter for _, parameter in self._named()],
            distributed=bool(self.case.options.get("distributed")),
        )
        found = {f"gradient {n}": gradients[p] for n, p in self._named() if p in gradients}
        rate = optimizer.param_groups[0]["lr"]
        _, norm, _ = optimizer.step()
        schedule.step(1)
        report = {"scale": 1.0, "skipped": 0.0, "rates": [rate]}
        found |= {name: torch.tensor(v, dtype=torch.float64) for name, v in report.items()}
        wide = torch.promote_types(self.config.params_dtype, torch.float32)
        return found | {"loss": told[0] / told[1].clamp_min(1), "norm": torch.tensor(norm).to(wide)}


def main_gradients(
    models: Sequence[DistributedDataParallel],
    parameters: Collection[Parameter],
    *,
    distributed: bool,
) -> dict[Parameter, Tensor]:
    """The main gradients of what is trained; of a distributed optimizer's shards, zeros around
    them."""
    if not distributed:
        return {each: _main(each) for each in parameters if each.requires_grad}
    found = {}
    everyone = parallel_state.get_data_parallel_group(True)
    replicas = parallel_state.get_expert_data_parallel_group()
    buffers = [(each, everyone) for model in models for each in model.buffers]
    buffers += [(each, replicas) for model in models for each in model.expert_parallel_buffers]
    for buffer, group in buffers:
        kept = torch.zeros_like(buffer.grad_data)
        for bucket in buffer.buckets:
            length = bucket.grad_data.numel() // group.size()
            start = bucket.offset + group.rank() * length
            kept[start : start + length] = buffer.grad_data[start : start + length]
        for parameter in parameters:
            if parameter in buffer.param_index_map:
                start, stop, _ = buffer.param_index_map[parameter]
                found[parameter] = kept[start:stop].view(parameter.shape)
    return found


def _main(parameter: Parameter) -> Tensor:
    gradient: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return gradient.detach().clone()


def data_parallel_config(
    case: Case, config: TransformerConfig, **given: Any
) -> DistributedDataParallelConfig:
    """The data parallelism that a case asks for, and what is `given` besides."""
    on = {n: bool(case.options.get(n, False)) for n in ("distributed", "overlap")}
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.bf16,
        overlap_grad_reduce=on["overlap"],
        overlap_param_gather=on["overlap"] and on["distributed"],
        use_distributed_optimizer=on["distributed"],
        bucket_size=case.options.get("bucket"),
        **given,
    )


def optimizer_of(case: Case, models: list[DistributedDataParallel]) -> Any:
    """The optimizer that a case asks for, of these models."""
    options = case.options
    distributed = bool(options.get("distributed", False))
    config = OptimizerConfig(
        optimizer=str(options.get("optimizer", "sgd")),
        lr=MAXIMUM,
        min_lr=MAXIMUM * _number(case, "minimum"),
        weight_decay=_number(case, "weight_decay"),
        sgd_momentum=_number(case, "momentum"),
        clip_grad=_number(case, "clip") or NO_CLIPPING,
        bf16=case.dtype == "bfloat16",
        params_dtype=getattr(torch, case.dtype),
        use_distributed_optimizer=distributed,
        overlap_param_gather=distributed and bool(options.get("overlap", False)),
    )
    return get_megatron_optimizer(config, models, **_ALL_DECAY, use_gloo_process_groups=False)


class _Groups:
    """What a schedule knows of an optimizer."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{}]


def schedule_of(case: Case, optimizer: Any) -> OptimizerParamScheduler:
    """The schedule of learning rates that a case asks for."""
    style, decay = str(case.options.get("schedule", "constant")), _number(case, "weight_decay")
    end = NO_END if style == "constant" else int(_number(case, "decay"))
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=MAXIMUM,
        min_lr=MAXIMUM * _number(case, "minimum"),
        lr_warmup_steps=int(_number(case, "warmup")),
        lr_decay_steps=end,
        lr_decay_style=_STYLES.get(style, style),
        start_wd=decay,
        end_wd=decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=int(_number(case, "annealing")),
        lr_wsd_decay_style="linear",
    )


def _number(case: Case, name: str) -> float:
    value = case.options.get(name)
    return 0.0 if value is None else float(value)


def learning_rates(case: Case) -> OperationSubject:
    """`OptimizerParamScheduler`, of an optimizer without parameters."""
    groups = _Groups()
    schedule, rates = schedule_of(case, groups), []
    schedule.step(int(case.options.get("step") or 0))
    for _ in range(case.shape["steps"]):
        rates.append(groups.param_groups[0]["lr"])
        schedule.step(1)
    return OperationSubject(lambda inputs: {"rates": torch.tensor(rates, dtype=torch.float64)})


BUILDERS: dict[str, Callable[[Case], Any]] = {
    "learning_rates": learning_rates,
    "training_steps": TrainingSubject,
}


def lacks(case: Case) -> str | None:
    """Why megatron-core or this adapter cannot do a case; None where it can."""
    return training_lacks(case) if case.concept in BUILDERS else None


def training_lacks(case: Case) -> str | None:
    """Why there is no adapter for how a case trains."""
    if _number(case, "step") < 0:
        return "a schedule steps by an increment, and is not asked for a step"
    style, warm = case.options.get("schedule", "constant"), _number(case, "warmup")
    if style != "constant" and warm >= _number(case, "decay"):
        return "a schedule has to decay after its warm-up"
    if case.concept == "learning_rates":
        return None
    if case.concept == "training_steps" and "experts" in case.shape:
        return "no adapter for the training of experts alone"
    if case.dtype == "float16":
        return "float16 always has a loss scale, for which there is no adapter"
    if case.dtype == "float64":
        return "gradients are clipped, and their norm is told, in float32 only"
    if case.options.get("spare") and case.options.get("overlap", False):
        return "with overlap the last backward pass of a step has to reach all parameters"
    if case.options.get("distributed", False) and case.options.get("optimizer", "sgd") != "adam":
        return "the distributed optimizer is of Adam only"
    return None
