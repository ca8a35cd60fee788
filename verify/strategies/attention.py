"""Hypothesis strategies of attention's cases: valid ones, and ones that must be refused.

Heads are a few times tp; groups are any number that divides them and is a multiple or a divisor of
tp, with one group (multi-query) and as many groups as heads among them. What every concept's
strategies have in common is in `verify.strategies.cases`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from math import gcd, lcm

from hypothesis import strategies as st

from verify.case import LENSES, Case, Lens, Option
from verify.coverage.steering import CONCEPT, chosen
from verify.layout import Layout
from verify.strategies.cases import STRIDES, Choices, completed, layouts, with_option

Shape = dict[str, int]

# A second group of every kind beside six ranks that share heads.
MAX_WORLD_SIZE = 12

# The default of an option comes first.
_SCORING: Choices = {
    "causal": (True, False),
    "window": (None, 1, 2, 4),
    "padding": (False, True),
    "alibi": (False, True),
    "sink": (False, True),
    "layer_number": (None, 1, 2, 5),
    "scale": (None, 0.25),
    "dropout": (0.0, 0.1, 0.5),
}
_BEFORE: Choices = {
    "norm": ("none", "rms", "layer"),
    "rotary": (False, True),
    "interleaved": (False, True),
}
OPTIONS: Mapping[str, Choices] = {
    "core_attention": _SCORING,
    "self_attention": {"bias": (True, False), **_BEFORE, **_SCORING},
    "latent_attention": {**_BEFORE, **_SCORING},
}
BLOCKS = ("self_attention", "latent_attention")
# The features that are enough for a norm: see `_applies`.
_LEAST_NORMALISED = 4
# Nothing at random, so that two layouts can be compared.
CERTAIN: Choices = {"dropout": (0.0,), "strides": STRIDES[:1]}


@st.composite
def attention_cases(
    draw: st.DrawFn,
    *concepts: str,
    lenses: Sequence[Lens] = LENSES,
    min_tp: int = 1,
    sequence_parallel: Sequence[bool] = (False, True),
    options: Choices = CERTAIN,
    training: bool = True,
) -> Case:
    """Valid cases of these concepts. `options` names some and the values to draw from instead of
    all that they have."""
    concept = chosen(draw, CONCEPT, concepts)
    flags = sequence_parallel if concept in BLOCKS else (False,)
    layout = draw(layouts(min_tp=min_tp, sequence_parallel=flags, max_world_size=MAX_WORLD_SIZE))
    case = Case(concept=concept, layout=layout, shape=draw(_shapes(concept, layout, options)))
    for option, values in {**OPTIONS[concept], "strides": STRIDES, "magnitude": (1,)}.items():
        wanted = options.get(option, values)
        if not _applies(option, case):
            wanted = values[:1]
        case = with_option(case, option, chosen(draw, option, wanted), default=values[0])
    case = with_option(case, "training", training, default=True)
    return draw(completed(case, lenses))


def _applies(option: str, case: Case) -> bool:
    """Whether an option can have every value. Features are turned in pairs. What is normalised has
    enough of them for a gradient to be more than what rounding leaves of terms that cancel: of one
    feature it has none, of a token with one nor."""
    shape = case.shape
    if option == "rotary":
        return shape.get("rope_size", shape["head_size"]) % 2 == 0
    if option == "interleaved":
        return bool(case.options.get("rotary"))
    if option == "norm" and case.concept == "latent_attention":
        latents = (shape["kv_lora"], shape.get("q_lora", _LEAST_NORMALISED))
        return min(shape["hidden"], *latents) >= _LEAST_NORMALISED
    return option != "norm" or shape["head_size"] >= _LEAST_NORMALISED


@st.composite
def _core(draw: st.DrawFn, layout: Layout) -> Shape:
    heads = layout.tp * draw(st.integers(1, 4))
    groups = [n for n in _divisors(heads) if n == 1 or n % layout.tp == 0]
    shape = {
        "sequence": draw(st.integers(1, 7)),
        "batch": draw(st.integers(1, 3)),
        "heads": heads,
        "groups": draw(st.sampled_from(groups)),
        "head_size": draw(st.integers(1, 5)),
    }
    optional = {"key_sequence": draw(st.integers(0, 7)), "value_size": draw(st.integers(0, 5))}
    return shape | {name: size for name, size in optional.items() if size}


@st.composite
def _self(draw: st.DrawFn, layout: Layout, least: int, pairs: bool) -> Shape:
    tp = layout.tp
    heads = tp * draw(st.integers(1, 4))
    # Simplest first: as many groups as heads.
    valid = [n for n in _divisors(heads)[::-1] if n % tp == 0 or tp % n == 0]
    groups = draw(st.sampled_from(valid))
    unit = tp // gcd(tp, heads + 2 * groups)
    unit = lcm(unit, 2) if pairs else unit
    fewest = -(-least // unit)
    return {
        "sequence": draw(_sequences(layout)),
        "batch": draw(st.integers(1, 3)),
        "hidden": draw(st.integers(1, 7)),
        "heads": heads,
        "groups": groups,
        "head_size": unit * draw(st.integers(fewest, max(5 // unit, fewest))),
    }


@st.composite
def _latent(draw: st.DrawFn, layout: Layout, least: int, pairs: bool) -> Shape:
    shape = {
        "sequence": draw(_sequences(layout)),
        "batch": draw(st.integers(1, 3)),
        "hidden": draw(st.integers(least, 8)),
        "heads": layout.tp * draw(st.integers(1, 3)),
        "kv_lora": draw(st.integers(least, 8)),
    }
    shape |= {name: draw(st.integers(1, 5)) for name in ("head_size", "value_size")}
    shape["rope_size"] = draw(st.sampled_from((2, 4) if pairs else range(1, 6)))
    inner = draw(st.sampled_from((0, *range(least, 9))))
    return shape | ({"q_lora": inner} if inner else {})


def _shapes(concept: str, layout: Layout, options: Choices) -> st.SearchStrategy[Shape]:
    """If every allowed value of an option needs them, features are enough, or pairs."""
    least = 1 if "none" in options.get("norm", ("none",)) else _LEAST_NORMALISED
    pairs = False not in options.get("rotary", (False,))
    if concept == "core_attention":
        return _core(layout)
    return (
        _self(layout, least, pairs)
        if concept == "self_attention"
        else _latent(layout, least, pairs)
    )


def _sequences(layout: Layout) -> st.SearchStrategy[int]:
    if layout.sequence_parallel:
        return st.integers(1, 3).map(lambda parts: parts * layout.tp)
    return st.integers(1, 7)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


_FAULTY_VALUES: Mapping[str, Sequence[Option]] = {
    "window": (-1, -4),
    "layer_number": (-1, -2),
    "dropout": (1.0, 1.5, -0.5),
}


@st.composite
def refusable_attention_cases(draw: st.DrawFn, *concepts: str) -> Case:
    """Cases on at least two tensor-parallel ranks that every rank must refuse, because one thing is
    wrong: heads that do not divide by tp, heads that groups do not divide, groups that neither
    divide by tp nor divide it, rows of packed queries, keys and values that do not divide by tp, or
    an option out of range."""
    case = draw(attention_cases(*concepts, min_tp=2))
    tp, faults = case.layout.tp, ["option", "heads"]
    faults += ["groups", "sharing"] if case.concept == "self_attention" else []
    faults += ["rows"] if case.concept == "self_attention" and tp > 2 else []
    fault = draw(st.sampled_from(faults))
    if fault == "option":
        option = draw(st.sampled_from(sorted(_FAULTY_VALUES)))
        value = draw(st.sampled_from(_FAULTY_VALUES[option]))
        found = dataclasses.replace(case, options={**case.options, option: value})
        # Also where nothing would be dropped.
        training = option != "dropout" or draw(st.booleans())
        return with_option(found, "training", training, default=True)
    shape = draw(_FAULTY_HEADS[fault](tp))
    if "groups" not in case.shape:
        del shape["groups"]
    return dataclasses.replace(case, shape={**case.shape, **shape})


def _unequal_heads(tp: int) -> st.SearchStrategy[Shape]:
    heads = st.builds(lambda whole, rest: whole * tp + rest, st.integers(0, 2), _rests(tp))
    return heads.map(lambda n: {"heads": n, "groups": n})


def _unshared_heads(tp: int) -> st.SearchStrategy[Shape]:
    """A rank's 2 to 5 groups do not divide its heads, of which there are fewer than two a group."""
    unfit = [(n, groups) for groups in range(2, 6) for n in range(1, 2 * groups) if n % groups]
    return st.sampled_from(unfit).map(lambda own: {"heads": own[0] * tp, "groups": own[1] * tp})


def _unfit_groups(tp: int) -> st.SearchStrategy[Shape]:
    unfit = [n for n in range(2, 10) if n % tp and tp % n]
    return st.sampled_from(unfit).map(lambda n: {"heads": lcm(tp, n), "groups": n})


def _uneven_rows(tp: int) -> st.SearchStrategy[Shape]:
    """One group: with a head_size of 1, its rows are 2 modulo tp."""
    heads = st.integers(1, 3).map(lambda parts: parts * tp)
    return heads.map(lambda n: {"heads": n, "groups": 1, "head_size": 1})


def _rests(tp: int) -> st.SearchStrategy[int]:
    return st.integers(1, tp - 1)


_FAULTY_HEADS: Mapping[str, Callable[[int], st.SearchStrategy[Shape]]] = {
    "heads": _unequal_heads,
    "sharing": _unshared_heads,
    "groups": _unfit_groups,
    "rows": _uneven_rows,
}
