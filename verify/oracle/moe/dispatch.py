"""The contract of a dispatcher: what leaves and comes back is what was sent, summed by weights."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from verify.case import Case
from verify.errors import BadArgument
from verify.oracle.contract import Contract, Step, Tensors, TensorSpec
from verify.oracle.moe.router import sum_of_products
from verify.oracle.moe.rules import AXES, DISPATCHERS, token_placements
from verify.oracle.terms import known_options, sizes, switches


def moe_dispatch(case: Case) -> Contract:
    """y = sum over a token's experts of weight * (expert + 1) * x: expert e multiplies by e + 1, so
    that none can do another's work, and each rank of etp does so for every etp-th feature, from its
    own index on, and gives zero for the rest, so that outputs have to be summed over etp.

    x, y [sequence, batch, hidden] and `weights` [sequence, batch, experts], all of the case's
    dtype, with their gradients, are divided over dp, cp and tp. The input `choice` [sequence,
    batch] says which experts: an index into `subsets`, the combinations of top_k experts in the
    order of itertools; with `dropped`, those of up to top_k, the smaller first. With `balanced`
    token p = sequence index * batch + batch index goes instead to the experts (p * top_k + j) mod
    experts for j below top_k, equally many from every rank, and communication is promised.

    All-gather: tokens, weights and choices of a rank's block, ep * etp, and a reduce-scatter of
    what comes back. All-to-all: counts; then top_k copies of every token over ep and, from there,
    all to every rank of etp. Backward each the reverse (counts and choices have none).
    """
    known_options(case, "dispatcher", "dropped", "balanced")
    sequence, batch, hidden, experts, top_k = sizes(
        case, "sequence", "batch", "hidden", "experts", "top_k"
    )
    given = switches(case, {"dropped": False, "balanced": False})
    dispatcher = case.options.get("dispatcher", DISPATCHERS[0])
    if dispatcher not in DISPATCHERS:
        raise BadArgument(f"case.options.dispatcher: {dispatcher!r} is not one of {DISPATCHERS}")
    placed = token_placements(case, divided=True)
    table = subsets(experts, top_k, dropped=given["dropped"])

    def reference(inputs: Tensors, parameters: Tensors) -> Tensors:
        chosen = balanced(case) if given["balanced"] else table[inputs["choice"]]
        x = inputs["x"]
        factors = torch.arange(1, experts + 1, dtype=x.dtype).unsqueeze(-1)
        weights = torch.where(chosen, inputs["weights"], torch.zeros_like(inputs["weights"]))
        return {"y": sum_of_products(weights, x.unsqueeze(2) * factors, x)}

    spec = TensorSpec((sequence, batch, hidden), placed, placed)
    forward, backward = _promise(case, str(dispatcher)) if given["balanced"] else (None, None)
    return Contract(
        axes=AXES,
        inputs={
            "x": spec,
            "weights": TensorSpec((sequence, batch, experts), placed, placed),
            "choice": TensorSpec((sequence, batch), placed, None, high=len(table)),
        },
        parameters={},
        outputs={"y": spec},
        reference=reference,
        linear=True,
        divided={"experts": experts},
        over={"experts": ("ep",)},
        forward=forward,
        backward=backward,
    )


def subsets(experts: int, top_k: int, *, dropped: bool) -> Tensor:
    """[subsets, experts], bool, in the order that `choice` counts them."""
    sizes_ = range(top_k + 1) if dropped else (top_k,)
    found = [set(each) for size in sizes_ for each in combinations(range(experts), size)]
    return torch.tensor([[expert in each for expert in range(experts)] for each in found])


def balanced(case: Case) -> Tensor:
    """[sequence, batch, experts], bool: every expert in turn."""
    shape, experts, top_k = case.shape, case.shape["experts"], case.shape["top_k"]
    first = torch.arange(shape["sequence"] * shape["batch"]).unsqueeze(-1) * top_k
    chosen = torch.zeros(len(first), experts, dtype=torch.bool)
    chosen.scatter_(1, (first + torch.arange(top_k)) % experts, True)
    return chosen.view(shape["sequence"], shape["batch"], experts)


def _promise(case: Case, dispatcher: str) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """What every rank sends forward and backward where every rank and expert has as many tokens."""
    layout, shape = case.layout, case.shape
    experts, hidden, copies = shape["experts"], shape["hidden"], shape["top_k"]
    if shape["batch"] // layout.dp * copies % experts:
        raise BadArgument(
            f"case.options.balanced: a rank's {shape['batch'] // layout.dp} sequences do not share"
            f" {experts} experts equally, {copies} a token"
        )
    tokens = shape["sequence"] * shape["batch"] // (layout.tp * layout.cp * layout.dp)
    block, rows = layout.expert_tp * layout.ep, tokens * copies * hidden
    if dispatcher == "all_gather":
        there = Step("all_gather", "etp_ep", tokens * hidden)
        back = Step("reduce_scatter", "etp_ep", tokens * block * hidden)
        choices = Step("all_gather", "etp_ep", tokens * experts)
        weights = Step("reduce_scatter", "etp_ep", tokens * block * experts)
        return (there, choices, choices, back), (there, weights, back)
    ways = (Step("all_to_all", "ep", rows), Step("all_to_all", "etp", rows * layout.expert_tp))
    counts = (Step("all_gather", "ep", experts), Step("all_gather", "etp", experts))
    return (*counts, *ways, *ways), (*ways, *ways)
