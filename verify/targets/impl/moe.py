"""impl's mixture of experts as subjects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.nn.init import constant_

from impl.gradients import finish_sequence_parallel_gradients, sum_gradients
from impl.groups import Groups
from impl.moe.layer import MoELayer, make_dispatcher
from impl.moe.router import Choice, Losses, Routing, TopKRouter
from impl.parameters import of_expert
from impl.partition import part_of
from verify.case import Case
from verify.placement import Placements, Shard
from verify.targets.impl.subject import Builder, ModuleSubject, OperationSubject, Tensors, switches
from verify.targets.megatron_attributes import placements_of

_ROUTING = (
    "score",
    "pre_softmax",
    "scaling",
    "expert_bias",
    "capacity",
    "drop",
    "balance",
    "coefficient",
    "z_loss",
    "loss_scale",
)
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "moe_router": _ROUTING,
    "moe_dispatch": ("dispatcher", "dropped", "balanced"),
    "moe_layer": (*_ROUTING, "dispatcher", "activation", "bias"),
    "moe_expert_bias": ("evaluated", "recomputed"),
}
RATE = 0.125


class MoESubject(ModuleSubject):
    """A module with parameters on both meshes."""

    def parameters(self) -> Mapping[str, tuple[Parameter, Placements]]:
        """Every parameter by its name, with the placement that its attributes say."""
        return {name: (p, _placements(p)) for name, p in self.module.named_parameters()}

    def finish_gradients(self) -> None:
        """The sum over tp of what each rank computed from its part of the sequence, and what data
        parallelism does: sums over dp and cp, of experts over edp."""
        parameters = list(self.module.parameters())
        finish_sequence_parallel_gradients(parameters, group=self._groups.tp)
        sum_gradients([p for p in parameters if not of_expert(p)], group=self._groups.dp_cp)
        sum_gradients([p for p in parameters if of_expert(p)], group=self._groups.edp)


def _placements(parameter: Parameter) -> Placements:
    if not of_expert(parameter):
        return placements_of(parameter)
    return {"ep": Shard(0), **placements_of(parameter, axis="etp")}


def _choice(case: Case, **fixed: Any) -> Choice:
    names = ("score", "scaling", "capacity", "drop")
    given = {name: case.options[name] for name in names if name in case.options}
    sizes = {n: case.shape[n] for n in ("groups", "group_top_k") if n in case.shape}
    flags = switches(case, "pre_softmax", "expert_bias")
    return Choice(top_k=case.shape["top_k"], **{**given, **sizes, **flags, **fixed})


def _losses(case: Case) -> Losses:
    level = case.options.get("balance", "none")
    return Losses(
        level=None if level == "none" else str(level),
        balance=_number(case, "coefficient", 1.0),
        z=_number(case, "z_loss", 0.0),
        scale=_number(case, "loss_scale", 1.0),
    )


def _number(case: Case, name: str, default: float) -> float:
    return float(case.options.get(name, default))  # type: ignore[arg-type]


def _module_arguments(case: Case) -> dict[str, Any]:
    return {
        "init": partial(constant_, val=math.nan),
        "sequence_parallel": case.layout.sequence_parallel,
        "dtype": getattr(torch, case.dtype),
    }


def _router(case: Case, groups: Groups, choice: Choice, losses: Losses) -> TopKRouter:
    shared = case.layout.sequence_parallel
    return TopKRouter(
        case.shape["hidden"],
        num_experts=case.shape["experts"],
        choice=choice,
        losses=losses,
        microbatch_group=groups.tp_cp if shared else groups.cp,
        global_group=groups.tp_dp_cp if shared else groups.dp_cp,
        **_module_arguments(case),
    )


def _set_bias(router: TopKRouter, inputs: Tensors) -> None:
    if router.expert_bias is not None and "expert_bias" in inputs:
        router.expert_bias.bias.copy_(inputs["expert_bias"])


def _named(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}_loss": loss for name, loss in losses.items()}


def moe_router(case: Case, groups: Groups) -> MoESubject:
    """`TopKRouter`."""
    router = _router(case, groups, _choice(case), _losses(case))

    def call(inputs: Tensors) -> Tensors:
        _set_bias(router, inputs)
        x = inputs["x"]
        routing: Routing = router(x)
        weights = routing.probabilities.unflatten(0, x.shape[:2])
        chosen = routing.chosen.to(weights.dtype).unflatten(0, x.shape[:2])
        return {"weights": weights, "chosen": chosen, **_named(routing.losses)}

    return MoESubject(router, groups, call)


def moe_expert_bias(case: Case, groups: Groups) -> MoESubject:
    """`TopKRouter`, whose `ExpertBias` is updated after every step."""
    choice = _choice(case, score="sigmoid", expert_bias=True)
    router = _router(case, groups, choice, Losses())
    bias = router.expert_bias
    assert bias is not None
    bias.rate = RATE
    flags = switches(case, "evaluated", "recomputed")

    def step(x: Tensor) -> Tensor:
        if flags.get("recomputed"):
            with torch.no_grad():
                router(x)
        weights: Tensor = router(x).probabilities.unflatten(0, x.shape[:2])
        if flags.get("evaluated"):
            router.eval()
            router(x)
            router.train()
        return weights

    def call(inputs: Tensors) -> Tensors:
        weights, counts, biases = [], [], []
        for x in inputs["x"]:
            weights.append(step(x))
            counts.append(bias.counts.to(bias.bias.dtype))
            bias.update()
            biases.append(bias.bias.clone())
        found = {"weights": weights, "counts": counts, "biases": biases}
        return {name: torch.stack(values) for name, values in found.items()}

    return MoESubject(router, groups, call)


def moe_layer(case: Case, groups: Groups) -> MoESubject:
    """`MoELayer`."""
    layer = MoELayer(
        case.shape["hidden"],
        ffn=case.shape["ffn"],
        num_experts=case.shape["experts"],
        shared_ffn=case.shape.get("shared_ffn"),
        choice=_choice(case),
        losses=_losses(case),
        groups=groups,
        dispatcher=str(case.options.get("dispatcher", "all_to_all")),
        activation=str(case.options.get("activation", "gelu")),
        **switches(case, "bias"),
        **_module_arguments(case),
    )

    def call(inputs: Tensors) -> Tensors:
        _set_bias(layer.router, inputs)
        y, losses = layer(inputs["x"])
        return {"y": y, **_named(losses)}

    return MoESubject(layer, groups, call)


def moe_dispatch(case: Case, groups: Groups) -> OperationSubject:
    """A dispatcher around experts that multiply, expert e by e + 1, every rank of etp the features
    from its index on in steps of etp."""
    experts, top_k = case.shape["experts"], case.shape["top_k"]
    dispatcher = make_dispatcher(
        str(case.options.get("dispatcher", "all_to_all")), top_k=top_k, groups=groups
    )
    mine = part_of(experts, group=groups.ep, name="experts")
    table = _table(experts, top_k, dropped=bool(case.options.get("dropped", False)))

    def call(inputs: Tensors) -> Tensors:
        x, weights = inputs["x"], inputs["weights"].flatten(0, 1)
        balanced = case.options.get("balanced", False)
        chosen = _in_turn(case, groups) if balanced else table[inputs["choice"]].flatten(0, 1)
        dispatched = dispatcher(x.flatten(0, 1), chosen)
        factors = torch.arange(mine.start + 1, mine.stop + 1, dtype=x.dtype)
        factors = factors.repeat_interleave(torch.tensor(dispatched.counts)).unsqueeze(-1)
        own = torch.arange(x.shape[-1]) % groups.size("etp") == groups.rank("etp")
        y = dispatched.combine(dispatched.tokens * factors * own, weights)
        return {"y": y.view(x.shape)}

    return OperationSubject(call)


def _table(experts: int, top_k: int, *, dropped: bool) -> Tensor:
    """[choices, experts], bool: the combinations of experts as the contract counts them."""
    counts = range(top_k + 1) if dropped else range(top_k, top_k + 1)
    rows = [each for count in counts for each in combinations(range(experts), count)]
    table = torch.zeros(len(rows), experts, dtype=torch.bool)
    for row, each in enumerate(rows):
        table[row, list(each)] = True
    return table


def _in_turn(case: Case, groups: Groups) -> Tensor:
    """The choices of this rank's tokens where every expert has its turn."""
    shape, experts, top_k = case.shape, case.shape["experts"], case.shape["top_k"]
    at = case.layout.coordinates(dist.get_rank())
    rows = shape["sequence"] // (case.layout.cp * case.layout.tp)
    columns = shape["batch"] // case.layout.dp
    row = torch.arange(rows) + (at["cp"] * case.layout.tp + at["tp"]) * rows
    column = torch.arange(columns) + at["dp"] * columns
    token = (row.unsqueeze(1) * shape["batch"] + column).flatten().unsqueeze(1)
    chosen = torch.zeros(rows * columns, experts, dtype=torch.bool)
    return chosen.scatter_(1, (token * top_k + torch.arange(top_k)) % experts, True)


BUILDERS: Mapping[str, Builder] = {
    "moe_router": moe_router,
    "moe_dispatch": moe_dispatch,
    "moe_layer": moe_layer,
    "moe_expert_bias": moe_expert_bias,
}
