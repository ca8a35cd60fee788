"""Hypothesis strategies of training steps and learning rates: valid cases, and ones to be refused.

Tokens are few, so that ranks and rounds often have none that counts; dp is two or three, so that
neither parameters nor buckets divide; buckets hold one parameter, some, or all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from verify.case import LENSES, Case, Lens, Option
from verify.coverage.steering import CONCEPT, chosen, foresee
from verify.layout import Layout
from verify.oracle.learning_rates import MAXIMUM, STYLES
from verify.oracle.training_plan import FROZEN, SPARE
from verify.rank_program import contract_of
from verify.runner.limits import limits
from verify.strategies.cases import Choices, completed, contract_or_none, with_options
from verify.strategies.layouts import (
    chosen_experts,
    chosen_sizes,
    experts_from_tp,
    orders,
    sizes_within,
)

_RATES: Choices = {
    "warmup": (None, 1, 2),
    "decay": (None, 2, 3),
    "annealing": (None, 1),
    "minimum": (0.0, 0.25),
    "schedule": STYLES,
}
# The default of an option comes first, and an option after those that its validity depends on.
OPTIONS: Mapping[str, Choices] = {
    "learning_rates": {
        "step": (0, 1, 4),
        **_RATES,
        "warmup": (None, 1, 2, 5),
        "decay": (None, 1, 5, 7),
        "annealing": (None, 1, 3),
        "minimum": (0.0, 0.25, 1.0),
    },
    "training_steps": {
        "optimizer": ("sgd", "adam"),
        "momentum": (0.0, 0.5),
        "weight_decay": (0.0, 0.5, 16.0),
        "clip": (None, 2.0**-4, 2.0**10),
        "norm": (2.0, 1.0, 3.0, "inf"),
        "groups": ("one", "several"),
        "frozen": FROZEN,
        "spare": SPARE,
        "loss_scale": ("none", "static", "dynamic"),
        "hysteresis": (1, 2),
        "minimum_scale": (1.0, 2.0, 4.0),
        "overflow": (0, 1, 2),
        "bucket": (None, 1, 7, 20),
        "distributed": (False, True),
        "overlap": (False, True),
        **_RATES,
        "strides": ("contiguous",),
        "zeros": ("", "mask"),
    },
}
_FAULTS: Mapping[str, tuple[Option, ...]] = {
    "bucket": (0, -1, -7),
    "clip": (0.0, -0.25, -1.0),
    "norm": (0.0, -1.0, -2.0),
    "groups": ("twice", "incomplete"),
    "schedule": ("exponential",),
    "minimum": (-0.5, 2.0),
    "hysteresis": (0, -1),
    "minimum_scale": (0.0, -1.0, 8.0),
    "decay": (None, -3),
    "warmup": (4, -1),
}
OF_SCALES = ("hysteresis", "minimum_scale")
_SCHEDULED: Mapping[str, Option] = {"schedule": "linear", "decay": 3}


@st.composite
def training_layouts(draw: st.DrawFn, *, experts: bool, max_world_size: int = 8) -> Layout:
    """Layouts of one pipeline stage, of which dp has most; of experts, in other arrangements."""
    left = limits().world_size(max_world_size)
    wanted = {"dp": (1, 2, 2, 3, 3, 4), "tp": (1, 1, 2, 3), "cp": (1, 1, 2, 3)}
    foresee(
        {**row, **more}
        for row in sizes_within(left, wanted)
        for more in (_experts_of(row) if experts else ({},))
    )
    sizes: dict[str, Any] = {**chosen_sizes(draw, left, wanted, wanted)}
    if experts:
        sizes |= chosen_experts(draw, _experts_of(sizes), tp=sizes["tp"])
    order = draw(orders(pp_last=True))
    return Layout(**sizes, order=order, sequence_parallel=chosen(draw, "sp", (False, True)))


def _experts_of(sizes: Mapping[str, int]) -> list[dict[str, int]]:
    return experts_from_tp(sizes, etp=2, ep=4)


@st.composite
def training_cases(
    draw: st.DrawFn,
    *,
    options: Choices,
    experts: Sequence[bool] = (False,),
    lenses: Sequence[Lens] = LENSES,
    min_steps: int = 1,
) -> Case:
    """Cases of `training_steps`. `options` names some and the values to draw; the others have their
    defaults."""
    concept = chosen(draw, CONCEPT, ("training_steps",))
    routed = draw(st.sampled_from(list(experts)))
    layout = draw(training_layouts(experts=routed))
    cut = layout.cp * layout.tp
    shape = {
        "steps": draw(st.integers(min_steps, 4)),
        "rounds": draw(st.integers(1, 3)),
        "sequence": cut * draw(st.integers(1, 2)),
        "batch": layout.dp * draw(st.integers(1, 2)),
        "hidden": draw(st.integers(1, 5)),
        "ffn": layout.tp * draw(st.integers(1, 3)),
    }
    if routed:
        shape["experts"] = layout.ep * draw(st.integers(1, 2))
        shape["ffn"] *= layout.expert_tp
    case = Case(concept=concept, layout=layout, shape=shape)
    case = _with_options(draw, case, options)
    return draw(completed(case, lenses))


def with_copies(cases: st.SearchStrategy[Case]) -> st.SearchStrategy[Case]:
    """Those that train copies of parameters on the ranks of dp."""
    return cases.filter(lambda case: case.layout.dp > 1)


@st.composite
def rate_cases(draw: st.DrawFn) -> Case:
    """Cases of `learning_rates`, beyond their end, but not with every rate all but zero."""
    concept = chosen(draw, CONCEPT, ("learning_rates",))
    shape = {"steps": draw(st.integers(2, 10))}
    case = Case(concept=concept, layout=Layout(), shape=shape)
    case = _with_options(draw, case, OPTIONS["learning_rates"])
    assume(contract_of(case).reference({}, {})["rates"].max() > MAXIMUM / 1024)
    return draw(completed(case, ("fp64",)))


def refusable_rate_cases() -> st.SearchStrategy[Case]:
    """Cases of `learning_rates` that begin before the first update."""
    return st.builds(
        lambda case, step: dataclasses.replace(case, options={**case.options, "step": step}),
        rate_cases(),
        st.integers(-9, -1),
    )


def _with_options(draw: st.DrawFn, case: Case, options: Choices) -> Case:
    known = {name: each for name, each in OPTIONS[case.concept].items() if name in options}
    rates = {name: known.pop(name) for name in _RATES if name in known}
    case = with_options(draw, case, known, wanted=options)
    foresee(_rates(tuple((name, tuple(options[name])) for name in rates)))
    return with_options(draw, case, rates, wanted=options)


@functools.cache
def _rates(choices: tuple[tuple[str, tuple[Option, ...]], ...]) -> list[dict[str, Option]]:
    """The values of these options that make a course of learning rates together."""
    names = [name for name, _ in choices]
    rows = [dict(zip(names, row, strict=True)) for row in product(*(each for _, each in choices))]
    course = Case(concept="learning_rates", layout=Layout(), shape={"steps": 1})
    return [
        row
        for row in rows
        if contract_or_none(dataclasses.replace(course, options=row)) is not None
    ]


@st.composite
def refusable_training_cases(draw: st.DrawFn, *, names: Sequence[str] = ()) -> Case:
    """Cases that are valid but for a size that does not divide or one option; or for one of
    `names`."""
    case = draw(training_cases(options={"optimizer": ("sgd", "adam")}, lenses=("fp64",)))
    if not names and draw(st.booleans()):
        assume(case.layout.tp > 1)
        ffn = case.shape["ffn"] + draw(st.integers(1, case.layout.tp - 1))
        return dataclasses.replace(case, shape={**case.shape, "ffn": ffn})
    name = draw(st.sampled_from(sorted(names or _FAULTS)))
    given: dict[str, Option] = {"loss_scale": "dynamic"} if name in OF_SCALES else {}
    given |= _SCHEDULED if name in ("schedule", "minimum", "decay", "warmup") else {}
    given[name] = draw(st.sampled_from(_FAULTS[name]))
    return dataclasses.replace(case, options={**case.options, **given})
