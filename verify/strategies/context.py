"""Hypothesis strategies of context-parallel cases: valid ones, and ones that must be refused.

Every context-parallel group has a second one with other data more often than not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from math import lcm
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from verify.case import LENSES, Case, Lens
from verify.coverage.steering import CONCEPT, chosen, note_default
from verify.layout import DEFAULT_ORDER, Layout
from verify.runner.limits import limits
from verify.strategies.cases import STRIDES, Choices, completed
from verify.strategies.layouts import divisors

ALGORITHMS = ("all_gather", "ring", "ulysses", "hierarchical")
PLACEMENTS = ("zigzag", "contiguous")
MASKS = ("causal", "full", "sliding_window")
MAX_WORLD_SIZE = 8
SHARING = ("ulysses", "hierarchical")
# How scores become shares; the default comes first.
SCORED: Choices = {
    "padding": (False, True),
    "alibi": (False, True),
    "sink": (False, True),
    "layer_number": (None, 1, 2, 5),
    "scale": (None, 0.25, 1.0),
}
_ORDERS = (DEFAULT_ORDER, "cp-tp-ep-dp-pp", "dp-cp-tp-ep-pp", "tp-dp-cp-ep-pp", "dp-tp-ep-cp-pp")
# As the contracts have them.
_DEFAULTS: Mapping[str, object] = {
    "algorithm": "all_gather",
    "placement": "zigzag",
    "mask": "causal",
    "strides": STRIDES[0],
    "bias": True,
    **{name: values[0] for name, values in SCORED.items()},
    "blocks": False,
    "packed": 0,
    "padded": True,
}


@st.composite
def layouts(
    draw: st.DrawFn,
    *,
    min_cp: int = 1,
    most_cp: int | None = None,
    min_tp: int = 1,
    min_inner: int = 1,
    levels: bool = False,
    sequence_parallel: Sequence[bool] = (False,),
) -> Layout:
    """Layouts with context parallelism, on two levels or not, and replicas along dp and pp."""
    left = limits().world_size(MAX_WORLD_SIZE)
    sizes: dict[str, Any] = {}
    assume(min_cp * min_tp <= left)
    wanted = {"cp": (1, 2, 2, 3, 4, 4) if levels else (1, 2, 2, 3, 4), "tp": (1, 1, 2, 3)}
    for axis, least, beside in (("cp", min_cp, min_tp), ("tp", min_tp, 1)):
        most = left // beside
        if axis == "cp" and most_cp is not None:
            most = min(most, most_cp)
        fit = [size for size in wanted[axis] if least <= size <= most]
        sizes[axis] = chosen(draw, axis, fit)
        left //= sizes[axis]
    axis = draw(st.sampled_from(("dp", "dp", "pp")))
    sizes[axis] = chosen(draw, axis, [size for size in (1, 2) if size <= left])
    if levels:
        inner = draw(st.sampled_from([n for n in divisors(sizes["cp"]) if n >= min_inner]))
        sizes["hierarchical_cp"] = (inner, sizes["cp"] // inner)
    flag = chosen(draw, "sp", sequence_parallel)
    return Layout(**sizes, order=draw(st.sampled_from(_ORDERS)), sequence_parallel=flag)


@st.composite
def attention_cases(
    draw: st.DrawFn,
    *,
    algorithms: Sequence[str] = ALGORITHMS,
    masks: Sequence[str] = MASKS,
    packed: Sequence[int] = (0,),
    min_cp: int = 1,
    min_shared: int = 1,
    strides: Sequence[str] = STRIDES[:1],
    lenses: Sequence[Lens] = LENSES,
    **fixed: Any,
) -> Case:
    """Cases of context attention: `packed` are the numbers of packed sequences to draw from, 0 for
    none; heads are shared out to at least `min_shared` ranks by an algorithm that does; options in
    `fixed` are as given."""
    concept = chosen(draw, CONCEPT, ("context_attention",))
    algorithm = chosen(draw, "algorithm", algorithms)
    levels = algorithm == "hierarchical"
    layout = draw(layouts(min_cp=min_cp, min_inner=min_shared, levels=levels))
    options = {"algorithm": algorithm, **draw(_patterns(masks))}
    unit = layout.cp * (2 if options["placement"] == "zigzag" else 1)
    count = chosen(draw, "packed", packed)
    # Packed sequences of one unit have no room for one that is longer than its padding.
    units = draw(st.integers(max(1, count + (unit < 2)), 3 + count))
    sequence = unit * units
    if options["mask"] == "sliding_window":
        # Half of them end before most chunks do, which are then skipped.
        options["window"] = draw(st.integers(1, 2) | st.integers(1, sequence + 1))
    options |= {"packed": count}
    options |= {name: chosen(draw, name, values) for name, values in SCORED.items()}
    options |= {"strides": chosen(draw, "strides", strides), **fixed}
    shape = {
        "sequence": sequence,
        "batch": draw(st.integers(1, 2)),
        **draw(_heads(layout, algorithm)),
    }
    if draw(st.booleans()):
        shape["value_dim"] = draw(st.integers(1, 3))
    return draw(_case(concept, layout, shape, options, lenses))


@st.composite
def block_cases(
    draw: st.DrawFn,
    *,
    algorithms: Sequence[str] = ALGORITHMS,
    sequence_parallel: Sequence[bool] = (False, True),
    min_tp: int = 1,
    lenses: Sequence[Lens] = LENSES,
) -> Case:
    """Cases of a layer of attention."""
    concept = chosen(draw, CONCEPT, ("context_attention_block",))
    algorithm = chosen(draw, "algorithm", algorithms)
    levels = algorithm == "hierarchical"
    layout = draw(layouts(min_tp=min_tp, levels=levels, sequence_parallel=sequence_parallel))
    options = {"algorithm": algorithm, **draw(_patterns(MASKS[:2]))}
    options["bias"] = chosen(draw, "bias", (True, False))
    unit = 2 if options["placement"] == "zigzag" else 1
    unit = lcm(unit, layout.tp) if layout.sequence_parallel else unit
    shape = {
        "sequence": layout.cp * unit * draw(st.integers(1, 2)),
        "batch": draw(st.integers(1, 2)),
        "hidden": draw(st.integers(1, 5)),
        **draw(_heads(layout, algorithm)),
    }
    return draw(_case(concept, layout, shape, options, lenses))


@st.composite
def split_cases(
    draw: st.DrawFn,
    *concepts: str,
    min_cp: int = 1,
    packed: Sequence[int] = (0, 1, 2, 3),
    padded: bool = True,
) -> Case:
    """Cases of a sequence, or of as many packed ones, that is cut into the chunks of the ranks: of
    context_split, or of tokens_ahead, which may have packed ones that are not `padded`."""
    concept = chosen(draw, CONCEPT, concepts)
    layout = draw(layouts(min_cp=min_cp))
    options: dict[str, Any] = {"placement": chosen(draw, "placement", PLACEMENTS)}
    count = draw(st.sampled_from(packed))
    unit = layout.cp * (2 if options["placement"] == "zigzag" else 1)
    shape = {
        "sequence": unit * draw(st.integers(max(count, 1), count + 2)),
        "batch": draw(st.integers(1, 2)),
        "hidden" if concept == "context_split" else "depths": draw(st.integers(1, 3)),
    }
    options |= {"packed": count, "padded": padded} if count else {}
    return draw(_case(concept, layout, shape, options, LENSES))


def shared_by(layout: Layout, algorithm: str) -> int:
    """How many ranks an algorithm shares the heads of a tensor-parallel rank out to."""
    levels = layout.hierarchical_cp or (1,)
    return {"ulysses": layout.cp, "hierarchical": levels[0]}.get(algorithm, 1)


@st.composite
def _patterns(draw: st.DrawFn, masks: Sequence[str]) -> dict[str, Any]:
    return {
        "placement": chosen(draw, "placement", ("zigzag", "zigzag", "contiguous")),
        "mask": chosen(draw, "mask", masks),
    }


@st.composite
def _heads(draw: st.DrawFn, layout: Layout, algorithm: str) -> dict[str, int]:
    """Heads that divide by tp and by the ranks that an algorithm shares them out to."""
    shared = shared_by(layout, algorithm)
    of_a_rank = draw(st.sampled_from([*divisors(shared), *([2 * shared] if shared < 3 else [])]))
    repeats = draw(st.integers(1, 2 if shared > 2 else 3))
    heads = lcm(shared, of_a_rank) * repeats
    return {
        "heads": heads * layout.tp,
        "kv_heads": of_a_rank * layout.tp,
        "head_dim": draw(st.integers(1, 4)),
    }


@st.composite
def _case(
    draw: st.DrawFn,
    concept: str,
    layout: Layout,
    shape: Mapping[str, int],
    options: Mapping[str, Any],
    lenses: Sequence[Lens],
) -> Case:
    """The case without the options that are at their defaults, and with all else that it has; where
    there is an adversary, also one of sends that wait for their receives."""
    given = {n: v for n, v in options.items() if n not in _DEFAULTS or v != _DEFAULTS[n]}
    case = Case(concept=concept, layout=layout, shape=shape, options=given)
    for name in _DEFAULTS.keys() & options:
        note_default(case, name, _DEFAULTS[name])
    case = draw(completed(case, lenses))
    if not case.adversary:
        return case
    hard = dataclasses.replace(case.adversary, rendezvous=draw(st.booleans()))
    return dataclasses.replace(case, adversary=hard)
