"""megatron-core's random streams, dropout, recomputation and initialisation as subjects.

What of these is its caller's in Megatron is done as Megatron-LM does it: the seed of a stage, the
fork of the tensor-parallel stream around hidden states under sequence parallelism, and the loops
over layers of `TransformerBlock`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor
from torch.nn import Module, ModuleList

from verify.case import Case
from verify.checks.stream_laws import Draw
from verify.oracle.initialise import STD
from verify.oracle.recompute import Plan, plan_of
from verify.oracle.terms import in_training
from verify.targets.megatron_core.subjects import (
    ModuleSubject,
    OperationSubject,
    Tensors,
    config_of,
)

OPTIONS: Mapping[str, frozenset[str]] = {
    "random_streams": frozenset({"misuse"}),
    "dropout": frozenset({"region", "dropout", "bias", "training"}),
    "recomputed_block": frozenset({"dropout", "recompute"}),
    "recomputed_function": frozenset(
        {"autocast", "autocast_backward", "lies", "distributed", "changed"}
    ),
    "initialisation": frozenset({"way", "rule", "activation"}),
}
_NAMES = {"linear_fc1": "fc1", "linear_fc2": "fc2"}
_PARTS = MLPSubmodules(
    linear_fc1=tensor_parallel.ColumnParallelLinear, linear_fc2=tensor_parallel.RowParallelLinear
)


def streams() -> Mapping[str, Draw]:
    """How to draw from the stream of each region that Megatron knows."""
    tracker = get_cuda_rng_tracker()
    forks: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "replicated": nullcontext,
        "tensor-parallel": tracker.fork,
        "expert": partial(tracker.fork, get_expert_parallel_rng_tracker_name()),
    }

    def draw(fork: Callable[[], AbstractContextManager[Any]], count: int) -> Tensor:
        with fork():
            return torch.rand(count, dtype=torch.float64, device="cuda")

    return {region: partial(draw, fork) for region, fork in forks.items()}


def seed(number: int) -> None:
    """Seed this rank's streams, the default one too, as Megatron-LM's training script does: a stage
    has a seed of its own."""
    own = number + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(own)
    tensor_parallel.model_parallel_cuda_manual_seed(own)


class Streams:
    """`CudaRNGStatesTracker` of this rank."""

    def add(self, name: str, *, seed: int) -> None:
        """Add a stream."""
        get_cuda_rng_tracker().add(name, seed)

    def fork(self, name: str) -> AbstractContextManager[Any]:
        """Draw from a stream inside."""
        forked: AbstractContextManager[Any] = get_cuda_rng_tracker().fork(name)
        return forked

    def states(self) -> dict[str, Tensor]:
        """Those of all streams but the default one."""
        return {name: state.clone() for name, state in get_cuda_rng_tracker().get_states().items()}

    def set_states(self, states: Mapping[str, Tensor]) -> None:
        """Put them back."""
        get_cuda_rng_tracker().set_states(dict(states))


def random_states() -> Mapping[str, Tensor]:
    """The state of every stream of this rank."""
    return {"default": torch.cuda.get_rng_state(), **get_cuda_rng_tracker().get_states()}


def _forked(case: Case) -> AbstractContextManager[Any]:
    """What `TransformerBlock` runs its layers in."""
    return get_cuda_rng_tracker().fork() if case.layout.sequence_parallel else nullcontext()


class _Dropout(OperationSubject):
    def random_states(self) -> Mapping[str, Tensor]:
        """The state of every stream."""
        return random_states()


def dropout(case: Case) -> OperationSubject:
    """The unfused `bias_dropout_add`, in the tensor-parallel stream where parts are dropped."""
    training = in_training(case)
    p = float(case.options.get("dropout", 0.25) or 0.0)
    add = get_bias_dropout_add(training, fused=False)
    tensor_parallel_region = case.options.get("region") == "tensor-parallel"

    def call(inputs: Tensors) -> Tensors:
        parts = get_cuda_rng_tracker().fork() if tensor_parallel_region else _forked(case)
        with parts:
            return {"y": add((inputs["x"], inputs.get("bias")), inputs["residual"], p)}

    return _Dropout(call)


class _Layer(Module):
    """x + dropout(mlp(x) + bias), as the second half of a `TransformerLayer` without its norm."""

    def __init__(self, config: TransformerConfig, ffn: int) -> None:
        super().__init__()
        self.mlp = MLP(config, _PARTS, ffn_hidden_size=ffn)
        self.p = config.hidden_dropout

    def forward(self, x: Tensor) -> Tensor:
        return get_bias_dropout_add(True, fused=False)(self.mlp(x), x, self.p)


class _Block(ModuleSubject):
    def _name(self, name: str) -> str:
        """`0.mlp.linear_fc1.weight`, or without `mlp`, is the contract's `0.fc1.weight`."""
        layer, *_, linear, last = name.split(".")
        return f"{layer}.{_NAMES[linear]}.{last}"

    def random_states(self) -> Mapping[str, Tensor]:
        """The state of every stream."""
        return random_states()


