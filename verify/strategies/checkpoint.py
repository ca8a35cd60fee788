"""Hypothesis strategies of checkpoints: a model, the layout that saves and the one that loads it.

The two are of as many ranks and otherwise as different as can be, or differ in the order of ranks
only; sizes are those that both need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import permutations
from math import lcm
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from verify.case import Case
from verify.coverage.steering import chosen
from verify.layout import Layout
from verify.oracle.checkpoint import (
    ANOTHER,
    DAMAGED,
    ROUND_TRIP_OPTIONS,
    ROUND_TRIP_TRAINED,
    UNLIKE,
    UNLIKE_SIZES,
    case_at,
    text_of,
    unlike,
)
from verify.oracle.interrupted_save import STOPPED
from verify.runner.limits import limits
from verify.strategies.cases import Choices, contract_or_none, with_option
from verify.strategies.context import ALGORITHMS, SHARING
from verify.strategies.gpt import model_cases
from verify.strategies.gpt_choices import DOUBLE, MODEL, OPTIMIZING
from verify.strategies.gpt_layouts import few_experts
from verify.strategies.layouts import chosen_experts, divisors, orders

WORLDS, FEW = (2, 4, 4, 2, 4, 4, 64), (2, 4, 4, 4, 64)
_LONGEST_AXIS = 4
# So long that the share of one of four ranks begins and ends within a row.
_LONG_ROW = 17
_MOST_LAYERS = 4
TRAINED: Choices = {
    name: OPTIMIZING[name]
    for name in (
        "optimizer",
        "momentum",
        "weight_decay",
        "loss_scale",
        "frozen",
        "overflow",
        "bucket",
        "overlap",
        "distributed",
    )
}
# Mostly with parameters that are on their way when they are saved.
SCHEDULED: Choices = {
    **TRAINED,
    "overlap": (False, True, True),
    "distributed": (False, True, True),
    "schedule": ("linear",),
    "warmup": (None, 1),
    "decay": (3, 4),
}
_EXPERTS = (False, True)


@st.composite
def round_trip_cases(
    draw: st.DrawFn,
    *,
    concept: str = "checkpoint",
    another: Sequence[str] = (*ANOTHER, "older", "older"),
    worlds: Sequence[int] = WORLDS,
) -> Case:
    """Cases of `checkpoint`, or of a concept with its sizes: every kind of parameter, those of
    latent attention and experts too, in shards of the optimizer or not. There is more to see beside
    `another` that is older: its number may be the greater."""
    options: Choices = {name: OPTIMIZING[name] for name in ("bucket", "distributed")}
    case = draw(
        model_cases(
            concept=concept,
            options=options,
            model={n: values[:1] for n, values in MODEL.items() if n not in ROUND_TRIP_OPTIONS},
            uneven=(False, False, True),
            experts=_EXPERTS,
            steps=(1,),
            double="exact",
            dtypes=DOUBLE,
            worlds=worlds,
        )
    )
    if another:
        beside = chosen(draw, "another", another)
        case = with_option(case, "another", beside, default=ANOTHER[0])
    split_rows = bool(case.options.get("distributed")) and draw(st.booleans())
    if split_rows:
        case = dataclasses.replace(case, shape={**case.shape, "hidden": _LONG_ROW})
    return draw(_saved_elsewhere(case, split_rows=split_rows))


@st.composite
def unlike_cases(draw: st.DrawFn) -> Case:
    """Cases of `checkpoint` to be refused: what is loaded into has one thing otherwise."""
    # Many ranks refuse it no otherwise.
    case = draw(round_trip_cases(another=(), worlds=(2, 4, 4)))
    name = chosen(draw, "unlike", (*UNLIKE_SIZES, *UNLIKE))
    found = dataclasses.replace(case, options={**case.options, "unlike": name})
    # What it has otherwise is right in itself.
    trained = dataclasses.replace(found, options={**found.options, **ROUND_TRIP_TRAINED})
    assume(contract_or_none(case_at(unlike(trained), case.layout)) is not None)
    return found


@st.composite
def damaged_cases(draw: st.DrawFn) -> Case:
    """Cases of `checkpoint` to be refused: what was saved is not all there. At the layout at which
    it was saved every rank needs what it wrote."""
    case = draw(round_trip_cases(another=(), worlds=(2, 4)))
    # There is more to see of what is altered: which file it is, and what that says.
    how = draw(st.sampled_from((*DAMAGED, "altered", "altered")))
    alone = {name: value for name, value in case.options.items() if name != "saved"}
    return dataclasses.replace(case, options={**alone, "checkpoint": how})


@st.composite
def interrupted_cases(draw: st.DrawFn) -> Case:
    """Cases of `interrupted_save`; where there is no adversary, no machine stops. Many ranks write
    no otherwise than a few."""
    case = draw(round_trip_cases(concept="interrupted_save", another=(), worlds=(2, 2, 2, 4)))
    # There is more to see of a machine.
    possible = (*STOPPED, STOPPED[1]) if limits().adversaries else STOPPED[:1]
    return with_option(case, "stopped", chosen(draw, "stopped", possible), default=STOPPED[0])


@st.composite
def resumed_cases(
    draw: st.DrawFn, *, options: Choices = SCHEDULED, worlds: Sequence[int] = FEW
) -> Case:
    """Cases of `resumed_training`: a step or two before it is saved, and after. As few layers and
    microbatches as the layouts allow: the rest is `gpt_training`'s business."""
    case = draw(
        model_cases(
            concept="resumed_training",
            options=options,
            # What a microbatch is depends on dp, and where packed sequences end on cp.
            model={
                "packed": (0,),
                "recompute": ("",),
                "evaluated": (False,),
                "balance": ("none", "sequence", "global"),
            },
            uneven=(False,),
            chunks=(1, 1, 1, 2),
            most_chunks=_MOST_LAYERS,
            experts=_EXPERTS,
            steps=(2, 2, 2, 3),
            # The bounds of float32 take many runs, and it has no main values to be lost.
            dtypes=("float64", "bfloat16", "float16"),
            worlds=worlds,
        )
    )
    least = {"microbatches": 1 if case.layout.vpp == 1 else case.layout.pp}
    least["layers"] = case.layout.pp * case.layout.vpp
    case = dataclasses.replace(case, shape={**case.shape, **least})
    after = draw(st.integers(1, case.shape["steps"] - 1))
    return draw(_saved_elsewhere(with_option(case, "after", after, default=1)))


