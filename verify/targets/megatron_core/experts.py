"""megatron-core's mixture of experts as subjects: router, dispatchers, layer, bias of experts.

Experts are `SequentialMLP` of the local specification, its weights stacked for the contract and
handed to each expert as views. What its training loop does around the layer is done here as there:
`finalize_model_grads` sums over tp and moves the bias of experts; `DistributedDataParallel` reduces
over dp and cp, or over edp where a parameter's mark `allreduce` is False, and is a sum here where
there it is a mean; so the auxiliary losses, whose scale the schedules set to the number of context
parallel ranks, have here the scale 1 / dp, and all their coefficients are the case's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module, Parameter
from torch.nn.functional import gelu, silu

from verify.case import Case
from verify.placement import Placements, Shard
from verify.targets.megatron_attributes import placements_of
from verify.targets.megatron_core.subjects import (
    ModuleSubject,
    OperationSubject,
    Tensors,
    config_of,
)

AUXILIARY = ("balance", "coefficient", "z_loss")
_ROUTING = {
    "score",
    "pre_softmax",
    "scaling",
    "expert_bias",
    "capacity",
    "drop",
    *AUXILIARY,
    "loss_scale",
}
# In versions before 0.15 the update of biases begins to count anew by itself.
_FINALISATION = import_module("megatron.core.distributed.finalize_model_grads")
OPTIONS: Mapping[str, frozenset[str]] = {
    "moe_router": frozenset(_ROUTING),
    "moe_layer": frozenset({*_ROUTING, "dispatcher", "activation"}),
    "moe_dispatch": frozenset({"dispatcher", "dropped"}),
    "moe_expert_bias": frozenset({"recomputed"}),
}
_RATE = 0.125
_LEVELS = {
    "none": "none",
    "sequence": "seq_aux_loss",
    "batch": "aux_loss",
    "global": "global_aux_loss",
}
_TRACKED = {
    "sequence": "seq_load_balancing_loss",
    "batch": "load_balancing_loss",
    "global": "global_load_balancing_loss",
}
_ACTIVATIONS = {"gelu": gelu, "swiglu": silu}
_DROPS = {"probability": "probs"}
_DISPATCHERS = {
    "all_to_all": token_dispatcher.MoEAlltoAllTokenDispatcher,
    "all_gather": token_dispatcher.MoEAllGatherTokenDispatcher,
}


_NAMES = {
    "router": "router",
    "shared_experts.linear_fc1": "shared.fc1",
    "shared_experts.linear_fc2": "shared.fc2",
}


def expert_arguments(case: Case) -> dict[str, Any]:
    """What a configuration says of the experts of a case."""
    options, shape, layout = case.options, case.shape, case.layout
    drop = str(options.get("drop", "probability"))
    scaling = _number(case, "scaling", 1.0)
    return {
        "num_moe_experts": shape["experts"],
        "moe_router_topk": shape["top_k"],
        "moe_router_dtype": "fp32",
        "moe_router_score_function": options.get("score", "softmax"),
        "moe_router_pre_softmax": bool(options.get("pre_softmax", False)),
        "moe_router_topk_scaling_factor": None if scaling == 1 else scaling,
        "moe_router_enable_expert_bias": bool(options.get("expert_bias", False)),
        "moe_router_num_groups": shape.get("groups"),
        "moe_router_group_topk": shape.get("group_top_k"),
        "moe_expert_capacity_factor": options.get("capacity"),
        "moe_token_drop_policy": _DROPS.get(drop, drop),
        "moe_router_load_balancing_type": _LEVELS[str(options.get("balance", "none"))],
        "moe_aux_loss_coeff": _number(case, "coefficient", 1.0),
        "moe_z_loss_coeff": _number(case, "z_loss", 0.0) or None,
        "moe_token_dispatcher_type": str(options.get("dispatcher", "all_to_all")).replace("_", ""),
        "moe_ffn_hidden_size": shape.get("ffn", 1),
        "moe_shared_expert_intermediate_size": shape.get("shared_ffn"),
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
    }


def name_of(parameter: str) -> str:
    """The contract's name of a parameter of a `MoELayer`: the same of all experts, which begins
    with `experts.`."""
    if found := re.fullmatch(r"experts\.local_experts\.\d+\.linear_(\w+\.\w+)", parameter):
        return f"experts.{found[1]}"
    module, _, last = parameter.rpartition(".")
    return f"{_NAMES[module]}.{last}"


def _configuration(case: Case, **fixed: Any) -> TransformerConfig:
    activation = str(case.options.get("activation", "gelu"))
    given: dict[str, Any] = {
        "hidden_size": case.shape["hidden"],
        "ffn_hidden_size": case.shape.get("ffn", 1),
        "gated_linear_unit": activation == "swiglu",
        "activation_func": _ACTIVATIONS[activation],
        "bias_activation_fusion": False,
        "add_bias_linear": False,
        "num_attention_heads": case.layout.tp,
    }
    return config_of(case, **{**expert_arguments(case), **given, **fixed})


def _number(case: Case, name: str, default: float) -> float:
    return float(case.options.get(name, default))  # type: ignore[arg-type]


class ExpertSubject(ModuleSubject):
    """A module with parameters on both meshes, some of which are the contract's cut up or joined:
    `given` are the contract's, `made` makes Megatron's of them, by Megatron's names."""

    def __init__(
        self,
        module: Module,
        config: TransformerConfig,
        call: Callable[[Tensors], Tensors],
        *,
        given: Mapping[str, tuple[Parameter, Placements]],
    ) -> None:
        super().__init__(module, config, call)
        self.given = given

    def parameters(self) -> Mapping[str, tuple[Parameter, Placements]]:
        """Every parameter by the contract's name, with its placement."""
        return self.given

    def finish_gradients(self) -> None:
        """The sums that `finalize_model_grads` and `DistributedDataParallel` make."""
        super().finish_gradients()
        everyone = parallel_state.get_data_parallel_group(with_context_parallel=True)
        replicas = parallel_state.get_expert_data_parallel_group()
        for parameter, _ in self.given.values():
            if parameter.grad is not None:
                group = everyone if getattr(parameter, "allreduce", True) else replicas
                dist.all_reduce(parameter.grad, group=group)


