"""Hypothesis strategies of what is random or computed again: valid cases, and cases to be refused.

What every concept's strategies have in common is in `verify.strategies.cases`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from verify.case import LENSES, Case, Lens, Option
from verify.checks.rerun import DTYPES, LIES
from verify.checks.rerun_function import CHANGES
from verify.checks.stream_misuse import MISUSES
from verify.coverage.steering import CONCEPT, chosen
from verify.layout import Layout
from verify.oracle.dropout import PROBABILITY, REGIONS
from verify.oracle.initialise import ACTIVATIONS, LINEAR, RULES, WAYS
from verify.runner.limits import limits
from verify.strategies.cases import (
    MAX_SEED,
    NATIVE_DTYPES,
    STRIDES,
    Choices,
    completed,
    layouts,
    with_option,
)
from verify.strategies.layouts import layouts_of_every_kind

MAX_WORLD_SIZE = 16
_LIKELY: Sequence[Option] = (0.25, 0.1, 0.5)
# The masks of small parts agree by chance, those of large ones do not.
_WIDTHS = st.integers(1, 5) | st.sampled_from((24, 64))
# Every rank's layers, all of them, are computed again.
WHOLE = ("uniform", "block", "nested")


@st.composite
def dropout_cases(
    draw: st.DrawFn,
    *,
    lenses: Sequence[Lens] = LENSES,
    training: bool = True,
    strides: Sequence[str] = STRIDES[:1],
) -> Case:
    """Cases of `dropout` in both regions, over tp and cp."""
    concept = chosen(draw, CONCEPT, ("dropout",))
    layout = draw(layouts())
    region = chosen(draw, "region", REGIONS)
    split = layout.tp if layout.sequence_parallel and region == REGIONS[0] else 1
    shape = {
        "sequence": draw(st.integers(1, 4)) * layout.cp * split,
        "batch": draw(st.integers(1, 3)),
        "hidden": draw(_WIDTHS) * (layout.tp if region == REGIONS[1] else 1),
    }
    case = Case(concept=concept, layout=layout, shape=shape)
    probabilities: Sequence[Option] = (*_LIKELY, 0.75, 0.0)
    case = with_option(case, "region", region, default=REGIONS[0])
    dropped = chosen(draw, "dropout", probabilities)
    case = with_option(case, "dropout", dropped, default=PROBABILITY)
    case = with_option(case, "bias", chosen(draw, "bias", (True, False)), default=True)
    case = with_option(case, "training", training, default=True)
    case = with_option(case, "strides", chosen(draw, "strides", strides), default=STRIDES[0])
    return draw(completed(case, lenses))


@st.composite
def recomputed_cases(
    draw: st.DrawFn,
    *,
    methods: Sequence[str] = (*WHOLE, "selective"),
    lenses: Sequence[Lens] = LENSES,
    every_layer: bool = False,
    strides: Sequence[str] = STRIDES[:1],
) -> Case:
    """Cases of `recomputed_block` that recompute by one of these methods, with dropout inside and
    outside of tensor-parallel regions more often than not. `every_layer` leaves out blocks of some
    layers only."""
    concept = chosen(draw, CONCEPT, ("recomputed_block",))
    layout = draw(layouts(max_world_size=8))
    layers = draw(st.integers(1, 3))
    split = layout.tp if layout.sequence_parallel else 1
    shape = {
        "sequence": draw(st.integers(1, 3)) * split,
        "batch": draw(st.integers(1, 3)),
        "hidden": draw(st.integers(1, 4)),
        "ffn": draw(st.integers(1, 3)) * layout.tp,
        "layers": layers,
    }
    method = draw(st.sampled_from(methods))
    words = [method]
    if method != "selective":
        least = layers if every_layer and method == "block" else 1
        words.append(str(draw(st.integers(least, layers))))
        if not layout.sequence_parallel and draw(st.booleans()):
            words.append("distributed")
            shape["hidden"] *= layout.tp
    case = Case(
        concept=concept,
        layout=layout,
        shape=shape,
        options={"recompute": "-".join(words)},
    )
    outer = chosen(draw, "dropout", (*_LIKELY, 0.0))
    case = with_option(case, "dropout", outer, default=PROBABILITY)
    inner = chosen(draw, "inner_dropout", (0.0, 0.25, 0.0, 0.5))
    case = with_option(case, "inner_dropout", inner, default=0.0)
    case = with_option(case, "strides", chosen(draw, "strides", strides), default=STRIDES[0])
    return draw(completed(case, lenses))


@st.composite
def rerun_cases(
    draw: st.DrawFn,
    *,
    autocasts: Sequence[Option] = DTYPES[:1],
    lies: Sequence[Option] = tuple(LIES),
    changed: bool = False,
) -> Case:
    """Functions that are computed again, with `changed` to be refused because they do something
    else then; under these autocasts, of an input that lies in memory in one of these ways."""
    concept = chosen(draw, CONCEPT, ("recomputed_function",))
    layout = draw(layouts(max_world_size=8, sequence_parallel=(False,)))
    distributed = chosen(draw, "distributed", (False, True))
    sizes = {name: draw(st.integers(1, 4)) for name in ("sequence", "batch", "hidden")}
    sizes["hidden"] *= layout.tp if distributed else 1
    seed = draw(st.integers(0, MAX_SEED))
    case = Case(
        concept=concept, layout=layout, shape=sizes, lens="native", dtype="float32", seed=seed
    )
    case = with_option(case, "distributed", distributed, default=False)
    choices: Choices = {"autocast": autocasts, "autocast_backward": autocasts, "lies": lies}
    for option, values in choices.items():
        case = with_option(case, option, chosen(draw, option, values), default=values[0])
    change = chosen(draw, "changed", tuple(CHANGES) if changed else (None,))
    return with_option(case, "changed", change, default=None)


def stream_cases() -> st.SearchStrategy[Case]:
    """Layouts of every kind, for the laws of random streams."""
    return st.deferred(lambda: _layouts(MAX_WORLD_SIZE)).map(
        lambda layout: Case(concept="random_streams", layout=layout)
    )


def misuse_cases() -> st.SearchStrategy[Case]:
    """Misuses of the random streams of layouts of every kind."""
    return st.builds(
        lambda case, how: dataclasses.replace(case, options={"misuse": how}),
        stream_cases(),
        st.sampled_from(sorted(MISUSES)),
    )


def _layouts(max_world_size: int) -> st.SearchStrategy[Layout]:
    """Layouts of every kind but for the groups that have no part in random numbers."""
    return layouts_of_every_kind(limits().world_size(max_world_size)).map(
        lambda layout: dataclasses.replace(layout, hierarchical_cp=None, optimizer_instances=1)
    )


@st.composite
def initialisation_cases(draw: st.DrawFn, *, way: str) -> Case:
    """Models of perceptrons or of experts, made in this way."""
    layout, experts = draw(_layouts(12)), draw(st.booleans())
    # Copies of an expert's bias cannot be drawn locally.
    whole = way == "whole" or not experts or layout.expert_tp == 1
    rules = RULES if whole else [rule for rule in RULES if rule != LINEAR]
    return draw(_model(layout, way, rules, experts=experts))


def refusable_initialisation_cases() -> st.SearchStrategy[Case]:
    """Models of experts to be made locally, with biases to draw that ranks hold copies of."""
    split = st.deferred(lambda: _layouts(12)).filter(lambda layout: layout.expert_tp > 1)
    return split.flatmap(lambda layout: _model(layout, "local", (LINEAR,), experts=True))


@st.composite
def _model(
    draw: st.DrawFn, layout: Layout, way: str, rules: Sequence[str], *, experts: bool
) -> Case:
    """A model of perceptrons or of experts to be made in this way by one of these rules."""
    concept = chosen(draw, CONCEPT, ("initialisation",))
    ways = layout.expert_tp if experts else layout.tp
    shape = {
        # Of few numbers no spread can be told, and biases are few.
        "hidden": draw(st.integers(1, 12) | st.sampled_from((1, 128))),
        "ffn": draw(st.integers(1, 6) | st.sampled_from((1, 128))) * ways,
        "layers": draw(st.integers(1, 3)),
    }
    shape |= {"num_experts": draw(st.integers(1, 3)) * layout.ep} if experts else {}
    lens: Lens = draw(st.sampled_from(("fp64", "native")))
    case = Case(
        concept=concept,
        layout=layout,
        shape=shape,
        lens=lens,
        dtype="float64" if lens == "fp64" else draw(st.sampled_from(NATIVE_DTYPES)),
        seed=draw(st.integers(0, MAX_SEED)),
    )
    case = with_option(case, "way", way, default=WAYS[0])
    rule = chosen(draw, "rule", rules)
    activation = chosen(draw, "activation", ACTIVATIONS)
    case = with_option(case, "activation", activation, default=ACTIVATIONS[0])
    return with_option(case, "rule", rule, default=RULES[0])


@st.composite
def refusable_dropout_cases(draw: st.DrawFn) -> Case:
    """Cases of `dropout` with a probability that is none."""
    case = draw(dropout_cases(lenses=("fp64",)))
    wrong = draw(st.sampled_from((1.0, 1.5, -0.5)))
    return dataclasses.replace(case, options={**case.options, "dropout": wrong})


@st.composite
def refusable_plans(draw: st.DrawFn) -> Case:
    """Cases of `recomputed_block` whose plan of recomputation is wrong in one way: another method,
    no layers, more than there are, or inputs distributed that do not divide or are split already.
    """
    faults = ("method", "none", "too many", "elements", "sequence")
    fault = draw(st.sampled_from(faults))
    tp = draw(st.integers(2, 4)) if fault in ("elements", "sequence") else draw(st.integers(1, 4))
    tp = min(tp, limits().world_size(4))
    if tp < 2 and fault in ("elements", "sequence"):
        fault = faults[0]
    layers = draw(st.integers(1, 3))
    shape: dict[str, Any] = {
        "sequence": tp if fault == "sequence" else 1,
        "batch": 1,
        "hidden": tp + 1 if fault == "elements" else tp,
        "ffn": tp,
        "layers": layers,
    }
    plans: Mapping[str, Sequence[str]] = {
        "method": (f"diagonal-{layers}", f"blocks-{layers}"),
        "none": ("uniform-0", "block-0"),
        "too many": (f"uniform-{layers + 1}", f"block-{layers + 1}", f"nested-{layers + 2}"),
        "elements": (f"uniform-{layers}-distributed", "block-1-distributed"),
        "sequence": ("uniform-1-distributed", "block-1-distributed"),
    }
    return Case(
        concept="recomputed_block",
        layout=Layout(tp=tp, sequence_parallel=fault == "sequence"),
        shape=shape,
        options={"recompute": draw(st.sampled_from(plans[fault]))},
    )
