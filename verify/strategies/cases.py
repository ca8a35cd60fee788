"""Hypothesis strategies of cases: valid ones, and ones that must be refused.

They describe validity and nothing else, draw sizes that are awkward on purpose (one, primes, barely
divisible by tp, one token a rank), and shrink towards one rank, sizes of one, default options, the
first lens, seed 0 and no adversary. An option at its default is left out of the case. What this run
cannot check (`verify.runner.limits`) is not drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from verify.adversary import NONE, Adversary
from verify.case import DTYPES, LENSES, Case, Lens, Option
from verify.coverage.steering import CONCEPT, chosen, foresee, note_default
from verify.errors import BadArgument
from verify.layout import DEFAULT_ORDER, Layout
from verify.lens import generate
from verify.oracle.contract import Contract
from verify.rank_program import contract_of
from verify.replica import RankMap
from verify.runner.limits import limits
from verify.strategies.layouts import orders, sizes_within

# For some options, the values to draw from.
Choices = Mapping[str, Sequence[Option]]

MAX_WORLD_SIZE = 16
MAX_SEED = 999
NATIVE_DTYPES = DTYPES[1:]
STRIDES = ("contiguous", "transposed")

FREE, SPLIT, SEQUENCE = "any size", "a multiple of tp", "a multiple under sequence parallelism"
_TENSOR = {"sequence": FREE, "batch": FREE, "hidden": FREE}
_LINEAR = {"sequence": SEQUENCE, "batch": FREE, "in_features": FREE, "out_features": FREE}
_MAPPING_SPLITS: dict[str, tuple[str, ...]] = {
    "copy_to_tp": (),
    "reduce_from_tp": (),
    "scatter_to_tp": ("hidden",),
    "gather_from_tp": ("hidden",),
    "scatter_to_sp": ("sequence",),
    "gather_from_sp": ("sequence",),
    "reduce_scatter_to_sp": ("sequence",),
    "all_gather_last_dim": ("hidden",),
    "reduce_scatter_last_dim": ("hidden",),
    "all_to_all_sp_to_hp": ("sequence", "hidden"),
    "all_to_all_hp_to_sp": ("sequence", "hidden"),
}
MAPPINGS = tuple(_MAPPING_SPLITS)
SHAPES: Mapping[str, Mapping[str, str]] = {
    **{c: {**_TENSOR, **dict.fromkeys(split, SPLIT)} for c, split in _MAPPING_SPLITS.items()},
    "column_linear": {**_LINEAR, "out_features": SPLIT},
    "row_linear": {**_LINEAR, "in_features": SPLIT},
    "vocab_embedding": {"sequence": SEQUENCE, "batch": FREE, "vocabulary": SPLIT, "hidden": FREE},
    "vocab_cross_entropy": {"sequence": FREE, "batch": FREE, "vocabulary": SPLIT},
    "tp_mlp": {"sequence": SEQUENCE, "batch": FREE, "hidden": FREE, "ffn": SPLIT},
}
# The default of an option comes first, and an option after those that its validity depends on.
_ANY: Choices = {}
_SWITCH = (False, True)
_WEIGHTED: Choices = {
    "bias": (True, False),
    **dict.fromkeys(("skip_bias_add", "frozen_weight", "flat"), _SWITCH),
}
OPTIONS: Mapping[str, Choices] = {
    "gather_from_sp": {"tensor_parallel_output_grad": (True, False)},
    "column_linear": {**_WEIGHTED, "gather_output": (False, True)},
    "row_linear": {**_WEIGHTED, "input_is_parallel": (True, False)},
    "vocab_embedding": {"scatter": (False, True)},
    "vocab_cross_entropy": {
        "mask_padding": (False, True),
        "label_smoothing": (0.0, 0.1, 0.5),
        "z_loss": (0.0, 0.25),
        "ignored": (False, True),
        "magnitude": (1, 16, 1024),
    },
    "tp_mlp": {
        "bias": (True, False),
        "activation": ("gelu", "swiglu", "geglu", "squared_relu"),
        "packed": (True, False),
    },
}
_BY_THE_HARNESS: Choices = {"strides": STRIDES, "zeros": ("",)}


@st.composite
def layouts(
    draw: st.DrawFn,
    *,
    min_tp: int = 1,
    sequence_parallel: Sequence[bool] = (False, True),
    max_world_size: int = MAX_WORLD_SIZE,
) -> Layout:
    """Layouts of a tensor-parallel concept: tp mostly awkward, replicas along dp, cp and pp more
    often than not, in any order of axes."""
    world = limits().world_size(max_world_size)
    wanted = {"tp": _up_to(world, (1, 2, 2, 3, 3, 4, 5, 6, 7, 8), min_tp)}
    wanted |= {axis: [1, 2, 2, 3] for axis in ("dp", "cp", "pp")}
    foresee(sizes_within(world, wanted))
    tp = chosen(draw, "tp", wanted["tp"])
    sizes: dict[str, Any] = {"tp": tp}
    left = world // tp
    for axis in draw(st.permutations(("dp", "cp", "pp"))):
        # Drawn where nothing fits too: shrinking prefers few draws to small values.
        sizes[axis] = chosen(draw, axis, [size if size <= left else 1 for size in (1, 2, 2, 3)])
        left //= sizes[axis]
    order = DEFAULT_ORDER
    if sum(size > 1 for size in sizes.values()) > 1:
        order = draw(orders(pp_last=sizes["pp"] > 1 and sizes["cp"] > 1))
    flag = chosen(draw, "sp", sequence_parallel)
    return Layout(**sizes, order=order, sequence_parallel=flag)


def _up_to(most: int, sizes: Sequence[int], least: int = 1) -> list[int]:
    return [size for size in sizes if least <= size <= most]


def adversaries() -> st.SearchStrategy[Adversary]:
    """What a run may be made hard by and still be right; nothing on a cluster that cannot."""
    if not limits().adversaries:
        return st.just(NONE)
    schedules = st.none() | st.integers(0, MAX_SEED)
    return st.just(NONE) | st.builds(Adversary, late=st.just(True), schedule=schedules)


def late(case: Case) -> Case:
    """The case, and asynchronous work that ends late, in a run that has an adversary: for laws that
    nothing else can break. It does not shrink away."""
    if not limits().adversaries:
        return case
    return dataclasses.replace(case, adversary=dataclasses.replace(case.adversary, late=True))


@st.composite
def cases(
    draw: st.DrawFn,
    *concepts: str,
    lenses: Sequence[Lens] = LENSES,
    min_tp: int = 1,
    sequence_parallel: Sequence[bool] = (False, True),
    options: Choices = _ANY,
) -> Case:
    """Valid cases of these concepts.

    `options` names some and the values to draw from instead of all that they have; `lenses` and
    `sequence_parallel` restrict likewise. An option that does not go with what was drawn before it
    (gather_output with sequence parallelism) takes a value that does.
    """
    concept = chosen(draw, CONCEPT, concepts)
    flags = sequence_parallel if SEQUENCE in SHAPES[concept].values() else (False,)
    layout = draw(layouts(min_tp=min_tp, sequence_parallel=flags))
    case = Case(concept=concept, layout=layout, shape=draw(_shapes(concept, layout)))
    case = with_options(draw, case, {**OPTIONS.get(concept, {}), **_BY_THE_HARNESS}, wanted=options)
    return draw(completed(case, lenses))


@st.composite
def completed(draw: st.DrawFn, case: Case, lenses: Sequence[Lens] = LENSES) -> Case:
    """The case, its concept, layout, sizes and options, with all else that a case has."""
    lens, dtype = _arithmetic(draw, case, lenses)
    return dataclasses.replace(
        case,
        lens=lens,
        dtype=dtype,
        seed=draw(st.integers(0, MAX_SEED)),
        adversary=draw(adversaries()),
    )


def with_options(draw: st.DrawFn, case: Case, options: Choices, *, wanted: Choices) -> Case:
    """The case with one of each option's values, its default the first of them, that goes with the
    options before it; of an option that is `wanted`, one of those values instead of all."""
    for option, values in options.items():
        default = values[0]
        changes = [
            with_option(case, option, value, default=default)
            for value in wanted.get(option, values)
        ]
        valid = [changed for changed in changes if contract_or_none(changed) is not None]
        assume(valid)
        # As many to choose from whatever is valid, or a case would shrink to where the choice ends.
        changes = [each if each in valid else valid[0] for each in changes]
        case = chosen_option(draw, option, changes, default=default)
    return case


def chosen_option(draw: st.DrawFn, option: str, cases: Sequence[Case], *, default: Option) -> Case:
    """One of these cases, which differ in an option."""
    return chosen(draw, option, cases, key=lambda case: case.options.get(option, default))


def with_option(case: Case, option: str, value: Option, *, default: Option) -> Case:
    """The case with an option, which is left out where it is at its default."""
    note_default(case, option, default)
    if value == default:
        return case
    return dataclasses.replace(case, options={**case.options, option: value})


def contract_or_none(case: Case) -> Contract | None:
    """The contract of a case, None where there is none for its options and sizes."""
    try:
        return contract_of(case)
    except BadArgument:
        return None


@st.composite
def _shapes(draw: st.DrawFn, concept: str, layout: Layout) -> dict[str, int]:
    shape = {name: draw(_sizes(name, kind, layout)) for name, kind in SHAPES[concept].items()}
    if concept == "vocab_cross_entropy":
        padding = draw(st.integers(0, shape["vocabulary"] - 1))
        shape |= {"real_vocabulary": shape["vocabulary"] - padding} if padding else {}
    return shape


def _sizes(name: str, kind: str, layout: Layout) -> st.SearchStrategy[int]:
    most = 3 if name in ("sequence", "batch") else 5
    if kind == SPLIT or (kind == SEQUENCE and layout.sequence_parallel):
        return st.integers(1, most).map(lambda parts: parts * layout.tp)
    return st.integers(1, 3 if name == "batch" else 7)


def _arithmetic(draw: st.DrawFn, case: Case, lenses: Sequence[Lens]) -> tuple[Lens, str]:
    """Lens and dtype; where this run wants none that there can be, one that it will leave out."""
    possible = [lens for lens in lenses if lens != "exact" or contract_of(case).linear]
    assume(possible)
    applicable = [lens for lens in possible if lens in limits().lenses] or possible
    double = [lens for lens in applicable if lens != "native"]
    # As often float64 as the others together.
    dtypes = ["float64"] * 3 if double else []
    natives = NATIVE_DTYPES if "native" in applicable else ()
    foresee(
        [{"dtype": "float64", "lens": lens} for lens in double]
        + [{"dtype": dtype, "lens": "native"} for dtype in natives]
    )
    dtype = chosen(draw, "dtype", [*dtypes, *natives])
    return chosen(draw, "lens", double if dtype == "float64" else ["native"]), dtype


@dataclasses.dataclass(frozen=True)
class Fault:
    """What makes a valid case one to refuse: a size that does not divide by tp, the values of an
    option, with these `sizes` if any, or sequence parallelism turned the other way.
    `sequence_parallel` and `given` are what the valid case must have for that."""

    size: str = ""
    option: str = ""
    values: tuple[Option, ...] = ()
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    turned: bool = False
    sequence_parallel: tuple[bool, ...] = (False, True)
    given: Choices = dataclasses.field(default_factory=dict)


_ON = (True,)
# Only what a rank can see of itself: it is given its part of a sequence, and of the logits, and
# cannot tell whether another rank's part is as long.
FAULTS: Mapping[str, tuple[Fault, ...]] = {
    "scatter_to_tp": (Fault("hidden"),),
    "scatter_to_sp": (Fault("sequence"),),
    "reduce_scatter_to_sp": (Fault("sequence"),),
    "reduce_scatter_last_dim": (Fault("hidden"),),
    "all_to_all_sp_to_hp": (Fault("hidden"),),
    "all_to_all_hp_to_sp": (Fault("sequence"),),
    "column_linear": (
        Fault("out_features"),
        Fault(option="gather_output", values=(True,), sequence_parallel=_ON),
    ),
    "row_linear": (
        Fault("in_features"),
        Fault("sequence", sequence_parallel=_ON),
        Fault(option="input_is_parallel", values=(False,), sequence_parallel=_ON),
    ),
    "vocab_embedding": (
        Fault("vocabulary"),
        Fault("sequence", sequence_parallel=_ON, given={"scatter": (True,)}),
        Fault(turned=True, sequence_parallel=_ON, given={"scatter": (True,)}),
    ),
    "vocab_cross_entropy": (
        Fault(option="label_smoothing", values=(1.0, 1.5, -0.5)),
        Fault(option="z_loss", values=(-0.25,)),
        Fault(
            option="label_smoothing",
            values=(0.1, 0.5),
            sizes={"real_vocabulary": 1},
            given={"mask_padding": (True,)},
        ),
    ),
    "tp_mlp": (
        Fault("ffn"),
        Fault(option="activation", values=("relu", "reglu")),
        Fault(option="packed", values=(False,), given={"activation": ("squared_relu",)}),
    ),
}


@st.composite
def refusable_cases(draw: st.DrawFn, *concepts: str, faults: str = "") -> Case:
    """Cases that are valid but for one size or one option, on at least two tensor-parallel ranks,
    and must be refused by every rank. `faults` is "size" or "option" to draw only those; sequence
    parallelism counts as an option here."""
    found = [
        (concept, fault)
        for concept in concepts
        for fault in FAULTS[concept]
        if faults in ("", "size" if fault.size else "option")
    ]
    concept, fault = draw(st.sampled_from(found))
    case = draw(
        cases(
            concept,
            min_tp=2,
            sequence_parallel=fault.sequence_parallel,
            options={"strides": STRIDES[:1], **fault.given},
        )
    )
    if fault.size:
        tp = case.layout.tp
        wrong = draw(st.integers(0, 2)) * tp + draw(st.integers(1, tp - 1))
        return dataclasses.replace(case, shape={**case.shape, fault.size: wrong})
    if fault.turned:
        flag = not case.layout.sequence_parallel
        layout = dataclasses.replace(case.layout, sequence_parallel=flag)
        return dataclasses.replace(case, layout=layout)
    value = draw(st.sampled_from(fault.values))
    return dataclasses.replace(
        case,
        shape={**case.shape, **fault.sizes},
        options={**case.options, fault.option: value},
    )


def can_be_generated(case: Case) -> bool:
    """Whether there is data at which no decision of a valid case is in doubt."""
    contract = contract_of(case)
    ranks = RankMap(case.layout, contract.axes)
    try:
        for replica in ranks.replicas:
            generate(case, contract, ranks, replica)
    except BadArgument:
        return False
    return True
