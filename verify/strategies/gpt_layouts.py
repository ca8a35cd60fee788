"""Hypothesis strategies of the layouts of whole models: all axes at once, and experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from verify.coverage.steering import chosen, foresee
from verify.layout import Layout
from verify.runner.limits import limits
from verify.strategies.context import ALGORITHMS
from verify.strategies.layouts import (
    chosen_experts,
    chosen_sizes,
    expert_sizes,
    orders,
    ranks_of_stage,
    sizes_within,
)

# Few ranks show most of what can be wrong, soon; the largest worlds are those of a long run.
SMALL, LARGE = (2, 4, 4, 4), (2, 4, 4, 4, 8, 8, 16, 16, 64)
AXES = {"pp": (1, 2, 2, 3, 4), "dp": (1, 2, 2, 3), "tp": (1, 1, 2, 2, 3), "cp": (1, 1, 2, 3)}
# Of two ranks, each axis as often as another.
OF_TWO = {"pp": (1, 1, 1, 2), "dp": (1, 2, 2), "tp": (1, 2, 2), "cp": (1, 2, 2)}
WIDE = {"pp": (2, 3, 4), "dp": (2, 3, 4), "tp": (2, 3, 4), "cp": (1, 2, 4)}
MOST_CHUNKS = 12
_FLAGS = (False, True)


@st.composite
def model_layouts(
    draw: st.DrawFn,
    *,
    min_pp: int = 1,
    chunks: Sequence[int] = (1, 1, 2),
    most_chunks: int = MOST_CHUNKS,
    experts: bool = False,
    split: bool = True,
    plain: bool = False,
    anywhere: bool = True,
    sequence_parallel: Sequence[bool] = _FLAGS,
    worlds: Sequence[int] = SMALL,
    algorithms: Sequence[str] = ALGORITHMS,
) -> Layout:
    """Layouts of all axes in any order, of at most one of `worlds` ranks, with one of `chunks` a
    stage; none over cp unless sequences may be `split`. One of `algorithms` is chosen later, where
    cp is above one. Sequence parallelism is one of `sequence_parallel`; a `plain` one has it where
    there are experts and tp. Experts that are not `anywhere` have etp as tp where ep is one, and ep
    comes behind tp in the order."""
    fitting = [n for n in worlds if limits().world_size(n) == n]
    left = draw(st.sampled_from(fitting or [limits().world_size(min(worlds))]))
    wanted = dict(WIDE if left > 16 else AXES if left > 2 else OF_TWO)
    wanted["pp"] = tuple(n for n in wanted["pp"] if n >= min_pp)
    if not split:
        wanted["cp"] = (1,)
    foresee(
        {**row, "vpp": vpp, **more, "algorithm": algorithm}
        for row in sizes_within(left, wanted)
        for vpp in dict.fromkeys(_chunks_of(row["pp"], chunks, most_chunks))
        for more in (few_experts(row, anywhere=anywhere) if experts else ({},))
        for algorithm in (algorithms if row["cp"] > 1 else ALGORITHMS[:1])
    )
    axes = ("pp", *draw(st.permutations(("dp", "tp", "cp"))))
    sizes: dict[str, Any] = {**chosen_sizes(draw, left, wanted, axes)}
    sizes["vpp"] = chosen(draw, "vpp", _chunks_of(sizes["pp"], chunks, most_chunks))
    if experts:
        sizes |= chosen_experts(draw, few_experts(sizes, anywhere=anywhere), tp=sizes["tp"])
    order = draw(orders(pp_last=True).filter(lambda each: anywhere or _tp_before_ep(each)))
    parallel = (True,) if plain and experts and sizes["tp"] > 1 else sequence_parallel
    return Layout(**sizes, order=order, sequence_parallel=chosen(draw, "sp", parallel))


def _chunks_of(pp: int, chunks: Sequence[int], most: int) -> list[int]:
    """Those of `chunks` that a stage may have, of which there are at most `most` together."""
    return [n for n in chunks if pp * n <= most] if pp > 1 else [1]


def _tp_before_ep(order: str) -> bool:
    axes = order.split("-")
    return axes.index("tp") < axes.index("ep")


def few_experts(sizes: Mapping[str, int], *, anywhere: bool = True) -> list[dict[str, int]]:
    """The sizes that experts have on a stage of these sizes: etp 1 or tp, ep up to 4."""
    found = expert_sizes(ranks_of_stage(sizes), etps=sorted({1, sizes["tp"]}), most=4)
    return [each for each in found if anywhere or each["ep"] > 1 or each["etp"] == sizes["tp"]]
