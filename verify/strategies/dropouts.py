"""Cases whose dropout masks are large enough to tell one stream for all ranks from chance."""

from __future__ import annotations

import dataclasses
from math import ceil, prod

from hypothesis import strategies as st

from verify.case import Case
from verify.checks.masks import enough, sizes_of
from verify.placement import Cut
from verify.replica import RankMap
from verify.strategies.cases import contract_or_none


@st.composite
def telling(draw: st.DrawFn, cases: st.SearchStrategy[Case]) -> Case:
    """Most cases with a batch so large that parts of every mask which are dropped alike are no
    coincidence; the others as small as they come."""
    case = draw(cases)
    large = draw(st.sampled_from((False, True, True, True)))
    return with_telling_masks(case) if large else case


def with_telling_masks(case: Case) -> Case:
    """The case with as many times its batch as each rank's part of every mask needs."""
    contract = contract_or_none(case)
    if contract is None or not contract.masks:
        return case
    sizes = sizes_of(RankMap(case.layout, contract.axes))
    times = 1
    for mask in contract.masks.values():
        parts = prod(sizes[axis] for axis, at in mask.placements.items() if isinstance(at, Cut))
        times = max(times, ceil(enough(mask.p) * parts / prod(mask.shape)))
    return dataclasses.replace(case, shape={**case.shape, "batch": case.shape["batch"] * times})