def recomputed_block(case: Case) -> ModuleSubject:
    """Layers under `tensor_parallel.checkpoint`, in the runs of `TransformerBlock`."""
    config = _mlp_config(case, hidden_dropout=float(case.options.get("dropout", 0.25) or 0.0))
    count, plan = case.shape["layers"], plan_of(case)
    layers = ModuleList(_Layer(config, case.shape["ffn"]) for _ in range(count))

    def run(start: int, stop: int, x: Tensor) -> Tensor:
        for layer in layers[start:stop]:
            x = layer(x)
        return x

    def call(inputs: Tensors) -> Tensors:
        # An activation, as a block gets one: checkpoint cuts a distributed input where it lies.
        x = inputs["x"].clone()
        with _forked(case):
            for start, stop, again in _runs(plan, count):
                own = partial(run, start, stop)
                if again and plan is not None:
                    x = tensor_parallel.checkpoint(own, plan.distributed, x)
                else:
                    x = own(x)
        return {"y": x}

    return _Block(layers, config, call)


def checkpoint(
    function: Callable[..., Tensor], x: Tensor, mask: Tensor, *, distributed: bool
) -> Tensor:
    """`tensor_parallel.checkpoint`, which cuts a distributed input where it lies: of a copy."""
    x = x.clone() if distributed else x
    found: Tensor = tensor_parallel.checkpoint(function, distributed, x, mask)
    return found


def _runs(plan: Plan | None, layers: int) -> list[tuple[int, int, bool]]:
    """Runs of layers, each with whether it is computed again."""
    if plan is None:
        return [(0, layers, False)]
    if plan.method == "uniform":
        starts = range(0, layers, plan.layers)
        return [(start, min(start + plan.layers, layers), True) for start in starts]
    return [(i, i + 1, i < plan.layers) for i in range(layers)]


def initialisation(case: Case) -> ModuleSubject:
    """MLPs as Megatron builds them from the case's seed, on the CPU and then cut, or each rank's
    part."""
    seed(case.seed)
    gated = case.options.get("activation") == "swiglu"
    config = _mlp_config(
        case,
        gated_linear_unit=gated,
        activation_func=torch.nn.functional.silu if gated else torch.nn.functional.gelu,
        num_layers=case.shape["layers"],
        init_method_std=STD,
        use_cpu_initialization=case.options.get("way", "whole") == "whole",
    )
    ffn = case.shape["ffn"]
    layers = ModuleList(
        MLP(config, _PARTS, ffn_hidden_size=ffn) for _ in range(case.shape["layers"])
    )
    return _Block(layers, config, lambda inputs: {})


def _mlp_config(case: Case, **given: Any) -> TransformerConfig:
    given = {"activation_func": torch.nn.functional.gelu, **given}
    return config_of(
        case, hidden_size=case.shape["hidden"], ffn_hidden_size=case.shape["ffn"], **given
    )


def lacks(case: Case) -> str | None:
    """Why megatron-core or this adapter cannot do a case of these concepts; None where it can."""
    layout, options = case.layout, case.options
    if case.concept == "dropout" and not 0 <= float(options.get("dropout", 0.0) or 0.0) < 1:
        return "bias_dropout_add leaves it to torch what is a probability"
    if options.get("misuse") == "default":
        return "CudaRNGStatesTracker is not told the seed of the default generator"
    if options.get("misuse") in ("lacking", "foreign"):
        return "set_states says that it does not compare what it is given"
    if options.get("misuse") in ("told", "given"):
        return "CudaRNGStatesTracker gives direct pointers to its states, as it says"
    if case.concept == "dropout" and "misfit" in options:
        return "bias_dropout_add leaves it to broadcasting to make inputs fit, as its source says"
    if case.concept == "initialisation":
        if "num_experts" in case.shape:
            return "no adapter for experts"
        if options.get("rule", "transformer") != "transformer":
            return f"no rule {options['rule']}"
        if options.get("way", "whole") == "whole" and layout.pp > 1:
            return "its initialisation on the CPU depends on the stage"
    if "changed" in options:
        return "CheckpointFunction differentiates whatever the function computes the second time"
    plan = plan_of(case) if case.concept == "recomputed_block" else None
    if plan is not None:
        if plan.method not in ("uniform", "block"):
            return f"no adapter for the recomputation {plan.method}"
        if not 1 <= plan.layers <= case.shape["layers"]:
            return "the loops over layers are TransformerBlock's, which this adapter does not run"
        elements = case.shape["sequence"] * case.shape["batch"] * case.shape["hidden"]
        if plan.distributed and elements % layout.tp:
            return "checkpoint cuts a distributed input short where it does not divide"
        if plan.distributed and layout.sequence_parallel:
            return "only TransformerConfig refuses to distribute under sequence parallelism"
    return None


BUILDERS: Mapping[str, Callable[[Case], ModuleSubject | OperationSubject]] = {
    "dropout": dropout,
    "recomputed_block": recomputed_block,
    "initialisation": initialisation,
}