def _losses(case: Case) -> dict[str, Tensor]:
    """This rank's summands of the losses that Megatron tracked."""
    tracker, level = moe_utils.get_moe_layer_wise_logging_tracker(), case.options.get("balance")
    dp, shared = case.layout.dp, parallel_state.get_tensor_and_context_parallel_group().size()
    found = {}
    if level in _TRACKED:
        value = tracker[_TRACKED[str(level)]]["values"][0] * _number(case, "coefficient", 1.0)
        found["balance_loss"] = value if level == "global" else value / dp
    if z := _number(case, "z_loss", 0.0):
        found["z_loss"] = tracker["z_loss"]["values"][0] * z / (shared * dp)
    return found


def _set_up(case: Case, router: TopKRouter, inputs: Tensors) -> None:
    router.set_layer_number(1)
    scale = _number(case, "loss_scale", 1.0) / case.layout.dp
    moe_utils.MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(scale))
    if "expert_bias" in inputs:
        router.expert_bias.copy_(inputs["expert_bias"])


def _router_of(config: TransformerConfig) -> TopKRouter:
    return TopKRouter(config=config, pg_collection=moe_utils.get_default_pg_collection())


def moe_router(case: Case) -> ExpertSubject:
    """`TopKRouter`, with moe_router_dtype fp32."""
    config = _configuration(case)
    router = _router_of(config)

    def call(inputs: Tensors) -> Tensors:
        _set_up(case, router, inputs)
        weights, chosen = router(inputs["x"])
        shape = (*inputs["x"].shape[:2], -1)
        found = {"weights": weights.view(shape), "chosen": chosen.to(weights.dtype).view(shape)}
        return found | _losses(case)

    return ExpertSubject(router, config, call, given={"weight": (router.weight, {})})


def moe_expert_bias(case: Case) -> ExpertSubject:
    """`TopKRouter`, its bias moved by what `finalize_model_grads` calls for that."""
    config = _configuration(
        case,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=_RATE,
    )
    router = _router_of(config)

    def step(x: Tensor) -> Tensor:
        if case.options.get("recomputed", False):
            with torch.no_grad():
                router(x)
        weights, _ = router(x)
        return weights.view(*x.shape[:2], -1)

    def call(inputs: Tensors) -> Tensors:
        found: dict[str, list[Tensor]] = {"weights": [], "counts": [], "biases": []}
        for x in inputs["x"]:
            found["weights"].append(step(x))
            found["counts"].append(router.local_tokens_per_expert.clone())
            _update_router_expert_bias([router], config)
            reset = getattr(_FINALISATION, "reset_model_temporary_tensors", None)
            if reset is not None:
                reset(config, [router])
            found["biases"].append(router.expert_bias.clone())
        return {name: torch.stack(values) for name, values in found.items()}

    return ExpertSubject(router, config, call, given={"weight": (router.weight, {})})


def moe_layer(case: Case) -> ExpertSubject:
    """`MoELayer` of the local specification."""
    config = _configuration(case)
    parts = get_moe_module_spec(
        use_te=False, num_experts=case.shape["experts"], moe_grouped_gemm=False
    ).submodules
    layer = MoELayer(config, parts, layer_number=1)
    given = _stacked(layer)

    def call(inputs: Tensors) -> Tensors:
        _set_up(case, layer.router, inputs)
        made = _made({name: parameter for name, (parameter, _) in given.items()})
        y, _ = functional_call(layer, made, (inputs["x"],))
        return {"y": y} | _losses(case)

    return ExpertSubject(layer, config, call, given=given)