@st.composite
def _saved_elsewhere(draw: st.DrawFn, case: Case, *, split_rows: bool = False) -> Case:
    """The case with a layout to save at, and sizes of which both layouts take parts. Layers that
    are shared out unevenly may be too many or too few for the stages of another layout: then that
    has one stage. With `split_rows` all ranks share out the states of every parameter."""
    ranks = case.layout.world_size
    # With the same sizes every stream of random numbers goes on, where its place is now.
    # What is saved at has no levels of context parallelism.
    reordered = [] if case.layout.hierarchical_cp else _reordered(case.layout)
    if split_rows:
        drawn = Layout(dp=ranks)
    elif reordered and draw(st.sampled_from((True, False, True))):
        drawn = draw(st.sampled_from(reordered))
    else:
        drawn = draw(_layouts(ranks, experts="experts" in case.shape))
    for saved in (drawn, Layout(dp=ranks)):
        given = with_option(case, "saved", text_of(saved), default=text_of(case.layout))
        grown = dataclasses.replace(given, shape=_grown(case, saved))
        if contract_or_none(grown) is not None:
            return grown
    assume(False)
    return case


def _reordered(layout: Layout) -> list[Layout]:
    """The layout with its ranks in other orders, of which some rank notices something."""

    def places(one: Layout) -> list[object]:
        ranks = range(one.world_size)
        return [(one.coordinates(rank), one.expert_coordinates(rank)) for rank in ranks]

    here = places(layout)
    others = ("-".join([*axes, "pp"]) for axes in permutations(("tp", "cp", "ep", "dp")))
    found = [dataclasses.replace(layout, order=order) for order in others]
    return [each for each in found if places(each) != here]


@st.composite
def _layouts(draw: st.DrawFn, ranks: int, *, experts: bool) -> Layout:
    """Layouts of exactly so many ranks."""
    sizes: dict[str, Any] = {}
    left = ranks
    for axis in draw(st.permutations(("tp", "pp", "cp"))):
        sizes[axis] = draw(st.sampled_from([n for n in divisors(left) if n <= _LONGEST_AXIS]))
        left //= sizes[axis]
    sizes["dp"] = left
    if 1 < sizes["pp"] < 4:
        sizes["vpp"] = draw(st.integers(1, 2))
    if experts:
        possible = few_experts(sizes)
        sizes |= chosen_experts(draw, possible, tp=sizes["tp"], choose=_any_of)
    order = draw(orders(pp_last=True))
    return Layout(**sizes, order=order, sequence_parallel=draw(st.booleans()))


def _any_of(draw: st.DrawFn, axis: str, values: Sequence[int]) -> int:
    """One of these: the layout that is saved at is none of the case's factors."""
    return draw(st.sampled_from(list(values)))


def _grown(case: Case, saved: Layout) -> dict[str, int]:
    """The sizes of a case as multiples of what a layout divides them by too."""
    shape, tp = dict(case.shape), saved.tp
    zigzag = case.options.get("placement", "zigzag") == "zigzag"
    tokens = saved.cp * (2 if zigzag else 1)
    tokens *= tp if saved.sequence_parallel or "experts" in shape else 1
    shared = saved.cp if case.options.get("algorithm", ALGORITHMS[0]) in SHARING else 1
    units = {
        "sequence": tokens,
        "batch": saved.dp,
        "groups": tp * shared,
        "ffn": lcm(tp, saved.expert_tp),
        "experts": saved.ep,
        "shared_ffn": tp,
    }
    if not {"split", "first", "last"} & set(case.options):
        units["layers"] = saved.pp * saved.vpp
    if saved.vpp > 1:
        units["microbatches"] = saved.pp
    for name, unit in units.items():
        if name in shape:
            shape[name] = lcm(shape[name], unit)
    shape["heads"] = lcm(shape["heads"], shape["groups"])
    return shape
