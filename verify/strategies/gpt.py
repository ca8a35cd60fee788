"""Hypothesis strategies of whole models that are trained: valid cases, and ones to be refused.

All axes at once, and replicas; models small enough for that, of one layer a chunk or two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import gcd, lcm
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from verify.case import Case, Option
from verify.layout import Layout
from verify.oracle.gpt.model import POSITIONS
from verify.oracle.mlp import ACTIVATIONS
from verify.oracle.norm import KINDS
from verify.runner.limits import limits
from verify.strategies.cases import MAX_SEED, Choices, completed, contract_or_none, with_option
from verify.strategies.context import ALGORITHMS, MASKS, shared_by
from verify.strategies.layouts import divisors, orders
from verify.strategies.training import OPTIONS as _TRAINING

# Few ranks show most of what can be wrong, soon; the largest worlds are those of a long run.
SMALL, LARGE = (2, 4, 4, 4), (2, 4, 4, 4, 8, 8, 16, 64)
DTYPES = ("float32", "float32", "bfloat16")
PLACEMENTS = ("zigzag", "contiguous")
SCALINGS = (0.1, 1.0)
PIPELINES = ("default", "gpipe", "1f1b", "zb-h1")
_FLAGS = (False, True)
_STEPS = _TRAINING["training_steps"]
# The default of an option comes first.
OPTIMIZING: Choices = {
    "optimizer": _STEPS["optimizer"],
    "momentum": _STEPS["momentum"],
    "weight_decay": (0.0, 0.5),
    "clip": (None, 2.0**-4, 2.0**-4, 2.0**10),
    "order": (2.0, 2.0, 1.0, "inf"),
    "groups": _STEPS["groups"],
    "loss_scale": _STEPS["loss_scale"],
    "bucket": (None, 1, 50, 400),
    "distributed": _FLAGS,
    "overlap": _FLAGS,
    "schedule": ("constant", "linear"),
    "warmup": (None, 1),
    "decay": (None, 3),
}


@st.composite
def model_layouts(
    draw: st.DrawFn,
    *,
    min_pp: int = 1,
    chunks: Sequence[int] = (1, 1, 2),
    experts: bool = False,
    shares: bool = False,
    worlds: Sequence[int] = SMALL,
) -> Layout:
    """Layouts of all axes in any order, of at most one of `worlds` ranks; with `shares` of
    attention none over cp."""
    left = limits().world_size(draw(st.sampled_from(list(worlds))))
    wanted = {"pp": (1, 2, 2, 3, 4), "dp": (1, 2, 2, 3), "tp": (1, 1, 2, 2, 3), "cp": (1, 1, 2, 3)}
    sizes: dict[str, Any] = {}
    # The first of them has the most room.
    for axis in ("pp", *draw(st.permutations(("dp", "tp", "cp")))):
        least = min_pp if axis == "pp" else 1
        fit = [n for n in wanted[axis] if least <= n <= left and not (shares and axis == "cp")]
        sizes[axis] = draw(st.sampled_from(fit or [1]))
        left //= sizes[axis]
    if sizes["pp"] > 1:
        sizes["vpp"] = draw(st.sampled_from(list(chunks)))
    if experts:
        stage = sizes["tp"] * sizes["cp"] * sizes["dp"]
        sizes |= expert_sizes(draw, tp=sizes["tp"], stage=stage)
    order = draw(orders(pp_last=True))
    return Layout(**sizes, order=order, sequence_parallel=draw(st.booleans()))


def expert_sizes(draw: st.DrawFn, *, tp: int, stage: int) -> dict[str, int | None]:
    """ep up to 4, and etp 1 or tp, of a stage of so many ranks."""
    etp = draw(st.sampled_from([n for n in {1, tp} if stage % n == 0]))
    ep = draw(st.sampled_from([n for n in divisors(stage // etp) if n <= 4]))
    return {"ep": ep, "etp": None if etp == tp else etp}


@st.composite
def model_cases(
    draw: st.DrawFn,
    *,
    options: Choices = OPTIMIZING,
    positions: Sequence[str] = POSITIONS,
    tied: Sequence[bool] = (True, False),
    dropout: Sequence[float] = (0.0,),
    attention_dropout: Sequence[float] = (0.0,),
    recompute: Sequence[str] = ("", "", "full", "selective"),
    evaluated: Sequence[bool] = _FLAGS,
    uneven: Sequence[bool] = (False, True),
    experts: Sequence[bool] = (False,),
    multi_token: Sequence[int] = (0, 0, 0, 1, 2),
    steps: Sequence[int] = (1, 1, 2),
    one_padding: bool = False,
    min_pp: int = 1,
    chunks: Sequence[int] = (1, 1, 2),
    native: Sequence[bool] = (False, False, False, True),
    worlds: Sequence[int] = SMALL,
) -> Case:
    """Cases of `gpt_training`. `options` names some of training and the values to draw; with
    `one_padding` the vocabulary is padded to what it would be on one rank."""
    routed = draw(st.sampled_from(list(experts)))
    shares = draw(st.sampled_from(list(attention_dropout)))
    layout = draw(
        model_layouts(
            min_pp=min_pp,
            chunks=chunks,
            experts=routed,
            shares=bool(shares),
            worlds=worlds,
        )
    )
    algorithm = draw(st.sampled_from(ALGORITHMS if layout.cp > 1 else ALGORITHMS[:1]))
    if algorithm == "hierarchical":
        inner = draw(st.sampled_from(divisors(layout.cp)))
        layout = dataclasses.replace(layout, hierarchical_cp=(inner, layout.cp // inner))
    placement = draw(st.sampled_from(PLACEMENTS))
    depths = draw(st.sampled_from(list(multi_token)))
    # A token that attends to itself only has a gradient of zero, of which rounding errors are seen.
    shape = draw(_sizes(layout, algorithm, placement, routed=routed, least=2 + depths))
    shape["steps"] = draw(st.sampled_from(list(steps)))
    case = Case(concept="gpt_training", layout=layout, shape=shape)
    where = draw(st.sampled_from(list(positions)))
    pairs = shape["head_size"] // 2
    given: list[tuple[str, Option, Option]] = [
        ("algorithm", algorithm, ALGORITHMS[0]),
        ("placement", placement, PLACEMENTS[0]),
        ("positions", where, POSITIONS[0]),
        ("rotary_dim", 2 * draw(st.integers(1, pairs)) if where == "rotary" else None, None),
        ("tied", draw(st.sampled_from(list(tied))), True),
        ("hidden_dropout", draw(st.sampled_from(list(dropout))), 0.0),
        ("attention_dropout", shares, 0.0),
        ("recompute", draw(st.sampled_from(list(recompute))), ""),
        ("evaluated", draw(st.sampled_from(list(evaluated))), False),
        ("every", draw(st.integers(1, 2)) if routed else 1, 1),
        ("multi_token", depths, 0),
        ("multi_token_scaling", draw(st.sampled_from(SCALINGS)) if depths else 0.1, 0.1),
    ]
    case = draw(_with_layers(_with_options(case, given), routed=routed))
    case = draw(_padded(case, one_padding=one_padding))
    if draw(st.sampled_from(list(uneven))):
        case = draw(_uneven(case))
    case = draw(_trained(case, options))
    case = draw(completed(case, ("fp64",)))
    lenses = ["native" if each else "fp64" for each in native]
    wanted = [lens for lens in lenses if lens in limits().lenses] or lenses
    if draw(st.sampled_from(wanted)) == "native":
        case = dataclasses.replace(case, lens="native", dtype=draw(st.sampled_from(DTYPES)))
    if not case.adversary:
        return case
    hard = dataclasses.replace(case.adversary, rendezvous=draw(st.booleans()))
    return dataclasses.replace(case, adversary=hard)


def _with_options(case: Case, given: Sequence[tuple[str, Option, Option]]) -> Case:
    """The case with options, of which name, value and default are given."""
    for name, value, default in given:
        case = with_option(case, name, value, default=default)
    return case


@st.composite
def _with_layers(draw: st.DrawFn, case: Case, *, routed: bool) -> Case:
    """The case with what its layers are, and the schedule of its pipeline."""
    mask, kind = draw(st.sampled_from(MASKS)), draw(st.sampled_from(KINDS))
    activations = ("gelu", "swiglu") if routed else ACTIVATIONS
    given: list[tuple[str, Option, Option]] = [
        ("mask", mask, MASKS[0]),
        ("window", 2 if mask == "sliding_window" else None, None),
        ("norm", kind, KINDS[0]),
        ("activation", draw(st.sampled_from(activations)), ACTIVATIONS[0]),
        # A bias of all keys, which a layer norm of heads has, has no gradient but rounding errors.
        ("qk_norm", kind == "rms" and draw(st.sampled_from(_FLAGS)), False),
        ("zero_centered", draw(st.sampled_from(_FLAGS)), False),
        ("bias", draw(st.sampled_from((True, False))), True),
    ]
    if case.layout.vpp == 1:
        given.append(("pipeline", draw(st.sampled_from(PIPELINES)), PIPELINES[0]))
    return _with_options(case, given)


@st.composite
def _padded(draw: st.DrawFn, case: Case, *, one_padding: bool) -> Case:
    """The case with what its vocabulary is padded to a multiple of."""
    multiple = draw(st.integers(1, 3))
    if one_padding:
        padded = multiple * case.layout.tp * draw(st.integers(1, 3))
        vocabulary = padded - draw(st.integers(0, multiple - 1))
        case = dataclasses.replace(case, shape={**case.shape, "vocabulary": vocabulary})
    return with_option(case, "multiple", multiple, default=1)


@st.composite
def _sizes(
    draw: st.DrawFn, layout: Layout, algorithm: str, placement: str, *, routed: bool, least: int
) -> dict[str, int]:
    """Sizes that divide as the layout asks, and no larger than that by much; sequences have `least`
    tokens or more."""
    tp, chunks = layout.tp, layout.pp * layout.vpp
    shared = shared_by(layout, algorithm)
    groups = draw(st.sampled_from([tp * shared, tp, *divisors(tp)]))
    size = draw(st.integers(2, 4))
    unit = layout.cp * (2 if placement == "zigzag" else 1)
    # Without sequence parallelism, experts share out the tokens of a tp group.
    unit *= tp if layout.sequence_parallel or routed else 1
    grouped = layout.vpp > 1
    microbatches = layout.pp if grouped else draw(st.sampled_from((1, 2, 2, 3)))
    shape = {
        "microbatches": microbatches,
        "sequence": unit * max(draw(st.integers(1, 2)), -(-least // unit)),
        "batch": layout.dp * draw(st.integers(1, 2)),
        "hidden": draw(st.integers(3, 5)),
        "heads": tp * shared * draw(st.integers(1, 2)),
        "groups": groups,
        "head_size": size * (tp // gcd(tp, 2 * groups * size)),
        "ffn": tp * draw(st.integers(1, 2)),
        "layers": chunks * draw(st.integers(1, 2 if chunks <= 2 else 1)),
        "vocabulary": draw(st.integers(2, 9)),
    }
    if routed:
        shape["ffn"] = lcm(tp, layout.expert_tp) * draw(st.integers(1, 2))
        shape["experts"] = layout.ep * draw(st.integers(1, 2))
        shape["top_k"] = draw(st.integers(1, min(shape["experts"], 2)))
        if draw(st.booleans()):
            shape["shared_ffn"] = tp * draw(st.integers(1, 2))
    return shape


@st.composite
def _uneven(draw: st.DrawFn, case: Case) -> Case:
    """The case with other numbers of layers on the first stage, the last, or every chunk."""
    layout, chunks = case.layout, case.layout.pp * case.layout.vpp
    if chunks == 1:
        return case
    if draw(st.booleans()):
        ends, most = {0, chunks - 1}, 2 if chunks < 4 else 1
        counts = [draw(st.integers(0 if k in ends else 1, most)) for k in range(chunks)]
        assume(sum(counts))
        shape = {**case.shape, "layers": sum(counts)}
        options = {**case.options, "split": ",".join(map(str, counts))}
        return dataclasses.replace(case, shape=shape, options=options)
    each = case.shape["layers"] // layout.pp
    layers, options = case.shape["layers"], dict(case.options)
    # A first stage that gives an option to a single other stage says it all.
    for name in draw(st.sampled_from((("first",), ("last",), ("first", "last")))):
        own = layout.vpp * draw(st.integers(1, 2 if chunks < 4 else 1))
        layers += own - each
        options[name] = own
    return dataclasses.replace(case, shape={**case.shape, "layers": layers}, options=options)


@st.composite
def _trained(draw: st.DrawFn, case: Case, options: Choices) -> Case:
    """The case with options of training, which are checked together: a schedule needs an end."""
    for name, values in options.items():
        value = draw(st.sampled_from(list(values)))
        case = with_option(case, name, value, default=OPTIMIZING[name][0])
    if "schedule" in case.options and "decay" not in case.options:
        case = with_option(case, "decay", 3, default=None)
    if case.options.get("optimizer") == "adam":
        # It makes steps of rounding errors, where a gradient is zero: that of a bias of all keys.
        case = with_option(case, "bias", False, default=True)
        others = {n: v for n, v in case.options.items() if n != "momentum"}
        case = dataclasses.replace(case, options=others)
    assume(contract_or_none(case) is not None)
    return case


@st.composite
def refusable_model_cases(draw: st.DrawFn) -> Case:
    """Cases that are valid but for one size or option."""
    case = draw(
        model_cases(
            options={"optimizer": ("sgd", "adam")},
            uneven=(False,),
            min_pp=2,
            native=(False,),
        )
    )
    chunks = case.layout.pp * case.layout.vpp
    layers = case.shape["layers"]
    faults: list[tuple[dict[str, int], dict[str, Option]]] = [
        ({"layers": layers + draw(st.integers(1, chunks - 1))}, {}),
        ({}, {"first": layers + chunks}),
        ({}, {"split": ",".join(["1"] * (chunks + 1))}),
        ({}, {"split": ",".join(map(str, [layers + 1] * chunks))}),
        ({}, {"pipeline": "dualpipe"}),
        ({}, {"positions": "sinusoidal"}),
        ({}, {"hidden_dropout": 1.0}),
        ({}, {"multiple": -2}),
        ({}, {"clip": -1.0}),
        ({}, {"multi_token": -2}),
        ({}, {"multi_token_scaling": -0.5}),
    ]
    if case.layout.vpp > 1:
        faults.append(({"microbatches": case.layout.pp * 2 + 1}, {}))
        faults.append(({}, {"pipeline": "1f1b"}))
    shape, options = draw(st.sampled_from(faults))
    return dataclasses.replace(
        case,
        shape={**case.shape, **shape},
        options={**case.options, **options},
        seed=draw(st.integers(0, MAX_SEED)),
    )