def _stacked(layer: MoELayer) -> dict[str, tuple[Parameter, Placements]]:
    """The contract's parameters of a layer, those of experts stacked."""
    members: dict[str, list[Parameter]] = {}
    for name, parameter in layer.named_parameters():
        members.setdefault(name_of(name), []).append(parameter)
    found: dict[str, tuple[Parameter, Placements]] = {}
    for name, weights in members.items():
        if not name.startswith("experts."):
            found[name] = (weights[0], placements_of(weights[0]))
            continue
        stacked = Parameter(torch.stack([weight.detach() for weight in weights]))
        stacked.allreduce = weights[0].allreduce  # type: ignore[attr-defined]
        (cut,) = placements_of(weights[0]).values()
        assert isinstance(cut, Shard)
        found[name] = (stacked, {"ep": Shard(0), "etp": Shard(cut.dim + 1, cut.stride)})
    return found


def _made(given: Tensors) -> dict[str, Tensor]:
    """The parameters of each expert, of the contract's stacked ones."""
    return {
        f"experts.local_experts.{i}.linear_{name}.weight": weight
        for name in ("fc1", "fc2")
        for i, weight in enumerate(given[f"experts.{name}.weight"])
    }


def moe_dispatch(case: Case) -> OperationSubject:
    """A token dispatcher around experts that multiply; see the contract."""
    name, experts = str(case.options.get("dispatcher", "all_to_all")), case.shape["experts"]
    # Without a capacity the dispatcher takes every token to have as many experts as its top_k.
    factor = float(experts) if case.options.get("dropped", False) else None
    # No router is built, but the configuration refuses one of a single choice without it.
    config = _configuration(case, moe_expert_capacity_factor=factor, moe_router_pre_softmax=True)
    groups = moe_utils.get_default_pg_collection()
    count = experts // case.layout.ep
    first = count * groups.ep.rank()
    mine = list(range(first, first + count))
    dispatcher = _DISPATCHERS[name](count, mine, config=config, pg_collection=groups)
    table = _table(experts, case.shape["top_k"], dropped=factor is not None)

    def call(inputs: Tensors) -> Tensors:
        x, chosen = inputs["x"], table[inputs["choice"]].flatten(0, 1)
        weights = torch.where(chosen, inputs["weights"].flatten(0, 1), 0.0)
        there, scales = dispatcher.dispatch_preprocess(x.contiguous(), chosen, weights)
        there, scales = dispatcher.token_dispatch(there, scales)
        there, counts, scales = dispatcher.dispatch_postprocess(there, scales)
        factors = torch.tensor(mine, dtype=x.dtype).repeat_interleave(counts).unsqueeze(-1) + 1
        own = torch.arange(x.shape[-1]) % groups.expt_tp.size() == groups.expt_tp.rank()
        back = dispatcher.combine_preprocess(there * factors * own * scales.unsqueeze(-1))
        return {"y": dispatcher.combine_postprocess(dispatcher.token_combine(back))}

    return OperationSubject(call)


def _table(experts: int, top_k: int, *, dropped: bool) -> Tensor:
    counts = range(top_k + 1) if dropped else (top_k,)
    rows = [set(each) for count in counts for each in combinations(range(experts), count)]
    return torch.tensor([[expert in row for expert in range(experts)] for row in rows])


def lacks(case: Case) -> str | None:
    """Why megatron-core or this adapter cannot do a case; None where it can."""
    if case.concept not in OPTIONS or not case.concept.startswith("moe_"):
        return None
    layout = case.layout
    if case.concept != "moe_dispatch" and (reason := routing_lacks(case)):
        return reason
    if case.options.get("activation", "gelu") not in _ACTIVATIONS:
        return f"an activation is a function there, and none is {case.options['activation']}"
    if case.concept == "moe_dispatch" and case.shape["experts"] % layout.ep:
        return "a dispatcher is told which experts it has"
    return None


def routing_lacks(case: Case) -> str | None:
    """Why there is no router, or no layer around it, for the experts of a case."""
    layout, options = case.layout, case.options
    if case.dtype == "float64":
        return "a softmax of router logits is in float32, whatever its input"
    if layout.tp > 1 and not layout.sequence_parallel:
        return "MoELayer refuses to train on tp without sequence parallelism"
    softmax = case.concept != "moe_expert_bias" and options.get("score", "softmax") == "softmax"
    if case.shape["top_k"] == 1 and softmax and not options.get("pre_softmax", False):
        return "a softmax of the one choice is refused; it is always 1"
    return None


BUILDERS: dict[str, Callable[[Case], ModuleSubject | OperationSubject]] = {
    "moe_router": moe_router,
    "moe_layer": moe_layer,
    "moe_dispatch": moe_dispatch,
    "moe_expert_bias": moe_expert_bias,
}
