"""Hypothesis strategies of cases in which one input does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from hypothesis import assume
from hypothesis import strategies as st

from verify.case import Case
from verify.misfit import OPTION, SHAPES, misfits


@st.composite
def misfit_cases(
    draw: st.DrawFn,
    valid: st.SearchStrategy[Case],
    how: Collection[str] = SHAPES,
    tensors: Collection[str] = (),
) -> Case:
    """Cases that are valid but for one input, of these `tensors` if given, which has a size in a
    dimension, or as many dimensions, that one device raises an error for; or, by `how`, an
    index."""
    case = draw(valid)
    found = misfits(case, how, tensors)
    assume(found)
    options = {**case.options, OPTION: str(draw(st.sampled_from(found)))}
    return dataclasses.replace(case, options=options)
