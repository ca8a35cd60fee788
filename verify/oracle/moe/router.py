"""The contract of the router: x to weights, choices and auxiliary losses."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from verify.case import Case
from verify.oracle.contract import Contract, Tensors, TensorSpec
from verify.oracle.moe.doubt import settles
from verify.oracle.moe.routing import logits_of, losses, route, with_losses
from verify.oracle.moe.rules import AXES, OPTIONS, Rules, rules, token_placements
from verify.oracle.terms import known_options, sizes
from verify.placement import Partial, Placements, Shard


def moe_router(case: Case) -> Contract:
    """x [sequence, batch, hidden], placed as `token_placements` says, and its gradient likewise.

    `weights` [sequence, batch, experts] float32 (float64 for float64), zero where a token does not
    go, differentiable; `chosen`, of the same dtype, is 1 where it goes. Both are placed as x is.
    `balance_loss` and `z_loss` are scalars, where there are any: every rank tells its summand. They
    are attached to the weights: backward gives each of them the gradient `loss_scale`, whatever the
    upstream gradient. Parameter `weight` [experts, hidden]; with expert_bias an input [experts] of
    that name, without gradient.

    Raises BadArgument for options that do not go together.
    """
    known_options(case, *OPTIONS)
    sequence, batch, hidden, experts, _ = sizes(
        case,
        "sequence",
        "batch",
        "hidden",
        "experts",
        "top_k",
        optional=("groups", "group_top_k"),
    )
    rule, placed = rules(case), token_placements(case)

    def reference(inputs: Tensors, parameters: Tensors) -> Tensors:
        logits = logits_of(inputs["x"], parameters["weight"])
        chosen, weights = route(logits, rule, inputs.get("expert_bias"))
        found = losses(logits, rule)
        weights = with_losses(weights, found, rule)
        return {"weights": weights, "chosen": chosen.to(weights.dtype), **found}

    shape = (sequence, batch, experts)
    return Contract(
        axes=AXES,
        inputs={
            # Where one expert takes nearly all, gradients are what is left of terms like these.
            "x": TensorSpec((sequence, batch, hidden), placed, placed, terms=rule.scaling),
            **expert_bias(rule),
        },
        parameters={"weight": (experts, hidden)},
        outputs={
            "weights": TensorSpec(shape, placed, placed),
            "chosen": TensorSpec(shape, placed, None),
            **loss_outputs(case, rule),
        },
        reference=reference,
        settle=settles(rule, "weight"),
    )


def expert_bias(rule: Rules) -> dict[str, TensorSpec]:
    """The input `expert_bias`, where there is one."""
    return {"expert_bias": TensorSpec((rule.experts,), {}, None)} if rule.expert_bias else {}


def loss_outputs(case: Case, rule: Rules) -> Mapping[str, TensorSpec]:
    """The auxiliary losses: the sum over the ranks that hold different tokens."""
    return {name: TensorSpec((), summands(case), None) for name in rule.loses}


def summands(case: Case) -> Placements:
    """A sum over the ranks that hold different tokens, each having its own part of it."""
    placed = token_placements(case)
    return {axis: Partial() for axis, each in placed.items() if isinstance(each, Shard)}


def sum_of_products(weights: Tensor, outputs: Tensor, dtype_of: Tensor) -> Tensor:
    """Outputs [sequence, batch, experts, hidden] summed by their weights, in the dtype of another
    tensor."""
    return (weights.unsqueeze(-1) * outputs.to(weights.dtype)).sum(2).to(dtype_of.dtype)
