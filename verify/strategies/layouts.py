"""Hypothesis strategies of layouts: every size, order and split that a world can have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import gcd, prod
from typing import Any

from hypothesis import strategies as st

from verify.coverage.steering import chosen
from verify.errors import BadArgument
from verify.layout import AXES, DEFAULT_ORDER, Layout


def divisors(number: int) -> list[int]:
    """What divides `number`, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def sizes_within(most: int, wanted: Mapping[str, Iterable[int]]) -> list[dict[str, int]]:
    """All sizes of axes, each of those wanted of it, that are at most so many ranks together."""
    rows: list[dict[str, int]] = [{}]
    for axis, sizes in wanted.items():
        distinct = dict.fromkeys(sizes)
        rows = [{**row, axis: size} for row in rows for size in distinct]
    return [row for row in rows if prod(row.values()) <= most]


def ranks_of_stage(sizes: Mapping[str, int]) -> int:
    """How many ranks share a pipeline stage."""
    return sizes["tp"] * sizes["cp"] * sizes["dp"]


def expert_sizes(stage: int, *, etps: Iterable[int], most: int) -> list[dict[str, int]]:
    """All sizes of experts on a stage of so many ranks: etp one of these, ep at most `most`."""
    return [{"etp": etp, "ep": ep} for etp in etps for ep in divisors(stage // etp) if ep <= most]


def experts_from_tp(sizes: Mapping[str, int], *, etp: int, ep: int) -> list[dict[str, int]]:
    """All sizes of experts on a stage of these sizes: etp tp, which is first, or at most `etp`; ep
    at most `ep`."""
    stage, tp = ranks_of_stage(sizes), sizes["tp"]
    etps = [n for n in dict.fromkeys((tp, *divisors(stage))) if n <= etp or n == tp]
    return expert_sizes(stage, etps=etps, most=ep)


def chosen_sizes(
    draw: st.DrawFn, most: int, wanted: Mapping[str, Sequence[int]], order: Iterable[str]
) -> dict[str, int]:
    """Sizes of axes that are at most so many ranks together, chosen in this order: of the first
    are most to choose from, and one is the size of an axis for which nothing wanted fits."""
    sizes: dict[str, int] = {}
    for axis in order:
        sizes[axis] = chosen(draw, axis, [n for n in wanted[axis] if n <= most] or [1])
        most //= sizes[axis]
    return sizes


def chosen_experts(
    draw: st.DrawFn,
    possible: Sequence[Mapping[str, int]],
    *,
    tp: int,
    choose: Callable[..., int] = chosen,
) -> dict[str, int | None]:
    """One of these sizes of experts, each axis chosen by `choose`; etp None where it is tp."""
    etp = choose(draw, "etp", list(dict.fromkeys(each["etp"] for each in possible)))
    ep = choose(draw, "ep", [each["ep"] for each in possible if each["etp"] == etp])
    return {"ep": ep, "etp": None if etp == tp else etp}


def orders(*, pp_last: bool) -> st.SearchStrategy[str]:
    """The default order and permutations of the axes. Where pp is split and so are cp or experts, a
    layout wants pp at its end."""
    moved = ("tp", "cp", "ep", "dp") if pp_last else ("tp", "cp", "ep", "dp", "pp")
    last = ["pp"] if pp_last else []
    return st.just(DEFAULT_ORDER) | st.permutations(moved).map(
        lambda axes: "-".join([*axes, *last])
    )


@st.composite
def layouts_of_every_kind(draw: st.DrawFn, max_world_size: int) -> Layout:
    """Valid layouts of 1 to `max_world_size` ranks: all axes, orders (with axes of size one left
    out or not), expert sizes, optimizer instances and levels of context parallelism.

    Shrinks towards one rank, the default order and no experts.
    """
    sizes: dict[str, Any] = {}
    left = max_world_size
    for axis in draw(st.permutations(("tp", "cp", "dp", "pp"))):
        # Mostly small, so that several axes are above one together.
        small = st.sampled_from(range(1, min(left, 4) + 1))
        sizes[axis] = draw(small | small | st.integers(1, min(left, 16)))
        left //= sizes[axis]
    order = draw(st.just(DEFAULT_ORDER) | st.permutations(AXES).map("-".join))
    sizes |= {"vpp": draw(st.integers(1, 3))} if sizes["pp"] > 1 else {}
    order, expert = draw(st.sampled_from(_experts(sizes, order)))
    layout = Layout(**sizes, **expert, order=order)
    if draw(st.booleans()):
        layout = Layout(**sizes, **expert, order=_short(layout))
    instances = draw(st.sampled_from(divisors(gcd(layout.dp * layout.cp, layout.edp))))
    return Layout(
        **sizes,
        **expert,
        order=layout.order,
        optimizer_instances=instances,
        hierarchical_cp=draw(st.none() | _levels(layout.cp)),
        sequence_parallel=draw(st.booleans()),
    )


def _experts(sizes: dict[str, Any], order: str) -> list[tuple[str, dict[str, Any]]]:
    """The expert sizes that fit; with pp moved to the end of an order that none fits."""
    stage = ranks_of_stage(sizes)
    given: list[dict[str, Any]] = [{}, *expert_sizes(stage, etps=divisors(stage), most=stage)]
    found = [(order, expert) for expert in given if _fits(sizes, order, expert)]
    if found:
        return found
    order = "-".join([axis for axis in order.split("-") if axis != "pp"] + ["pp"])
    return [(order, expert) for expert in given]


def _fits(sizes: dict[str, Any], order: str, expert: dict[str, Any]) -> bool:
    try:
        Layout(**sizes, **expert, order=order)
    except BadArgument:
        return False
    return True


def _short(layout: Layout) -> str:
    """The order without the axes that are of size one in both meshes."""
    size = layout.sizes | {"ep": layout.ep}
    size["tp"] = max(layout.tp, layout.expert_tp)
    size["dp"] = max(layout.dp, layout.edp)
    named = [axis for axis in layout.order.split("-") if size[axis] > 1]
    return "-".join(named) or layout.order


@st.composite
def _levels(draw: st.DrawFn, cp: int) -> tuple[int, ...]:
    inner = draw(st.sampled_from(divisors(cp)))
    middle = draw(st.sampled_from(divisors(cp // inner)))
    levels = (inner, middle, cp // inner // middle)
    return levels if draw(st.booleans()) else (inner, cp // inner)
