"""Hypothesis strategies of training steps and learning rates: valid cases, and ones to be refused.

Tokens are few, so that ranks and rounds often have none that counts; dp is two or three, so that
neither parameters nor buckets divide; buckets hold one parameter, some, or all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from verify.case import LENSES, Case, Lens, Option
from verify.coverage.steering import CONCEPT, chosen
from verify.layout import Layout
from verify.oracle.learning_rates import STYLES
from verify.runner.limits import limits
from verify.strategies.cases import Choices, completed, contract_or_none, with_option
from verify.strategies.layouts import divisors, orders

_RATES: Choices = {
    "schedule": STYLES,
    "warmup": (None, 1, 2),
    "decay": (None, 2, 3),
    "annealing": (None, 1),
    "minimum": (0.0, 0.25),
}
# The default of an option comes first.
OPTIONS: Mapping[str, Choices] = {
    "learning_rates": {
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
        "frozen": ("", "norm", "mlp.fc1", "mlp"),
        "loss_scale": ("none", "static", "dynamic"),
        "hysteresis": (1, 2),
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
    "bucket": (-1, -7),
    "clip": (-0.25, -1.0),
    "norm": (-1.0, -2.0),
    "groups": ("twice", "incomplete"),
    "schedule": ("exponential",),
    "minimum": (-0.5, 2.0),
    "hysteresis": (-1,),
}


@st.composite
def training_layouts(draw: st.DrawFn, *, experts: bool, max_world_size: int = 8) -> Layout:
    """Layouts of one pipeline stage, of which dp has most; of experts, in other arrangements."""
    left = limits().world_size(max_world_size)
    sizes: dict[str, Any] = {}
    for axis, wanted in (("dp", (1, 2, 2, 3, 3, 4)), ("tp", (1, 1, 2, 3)), ("cp", (1, 1, 2, 3))):
        sizes[axis] = chosen(draw, axis, [n for n in wanted if n <= left])
        left //= sizes[axis]
    if experts:
        stage = sizes["tp"] * sizes["cp"] * sizes["dp"]
        tp = sizes["tp"]
        etp = chosen(draw, "etp", [n for n in (tp, *divisors(stage)) if n <= 2 or n == tp])
        sizes["ep"] = chosen(draw, "ep", [n for n in divisors(stage // etp) if n <= 4])
        sizes["etp"] = None if etp == sizes["tp"] else etp
    order = draw(orders(pp_last=True))
    return Layout(**sizes, order=order, sequence_parallel=chosen(draw, "sp", (False, True)))


@st.composite
def training_cases(
    draw: st.DrawFn,
    *,
    options: Choices,
    experts: Sequence[bool] = (False,),
    lenses: Sequence[Lens] = LENSES,
) -> Case:
    """Cases of `training_steps`. `options` names some and the values to draw; the others have their
    defaults."""
    concept = chosen(draw, CONCEPT, ("training_steps",))
    routed = draw(st.sampled_from(list(experts)))
    layout = draw(training_layouts(experts=routed))
    cut = layout.cp * layout.tp
    shape = {
        "steps": draw(st.integers(1, 4)),
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
    case = draw(_with_options(case, options))
    return draw(completed(case, lenses))


@st.composite
def rate_cases(draw: st.DrawFn) -> Case:
    """Cases of `learning_rates`, beyond their end."""
    concept = chosen(draw, CONCEPT, ("learning_rates",))
    shape = {"steps": draw(st.integers(2, 10))}
    case = Case(concept=concept, layout=Layout(), shape=shape)
    return draw(completed(draw(_with_options(case, OPTIONS["learning_rates"])), ("fp64",)))


@st.composite
def _with_options(draw: st.DrawFn, case: Case, options: Choices) -> Case:
    """The case with options, which are checked together: a schedule alone has no end."""
    known = OPTIONS[case.concept]
    for name, values in options.items():
        value = chosen(draw, name, values)
        case = with_option(case, name, value, default=known[name][0])
    assume(contract_or_none(case) is not None)
    return case


@st.composite
def refusable_training_cases(draw: st.DrawFn) -> Case:
    """Cases that are valid but for a size that does not divide or one option."""
    case = draw(training_cases(options={"optimizer": ("sgd", "adam")}, lenses=("fp64",)))
    if draw(st.booleans()):
        assume(case.layout.tp > 1)
        ffn = case.shape["ffn"] + draw(st.integers(1, case.layout.tp - 1))
        return dataclasses.replace(case, shape={**case.shape, "ffn": ffn})
    name = draw(st.sampled_from(sorted(_FAULTS)))
    given: dict[str, Option] = {name: draw(st.sampled_from(_FAULTS[name]))}
    given |= {"loss_scale": "dynamic"} if name == "hysteresis" else {}
    given |= {"schedule": "linear", "decay": 3} if name == "minimum" else {}
    return dataclasses.replace(case, options={**case.options, **given})
