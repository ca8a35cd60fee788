"""Hypothesis strategies of pipelines: schedules as tables, and a stack of layers that runs them.

What every concept's strategies have in common is in `verify.strategies.cases`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from verify.adversary import NONE, Adversary
from verify.case import LENSES, Case, Lens
from verify.coverage.steering import chosen
from verify.layout import DEFAULT_ORDER, Layout
from verify.oracle.pipeline import SCHEDULES, schedule_of
from verify.runner.limits import limits
from verify.schedules.check import CONCEPT
from verify.schedules.laws import KINDS
from verify.strategies.cases import MAX_SEED, MAX_WORLD_SIZE, STRIDES, completed, with_option

MAX_STAGES = 8
_ORDERS = (DEFAULT_ORDER, "pp-tp-cp-ep-dp", "tp-cp-ep-pp-dp")
_FLAGS = (False, True)


@st.composite
def schedule_cases(draw: st.DrawFn) -> Case:
    """Tables of every kind, for few and for many microbatches; interleaved ones for multiples of
    pp. They need no ranks, but none is larger than the worlds of the run."""
    pp = draw(st.integers(1, limits().world_size(MAX_STAGES)))
    kind = draw(st.sampled_from(KINDS))
    interleaved = kind == "interleaved"
    vpp = draw(st.integers(1, 4)) if interleaved and pp > 1 else 1
    microbatches = draw(st.integers(1, 4)) * pp if interleaved else draw(st.integers(1, 3 * pp + 2))
    case = Case(
        concept=CONCEPT, layout=Layout(pp=pp, vpp=vpp), shape={"microbatches": microbatches}
    )
    return with_option(case, "kind", kind, default=KINDS[0])


@st.composite
def pipeline_cases(
    draw: st.DrawFn,
    *,
    min_pp: int = 1,
    schedules: Sequence[str] = SCHEDULES,
    variable: Sequence[bool] = _FLAGS,
    rounds: Sequence[int] = (1, 1, 2),
    freed: Sequence[bool] = (False,),
    strides: Sequence[str] = STRIDES[:1],
    lenses: Sequence[Lens] = LENSES[1:],
) -> Case:
    """Stacks of layers on pipelines of any schedule, beside replicas: often with fewer microbatches
    than stages, with several chunks a stage, with microbatches of different lengths."""
    concept = chosen(draw, "concept", ("pipeline",))
    layout = draw(_layouts(min_pp=min_pp, chunks="interleaved" in schedules))
    allowed = [s for s in schedules if layout.vpp == 1 or s in ("default", "interleaved")]
    case = Case(concept=concept, layout=layout)
    case = with_option(case, "schedule", chosen(draw, "schedule", allowed), default=SCHEDULES[0])
    count = chosen(draw, "rounds", rounds)
    case = with_option(case, "rounds", count, default=1)
    each = draw(st.integers(1, 2 if schedule_of(case) == "interleaved" else layout.pp + 1))
    each *= layout.pp if schedule_of(case) == "interleaved" else 1
    chunks = layout.pp * layout.vpp
    shape = {
        "microbatches": count * each,
        "sequence": draw(st.integers(1, 3)),
        "batch": draw(st.integers(1, 2)),
        "hidden": draw(st.integers(1, 3)),
        "layers": chunks * draw(st.integers(1, 2 if chunks <= 6 else 1)),
    }
    case = dataclasses.replace(case, shape=shape)
    case = with_option(case, "variable", chosen(draw, "variable", variable), default=False)
    case = with_option(case, "overlap", chosen(draw, "overlap", (True, False)), default=True)
    case = with_option(case, "evaluated", chosen(draw, "evaluated", _FLAGS), default=False)
    case = with_option(case, "frozen_weight", chosen(draw, "frozen_weight", _FLAGS), default=False)
    case = with_option(case, "shared", chosen(draw, "shared", _FLAGS), default=False)
    case = with_option(case, "freed", chosen(draw, "freed", freed), default=False)
    case = with_option(case, "strides", chosen(draw, "strides", strides), default=STRIDES[0])
    case = draw(completed(case, lenses))
    return dataclasses.replace(case, adversary=draw(_adversaries()))


def _adversaries() -> st.SearchStrategy[Adversary]:
    """Late receives, and sends that are done only when they are received: on their own and both."""
    if not limits().adversaries:
        return st.just(NONE)
    schedules = st.none() | st.integers(0, MAX_SEED)
    return st.builds(Adversary, late=st.booleans(), rendezvous=st.booleans(), schedule=schedules)


@st.composite
def _layouts(draw: st.DrawFn, *, min_pp: int, chunks: bool) -> Layout:
    world = limits().world_size(MAX_WORLD_SIZE)
    pp = chosen(draw, "pp", [n for n in (1, 2, 2, 3, 3, 4) if min_pp <= n <= world])
    sizes: dict[str, Any] = {"pp": pp}
    left = min(world // pp, 2)
    for axis in draw(st.permutations(("dp", "tp"))):
        sizes[axis] = chosen(draw, axis, [n for n in (1, 1, 2) if n <= left])
        left //= sizes[axis]
    vpp = chosen(draw, "vpp", (1, 2, 3)) if chunks and pp > 1 else 1
    order = draw(st.sampled_from(_ORDERS)) if pp > 1 else DEFAULT_ORDER
    return Layout(**sizes, vpp=vpp, order=order)


@st.composite
def refusable_pipeline_cases(draw: st.DrawFn) -> Case:
    """Cases with layers that do not divide by the chunks, several chunks where the schedule has
    one, microbatches that interleaved cannot group, rounds that do not divide them, and schedules
    that there are not."""
    case = draw(pipeline_cases(min_pp=2))
    case = dataclasses.replace(case, adversary=NONE)
    chunks = case.layout.pp * case.layout.vpp
    # There is more to see of microbatches.
    faults = ("microbatches", "microbatches", "schedule", "chunks", "layers", "rounds")
    fault = draw(st.sampled_from(faults))
    shape, options, layout = dict(case.shape), dict(case.options), case.layout
    if fault == "layers":
        shape["layers"] = draw(st.integers(0, 1)) * chunks + draw(st.integers(1, chunks - 1))
    elif fault == "schedule":
        options["schedule"] = draw(st.sampled_from(("dualpipe", "1f1b ", "zb-v")))
    elif fault == "chunks":
        layout = dataclasses.replace(layout, vpp=2)
        options["schedule"] = draw(st.sampled_from(("gpipe", "1f1b", "zb-h1")))
        shape["layers"] = 2 * layout.pp
    elif fault == "rounds":
        options["rounds"] = shape["microbatches"] + draw(st.integers(1, 2))
    else:
        options = {**options, "schedule": "interleaved", "rounds": 1}
        shape["microbatches"] = draw(st.integers(0, 1)) * layout.pp + draw(
            st.integers(1, layout.pp - 1)
        )
    return dataclasses.replace(case, shape=shape, options=options, layout=layout)
