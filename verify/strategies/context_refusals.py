"""Hypothesis strategies of context-parallel cases that are valid but for one thing, and that every
rank must refuse.

Only what a rank can see of itself: it is given its part of a sequence, and cannot tell whether
another rank's part is as long.
"""

from __future__ import annotations

import dataclasses
from math import lcm
from typing import Any

from hypothesis import strategies as st

from verify.case import Case
from verify.strategies.context import (
    ALGORITHMS,
    SHARING,
    attention_cases,
    block_cases,
    shared_by,
    split_cases,
)


def refusable_cases(about: str) -> st.SearchStrategy[Case]:
    """One fault. About `tokens`: a sequence that does not divide; about `heads`: heads or kv heads
    that do not divide, levels that lack; about `options`: a window where none belongs, or none
    where one does, a name that nothing has, a layer before the first."""
    return st.sampled_from(_FAULTS[about]).flatmap(lambda fault: fault())


@st.composite
def _odd_sequence(draw: st.DrawFn) -> Case:
    """Every rank's part is odd, so it does not fall into the two chunks of zigzag."""
    attention = attention_cases(masks=("causal", "full"), min_cp=2)
    case = draw(attention | split_cases("tokens_ahead", packed=(0,), min_cp=2))
    odd = case.layout.cp * (2 * draw(st.integers(0, 3)) + 1)
    return _changed(_without(case, "placement"), sequence=odd)


@st.composite
def _packed_rest(draw: st.DrawFn) -> Case:
    """The last packed sequence does not divide by the chunks."""
    case = draw(attention_cases(min_cp=2, packed=(1, 2)))
    chunks = case.layout.cp * (1 if "placement" in case.options else 2)
    return _changed(case, sequence=case.shape["sequence"] + draw(st.integers(1, chunks - 1)))


@st.composite
def _split_rest(draw: st.DrawFn) -> Case:
    case = draw(split_cases("context_split", min_cp=2))
    chunks = case.layout.cp * (1 if "placement" in case.options else 2)
    return _changed(case, sequence=case.shape["sequence"] + draw(st.integers(1, chunks - 1)))


@st.composite
def _heads(draw: st.DrawFn) -> Case:
    """The heads of a rank do not divide by the ranks that they are shared out to."""
    case = draw(attention_cases(algorithms=SHARING, min_cp=2, min_shared=2))
    shared, tp = shared_by(case.layout, str(case.options["algorithm"])), case.layout.tp
    heads = shared * draw(st.integers(0, 2)) + draw(st.integers(1, shared - 1))
    return _changed(case, heads=heads * tp, kv_heads=tp)


@st.composite
def _kv_heads(draw: st.DrawFn) -> Case:
    """The kv heads of a rank neither divide by those ranks nor divide them."""
    case = draw(attention_cases(algorithms=SHARING, min_cp=2, min_shared=2))
    shared, tp = shared_by(case.layout, str(case.options["algorithm"])), case.layout.tp
    kv_heads = draw(st.sampled_from([n for n in range(2, 8) if n % shared and shared % n]))
    return _changed(case, heads=lcm(shared, kv_heads) * tp, kv_heads=kv_heads * tp)


@st.composite
def _levels(draw: st.DrawFn) -> Case:
    case = draw(attention_cases(algorithms=("hierarchical",), min_cp=2))
    cp = case.layout.cp
    levels = draw(st.sampled_from((None, (cp,), (1, cp, 1))))
    layout = dataclasses.replace(case.layout, hierarchical_cp=levels)
    return dataclasses.replace(case, layout=layout)


@st.composite
def _window(draw: st.DrawFn) -> Case:
    case = draw(attention_cases(masks=("causal", "full", "sliding_window")))
    if case.options.get("mask") == "sliding_window":
        wrong = draw(st.sampled_from((None, 0, -1)))
        return _without(case, "window") if wrong is None else _with(case, window=wrong)
    return _with(case, window=draw(st.integers(1, 3)))


@st.composite
def _name(draw: st.DrawFn) -> Case:
    case = draw(attention_cases(masks=("causal", "full")))
    option = draw(st.sampled_from(("algorithm", "placement", "mask")))
    return _with(case, **{option: "striped"})


@st.composite
def _layer_number(draw: st.DrawFn) -> Case:
    return _with(draw(attention_cases()), layer_number=draw(st.integers(-2, -1)))


@st.composite
def _groups_over_tp(draw: st.DrawFn) -> Case:
    """The kv heads of a layer neither divide by tp nor divide it."""
    case = draw(block_cases(algorithms=ALGORITHMS[:2], min_tp=2))
    kv_heads = case.layout.tp + 1
    return _changed(case, heads=lcm(case.layout.tp, kv_heads), kv_heads=kv_heads)


_FAULTS = {
    "tokens": (_odd_sequence, _packed_rest, _split_rest),
    "heads": (_heads, _kv_heads, _groups_over_tp, _levels),
    "options": (_window, _name, _layer_number),
}


def _changed(case: Case, **sizes: int) -> Case:
    return dataclasses.replace(case, shape={**case.shape, **sizes})


def _with(case: Case, **options: Any) -> Case:
    return dataclasses.replace(case, options={**case.options, **options})


def _without(case: Case, option: str) -> Case:
    """The case with an option at its default."""
    left = {name: value for name, value in case.options.items() if name != option}
    return dataclasses.replace(case, options=left)
