"""Hypothesis strategies of cases of a mixture of experts: valid ones, and ones to be refused.

Layouts split a pipeline stage in two ways, tokens over tp, cp and dp, experts over etp, ep and edp,
mostly with two ranks or three on several axes at once, in any order. There are one expert a rank or
several, eleven and more in all now and then, more experts than tokens, and one to three choices a
token. A case for which no tokens are found that leave no decision in doubt is none: see
`verify.oracle.moe.doubt`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from verify.case import LENSES, Case, Lens, Option
from verify.coverage.steering import CONCEPT, chosen, foresee
from verify.layout import Layout
from verify.runner.limits import limits
from verify.strategies.cases import (
    STRIDES,
    Choices,
    can_be_generated,
    completed,
    with_options,
)
from verify.strategies.layouts import (
    chosen_experts,
    chosen_sizes,
    divisors,
    experts_from_tp,
    orders,
    ranks_of_stage,
    sizes_within,
)

Shape = dict[str, int]

# The default of an option comes first, and an option after those that its validity depends on.
_CHOICES: Choices = {
    "score": ("softmax", "sigmoid"),
    "pre_softmax": (False, True),
    "expert_bias": (False, True),
    "scaling": (1.0, 2.5),
}
_DROPPING: Choices = {"capacity": (None, 1.0, 0.5, 1.25), "drop": ("probability", "position")}
_LOSSES: Choices = {
    "balance": ("none", "sequence", "batch", "global"),
    "coefficient": (1.0, 16.0),
    "z_loss": (0.0, 0.25),
    "loss_scale": (1.0, 0.25),
}
_SPREAD = 6
_ROUTING: Choices = {**_CHOICES, **_DROPPING, **_LOSSES}
_DISPATCHER: Choices = {"dispatcher": ("all_to_all", "all_gather")}
OPTIONS: Mapping[str, Choices] = {
    "moe_router": _ROUTING,
    "moe_dispatch": {**_DISPATCHER, "dropped": (False, True), "balanced": (False, True)},
    "moe_layer": {
        **_DISPATCHER,
        "activation": ("gelu", "swiglu"),
        "bias": (False, True),
        **_ROUTING,
    },
    "moe_expert_bias": {"evaluated": (False, True), "recomputed": (False, True)},
}


def defaults_of(choices: Choices) -> Choices:
    """These options at their defaults only."""
    return {name: values[:1] for name, values in choices.items()}


DROPLESS, LOSSLESS = defaults_of(_DROPPING), defaults_of(_LOSSES)
CONTIGUOUS: Choices = {"strides": STRIDES[:1]}


@st.composite
def stage_layouts(
    draw: st.DrawFn,
    *,
    sequence_parallel: Sequence[bool] = (False, True),
    max_world_size: int = 16,
) -> Layout:
    """Layouts of both meshes, with one or two pipeline stages as replicas."""
    left = limits().world_size(max_world_size)
    wanted = {"pp": (1, 1, 2), "tp": (1, 2, 2, 3, 4), "dp": (1, 2, 2, 3), "cp": (1, 2, 2, 3)}
    foresee({**row, **more} for row in sizes_within(left, wanted) for more in _experts_of(row))
    axes = ("pp", *draw(st.permutations(("tp", "dp", "cp"))))
    sizes: dict[str, Any] = {**chosen_sizes(draw, left, wanted, axes)}
    # Over all ranks that there are is no size that other choices would have to meet.
    choose = _all_of_ep if draw(st.sampled_from((False, False, False, True))) else chosen
    possible = _experts_of(sizes, most=ranks_of_stage(sizes) if choose is _all_of_ep else _SPREAD)
    sizes |= chosen_experts(draw, possible, tp=sizes["tp"], choose=choose)
    return Layout(
        **sizes,
        order=draw(orders(pp_last=True)),
        sequence_parallel=chosen(draw, "sp", sequence_parallel),
    )


def _all_of_ep(draw: st.DrawFn, axis: str, values: Sequence[int]) -> int:
    """The most that ep can be; etp is chosen as always."""
    return values[-1] if axis == "ep" else chosen(draw, axis, values)


def _experts_of(sizes: Mapping[str, int], *, most: int = _SPREAD) -> list[dict[str, int]]:
    return experts_from_tp(sizes, etp=4, ep=most)


@st.composite
def moe_cases(
    draw: st.DrawFn,
    *concepts: str,
    lenses: Sequence[Lens] = LENSES,
    options: Choices = CONTIGUOUS,
    layouts: st.SearchStrategy[Layout] | None = None,
    grouped: Sequence[bool] = (False, False, True),
) -> Case:
    """Valid cases of these concepts. `options` names some and the values to draw from instead of
    all that they have; `grouped` whether experts are in groups, of which a token admits some."""
    concept = chosen(draw, CONCEPT, concepts)
    layout = draw(stage_layouts() if layouts is None else layouts)
    shape = draw(_shapes(concept, layout, grouped=grouped))
    case = Case(concept=concept, layout=layout, shape=shape)
    case = with_options(draw, case, {**OPTIONS[concept], "strides": STRIDES}, wanted=options)
    case = draw(completed(case, lenses))
    assume(can_be_generated(case))
    return case


@st.composite
def _shapes(draw: st.DrawFn, concept: str, layout: Layout, *, grouped: Sequence[bool]) -> Shape:
    tp_of = {"moe_dispatch": (layout.tp, 1), "moe_layer": _tp_of_tokens(draw, layout)}
    rows, columns = tp_of.get(concept, (layout.tp if layout.sequence_parallel else 1, 1))
    shape = {
        "sequence": layout.cp * rows * draw(st.integers(1, 3)),
        "batch": layout.dp * columns * draw(st.integers(1, 2)),
        "hidden": draw(st.integers(3, 6)),
    }
    split = layout.ep if concept in ("moe_layer", "moe_dispatch") else 1
    experts = [n * split for n in (1, 2, 3) if n * split > 1] + [-(-11 // split) * split]
    # So that the mean load is a whole number, some expert's, while a rank's share of it is not.
    experts += [6, 12] if concept == "moe_expert_bias" else []
    in_groups = concept in ("moe_router", "moe_layer") and draw(st.sampled_from(list(grouped)))
    if in_groups:
        # Of several experts each.
        experts = [n * split for n in (4, 6, 8)]
    shape["experts"] = draw(st.sampled_from(experts))
    shape["top_k"] = draw(st.integers(1, min(3, shape["experts"])))
    if in_groups:
        shape |= draw(_grouping(shape["experts"], shape["top_k"]))
    if concept == "moe_layer":
        shape["ffn"] = layout.expert_tp * draw(st.integers(1, 3))
        shared = layout.tp * draw(st.integers(0, 2))
        shape |= {"shared_ffn": shared} if shared else {}
    if concept == "moe_expert_bias":
        shape["steps"] = draw(st.integers(1, 4))
    return shape


def _tp_of_tokens(draw: st.DrawFn, layout: Layout) -> tuple[int, int]:
    """What multiples sequence and batch are so that tokens divide by tp; without sequence
    parallelism either will do."""
    if layout.sequence_parallel or layout.tp == 1 or draw(st.booleans()):
        return layout.tp, 1
    return 1, layout.tp


def _grouping(experts: int, top_k: int) -> st.SearchStrategy[Shape]:
    found = [
        {"groups": groups, "group_top_k": admitted}
        for groups in divisors(experts)
        for admitted in divisors(top_k)
        if groups > 1 and admitted <= groups and top_k <= experts // groups * admitted
    ]
    return st.sampled_from([*found, {}] if found else [{}])


@st.composite
def balanced_cases(draw: st.DrawFn) -> Case:
    """Cases of a dispatcher in which every expert gets as many tokens from every rank."""
    case = draw(moe_cases("moe_dispatch", lenses=("fp64",), options={"balanced": (False,)}))
    experts, dp = case.shape["experts"], case.layout.dp
    shape = {**case.shape, "batch": experts * dp}
    options = {n: v for n, v in case.options.items() if n != "dropped"} | {"balanced": True}
    return dataclasses.replace(case, shape=shape, options=options)


Fault = Callable[[Case], tuple[Shape, dict[str, Option]] | None]


def _size(name: str, ways: Callable[[Layout], int]) -> Fault:
    def change(case: Case) -> tuple[Shape, dict[str, Option]] | None:
        parts = ways(case.layout)
        if parts == 1 or name not in case.shape:
            return None
        return {name: case.shape[name] + 1}, {}

    return change


def _odd_tokens(case: Case) -> tuple[Shape, dict[str, Option]] | None:
    layout = case.layout
    if layout.tp == 1 or layout.sequence_parallel:
        return None
    return {"sequence": layout.cp * (layout.tp + 1), "batch": layout.dp}, {}


def _odd_groups(case: Case) -> tuple[Shape, dict[str, Option]] | None:
    """With nothing else wrong: each group has an expert, and a token has one of them."""
    experts = case.shape["experts"]
    odd = [groups for groups in range(2, experts) if experts % groups]
    return ({"groups": odd[0], "group_top_k": 1, "top_k": 1}, {"score": "sigmoid"}) if odd else None


def _unshared_choices(case: Case) -> tuple[Shape, dict[str, Option]] | None:
    experts = case.shape["experts"]
    return ({"groups": experts, "group_top_k": 2, "top_k": 3}, {}) if experts > 2 else None


# What makes a valid case one to refuse: other sizes and options; None where it does not.
FAULTS: Mapping[str, Mapping[str, Fault]] = {
    "moe_router": {
        "more choices than experts": lambda case: ({"top_k": case.shape["experts"] + 1}, {}),
        "no choice": lambda case: ({"top_k": 0}, {}),
        "more groups than there are": lambda case: (
            {"groups": 1, "group_top_k": 2, "top_k": 2},
            {},
        ),
        "choices that groups do not share": _unshared_choices,
        "a score that is none": lambda case: ({}, {"score": "tanh"}),
        "nothing to drop by": lambda case: ({}, {"capacity": 1.0, "drop": "load"}),
        "groups that do not divide": _odd_groups,
        "more choices than admitted experts": lambda case: (
            {"groups": case.shape["experts"], "group_top_k": 1, "top_k": 2},
            {},
        ),
        "a loss of no level": lambda case: ({}, {"balance": "token"}),
        "a bias of softmax": lambda case: ({}, {"score": None, "expert_bias": True}),
        "a softmax of sigmoids": lambda case: ({}, {"score": "sigmoid", "pre_softmax": True}),
        "no room": lambda case: ({}, {"capacity": 0.0}),
        "less than no room": lambda case: ({}, {"capacity": -0.5}),
        "equal probabilities": lambda case: ({"top_k": 1}, {"score": None, "capacity": 0.5}),
    },
    "moe_layer": {
        "experts": _size("experts", lambda layout: layout.ep),
        "ffn": _size("ffn", lambda layout: layout.expert_tp),
        "shared_ffn": _size("shared_ffn", lambda layout: layout.tp),
        "tokens": _odd_tokens,
        "an activation that is none": lambda case: ({}, {"activation": "softplus"}),
    },
    "moe_dispatch": {"experts": _size("experts", lambda layout: layout.ep)},
}
_PLAIN: Choices = {
    **defaults_of(_ROUTING),
    **CONTIGUOUS,
    "bias": (False,),
    "balanced": (False,),
    "dropped": (False,),
}


@st.composite
def refusable_moe_cases(draw: st.DrawFn, *concepts: str) -> Case:
    """Cases that are valid but for one thing, and must be refused by every rank."""
    concept = draw(st.sampled_from(concepts))
    case = draw(moe_cases(concept, lenses=("fp64",), options=_PLAIN, grouped=(False,)))
    changes = [found for fault in FAULTS[concept].values() if (found := fault(case)) is not None]
    assume(changes)
    shape, options = draw(st.sampled_from(changes))
    given = {
        name: value for name, value in {**case.options, **options}.items() if value is not None
    }
    return dataclasses.replace(case, shape={**case.shape, **shape}, options=given)
