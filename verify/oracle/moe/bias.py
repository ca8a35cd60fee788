"""The contract of load balancing without a loss: a bias on the experts, moved after every step."""

from __future__ import annotations

import torch
from torch import Tensor

from verify.case import Case
from verify.oracle.contract import Contract, Tensors, TensorSpec
from verify.oracle.moe.doubt import settled
from verify.oracle.moe.router import summands
from verify.oracle.moe.routing import logits_of, route
from verify.oracle.moe.rules import AXES, Rules, rules, token_placements
from verify.oracle.terms import known_options, sizes, switches
from verify.placement import Shard

RATE = 0.125


def moe_expert_bias(case: Case) -> Contract:
    """Several steps of a router with sigmoid scores and expert_bias, which starts at zero.

    x [steps, sequence, batch, hidden] holds the tokens of each step, the step's dimension first and
    the rest placed as in `moe_router`; `weights` [steps, sequence, batch, experts] are its weights
    in each, `counts` [steps, experts] how many tokens chose each expert, every rank telling the
    number of its own, and `biases` [steps, experts] the bias after each, on every rank. After a
    step the bias of an expert that the tokens of all ranks chose less than the mean rises by RATE,
    of one they chose more falls by it. arXiv:2408.15664, algorithm 1.

    With `evaluated`, every step is followed by a forward pass of the same tokens in evaluation
    mode, and with `recomputed` preceded by one without gradients, as recomputation does: neither
    counts. The gradients are those of all steps.
    """
    known_options(case, "evaluated", "recomputed")
    switches(case, {"evaluated": False, "recomputed": False})
    steps, sequence, batch, hidden, experts, _ = sizes(
        case, "steps", "sequence", "batch", "hidden", "experts", "top_k"
    )
    rule = rules(case, score="sigmoid", expert_bias=True)
    placed = {
        axis: Shard(p.dim + 1) if isinstance(p, Shard) else p
        for axis, p in token_placements(case).items()
    }

    def reference(inputs: Tensors, parameters: Tensors) -> Tensors:
        weights, counts, biases = [], [], []
        dtype = logits_of(inputs["x"][0], parameters["weight"]).dtype
        bias = torch.zeros(experts, dtype=dtype)
        for x in inputs["x"]:
            logits = logits_of(x, parameters["weight"])
            chosen, found = route(logits, rule, bias)
            bias = moved(bias, chosen)
            weights.append(found)
            counts.append(chosen.flatten(0, -2).sum(0).to(dtype))
            biases.append(bias)
        told = {"weights": weights, "counts": counts, "biases": biases}
        return {name: torch.stack(values) for name, values in told.items()}

    def settle(inputs: Tensors, parameters: Tensors) -> Tensors:
        return {"x": _settled(inputs["x"], parameters["weight"], rule)}

    shape = (steps, sequence, batch)
    return Contract(
        axes=AXES,
        inputs={"x": TensorSpec((*shape, hidden), placed, placed, terms=1.0)},
        parameters={"weight": (experts, hidden)},
        outputs={
            "weights": TensorSpec((*shape, experts), placed, placed),
            "counts": TensorSpec((steps, experts), summands(case), None),
            "biases": TensorSpec((steps, experts), {}, None),
        },
        reference=reference,
        settle=settle,
    )


def moved(bias: Tensor, chosen: Tensor) -> Tensor:
    """The bias after a step in which these experts were chosen, bool [..., experts]."""
    counts = chosen.flatten(0, -2).sum(0).double()
    return bias + RATE * torch.sign(counts.sum() / len(counts) - counts).to(bias.dtype)


def _settled(x: Tensor, weight: Tensor, rule: Rules) -> Tensor:
    found, bias = [], torch.zeros(rule.experts, dtype=torch.float64)
    for each in x:
        found.append(settled(each, weight, rule, bias))
        chosen, _ = route(logits_of(found[-1], weight), rule, bias)
        bias = moved(bias, chosen)
    return torch.stack(found)
