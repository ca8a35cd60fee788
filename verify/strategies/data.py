"""Hypothesis strategies of data: texts, orders of their samples, what divides over dp and cp."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import strategies as st

from verify.case import Case, Option
from verify.coverage.steering import CONCEPT, chosen, foresee
from verify.layout import Layout
from verify.runner.limits import limits
from verify.strategies.cases import completed, with_option
from verify.strategies.context import PLACEMENTS
from verify.strategies.layouts import chosen_sizes, orders, sizes_within

MAX_WORLD_SIZE = 8


@st.composite
def batch_cases(draw: st.DrawFn) -> Case:
    """Cases of `batches`: texts of few samples, so that they come again, with tokens left over."""
    concept = chosen(draw, CONCEPT, ("batches",))
    layout = draw(_layouts())
    placement = chosen(draw, "placement", PLACEMENTS)
    chunks = layout.cp * (2 if placement == "zigzag" else 1)
    sequence = chunks * draw(st.integers(1, 3))
    shape = {
        "length": sequence * draw(st.integers(1, 9)) + draw(st.integers(1, sequence)),
        "sequence": sequence,
        "batch": layout.dp * draw(st.integers(1, 3)),
        "microbatches": draw(st.integers(1, 3)),
    }
    case = Case(concept=concept, layout=layout, shape=shape)
    case = with_option(case, "placement", placement, default=PLACEMENTS[0])
    case = with_option(case, "consumed", draw(st.integers(0, 7)), default=0)
    return draw(completed(case, ("exact",)))


@st.composite
def order_cases(draw: st.DrawFn) -> Case:
    """Cases of `sample_order`."""
    concept = chosen(draw, CONCEPT, ("sample_order",))
    layout = draw(_layouts())
    shape = {
        "samples": draw(st.integers(1, 20)),
        "batch": layout.dp * draw(st.integers(1, 3)),
        "microbatches": draw(st.integers(1, 3)),
    }
    return draw(completed(Case(concept=concept, layout=layout, shape=shape), ("exact",)))


@st.composite
def refusable_batch_cases(draw: st.DrawFn) -> Case:
    """Cases of `batches` of rows that do not divide by dp, of tokens that do not by cp, of a text
    of no sample, or after less than none."""
    case = draw(batch_cases())
    dp, cp, sequence = case.layout.dp, case.layout.cp, case.shape["sequence"]
    # In a message a size of one says nothing.
    short = {"sequence": 2 * sequence, "length": draw(st.integers(1, 2 * sequence))}
    wrong: list[tuple[dict[str, int], dict[str, Option]]] = [
        (short, {}),
        ({}, {"consumed": draw(st.integers(-9, -1))}),
    ]
    # A microbatch of all ranks, and two rows more.
    wrong += [({"batch": dp + 1, "microbatches": 2}, {})] if dp > 1 else []
    wrong += [({"sequence": sequence + 1, "length": 2 * sequence + 3}, {})] if cp > 1 else []
    shape, options = draw(st.sampled_from(wrong))
    return dataclasses.replace(
        case, shape={**case.shape, **shape}, options={**case.options, **options}
    )


@st.composite
def _layouts(draw: st.DrawFn) -> Layout:
    """Layouts that share out samples over dp and their tokens over cp."""
    most = limits().world_size(MAX_WORLD_SIZE)
    wanted = {"dp": (1, 2, 2, 3, 4), "cp": (1, 2, 2, 3, 4), "tp": (1, 2), "pp": (1, 2)}
    foresee(sizes_within(most, wanted))
    sizes: dict[str, Any] = chosen_sizes(draw, most, wanted, draw(st.permutations(tuple(wanted))))
    return Layout(**sizes, order=draw(orders(pp_last=sizes["pp"] > 1 and sizes["cp"] > 1)))
