"""The contract of the layer: router, dispatch, experts, shared experts."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from verify.case import Case
from verify.errors import BadArgument
from verify.oracle.contract import Contract, Tensors, TensorSpec
from verify.oracle.moe.doubt import settles
from verify.oracle.moe.router import expert_bias, loss_outputs, sum_of_products
from verify.oracle.moe.routing import logits_of, losses, route, with_losses
from verify.oracle.moe.rules import AXES, DISPATCHERS, OPTIONS, rules, token_placements
from verify.oracle.terms import known_options, sizes, switches

ACTIVATIONS = ("gelu", "swiglu")


def moe_layer(case: Case) -> Contract:
    """y = sum over a token's experts of weight * fc2(act(fc1(x))), + shared experts of x.

    x, y [sequence, batch, hidden] and their gradients are placed as `token_placements` says.
    Routing, losses and the input expert_bias are those of `moe_router`; capacity is shared by one
    rank's tokens. Parameters: router.weight [experts, hidden]; experts.fc1.weight [experts, ffn,
    hidden] (swiglu: 2 ffn, packed [gate | up]) and experts.fc2.weight [experts, hidden, ffn],
    split over ep by expert and over etp by ffn; with `bias`, experts.fc1.bias and experts.fc2.bias,
    each weighted as its expert. With shared_ffn: shared.fc1.weight (packed likewise) and
    shared.fc2.weight, split over tp by ffn, without biases. y has the dtype of x.

    Option `dispatcher` is how tokens travel and changes nothing here. Raises BadArgument for
    options that do not go together.
    """
    known_options(case, *OPTIONS, "dispatcher", "activation", "bias")
    sequence, batch, hidden, experts, ffn, _ = sizes(
        case,
        "sequence",
        "batch",
        "hidden",
        "experts",
        "ffn",
        "top_k",
        optional=("groups", "group_top_k", "shared_ffn"),
    )
    for option, allowed in (("dispatcher", DISPATCHERS), ("activation", ACTIVATIONS)):
        if (value := case.options.get(option, allowed[0])) not in allowed:
            raise BadArgument(f"case.options.{option}: {value!r} is not one of {allowed}")
    gated = case.options.get("activation") == "swiglu"
    rule, placed = rules(case), token_placements(case)

    def reference(inputs: Tensors, parameters: Tensors) -> Tensors:
        x = inputs["x"]
        logits = logits_of(x, parameters["router.weight"])
        _, weights = route(logits, rule, inputs.get("expert_bias"))
        found = losses(logits, rule)
        weights = with_losses(weights, found, rule)
        y = sum_of_products(weights, experts_of(x, parameters, gated=gated), x)
        if "shared_ffn" in case.shape:
            y = y + shared_of(x, parameters, gated=gated)
        return {"y": y, **found}

    # Where one expert takes nearly all, gradients are what is left of terms like these.
    spec = TensorSpec((sequence, batch, hidden), placed, placed, terms=rule.scaling)
    shared, over = case.shape.get("shared_ffn"), {"experts": ("ep",), "ffn": ("etp",)}
    divided = {"experts": experts, "ffn": ffn}
    if shared is not None:
        over, divided = {**over, "shared_ffn": ("tp",)}, {**divided, "shared_ffn": shared}
    if not case.layout.sequence_parallel:
        # Each rank of tp dispatches a part of the tokens that they hold copies of.
        tokens = sequence // case.layout.cp * (batch // case.layout.dp)
        over, divided = {**over, "tokens": ("tp",)}, {**divided, "tokens": tokens}
    return Contract(
        axes=AXES,
        inputs={"x": spec, **expert_bias(rule)},
        parameters={
            "router.weight": (experts, hidden),
            **_weights(experts, hidden, ffn, gated=gated),
            **_biases(case, experts, hidden, ffn, gated=gated),
            **_shared_weights(hidden, shared, gated=gated),
        },
        outputs={"y": dataclasses.replace(spec, terms=0.0), **loss_outputs(case, rule)},
        reference=reference,
        divided=divided,
        over=over,
        settle=settles(rule, "router.weight"),
    )


Shapes = dict[str, tuple[int, ...]]


def _weights(experts: int, hidden: int, ffn: int, *, gated: bool) -> Shapes:
    inner = 2 * ffn if gated else ffn
    return {
        "experts.fc1.weight": (experts, inner, hidden),
        "experts.fc2.weight": (experts, hidden, ffn),
    }


def _biases(case: Case, experts: int, hidden: int, ffn: int, *, gated: bool) -> Shapes:
    if not switches(case, {"bias": False})["bias"]:
        return {}
    inner = 2 * ffn if gated else ffn
    return {"experts.fc1.bias": (experts, inner), "experts.fc2.bias": (experts, hidden)}


def _shared_weights(hidden: int, ffn: int | None, *, gated: bool) -> Shapes:
    if ffn is None:
        return {}
    inner = 2 * ffn if gated else ffn
    return {"shared.fc1.weight": (inner, hidden), "shared.fc2.weight": (hidden, ffn)}


def experts_of(x: Tensor, parameters: Tensors, *, gated: bool) -> Tensor:
    """Every expert's output for every token, [sequence, batch, experts, hidden]."""
    inner = torch.einsum("sbh,efh->sbef", x, parameters["experts.fc1.weight"])
    if "experts.fc1.bias" in parameters:
        inner = inner + parameters["experts.fc1.bias"]
    inner = _activated(inner, gated=gated)
    outputs = torch.einsum("sbef,ehf->sbeh", inner, parameters["experts.fc2.weight"])
    return outputs + parameters["experts.fc2.bias"] if "experts.fc2.bias" in parameters else outputs


def shared_of(x: Tensor, parameters: Tensors, *, gated: bool) -> Tensor:
    """The shared experts' output."""
    inner = F.linear(x, parameters["shared.fc1.weight"])
    return F.linear(_activated(inner, gated=gated), parameters["shared.fc2.weight"])


def _activated(inner: Tensor, *, gated: bool) -> Tensor:
    if not gated:
        return F.gelu(inner)
    gate, up = inner.chunk(2, -1)
    return F.silu(gate) * up
