"""Hypothesis strategies of the layer's other parts: norms, positions, the loss, the whole layer.

What every concept's strategies have in common is in `verify.strategies`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hypothesis import strategies as st

from verify.case import LENSES, Case, Lens
from verify.oracle.norm import KINDS
from verify.strategies import STRIDES, completed, with_option
from verify.strategies_context import layouts

PLACEMENTS = ("zigzag", "contiguous")

_FLAGS = (False, True)


@st.composite
def norm_cases(
    draw: st.DrawFn,
    *concepts: str,
    lenses: Sequence[Lens] = LENSES,
    strides: Sequence[str] = STRIDES[:1],
) -> Case:
    """Cases of norms of hidden states, or of queries and keys, over tp and cp. A layer norm has at
    least two features: of one, nothing is left."""
    concept = draw(st.sampled_from(concepts))
    layout = draw(layouts(sequence_parallel=_FLAGS))
    kind = draw(st.sampled_from(KINDS))
    features = draw(st.integers(2 if kind == "layer" else 1, 6))
    split = layout.tp if layout.sequence_parallel else 1
    shape = {
        "sequence": draw(st.integers(1, 2)) * layout.cp * split,
        "batch": draw(st.integers(1, 3)),
    }
    if concept == "norm":
        shape["hidden"] = features
    else:
        groups = layout.tp * draw(st.integers(1, 2))
        shape |= {"heads": groups * draw(st.integers(1, 2)), "head_size": features}
        shape["groups"] = draw(st.sampled_from((groups, 1)))
    case = Case(concept=concept, layout=layout, shape=shape)
    case = with_option(case, "kind", kind, default=KINDS[0])
    bias = draw(st.sampled_from((True, False))) if kind == "layer" else True
    case = with_option(case, "bias", bias, default=True)
    case = with_option(case, "zero_centered", draw(st.sampled_from(_FLAGS)), default=False)
    case = with_option(case, "magnitude", draw(st.sampled_from((1, 1, 1024))), default=1)
    case = with_option(case, "strides", draw(st.sampled_from(strides)), default=STRIDES[0])
    return draw(completed(case, lenses))


@st.composite
def position_cases(
    draw: st.DrawFn,
    *concepts: str,
    packed: Sequence[int] = (0, 0, 1, 2, 3),
    min_cp: int = 1,
    lenses: Sequence[Lens] = LENSES,
    strides: Sequence[str] = STRIDES[:1],
) -> Case:
    """Cases of rotary and of learned positions; `packed` are the numbers of packed sequences to
    draw from, 0 for none."""
    concept = draw(st.sampled_from(concepts))
    rotary = concept == "rotary"
    layout = draw(layouts(min_cp=min_cp, sequence_parallel=_FLAGS))
    case = Case(concept=concept, layout=layout)
    case = with_option(case, "placement", draw(st.sampled_from(PLACEMENTS)), default=PLACEMENTS[0])
    chunks = layout.cp * (1 if "placement" in case.options else 2)
    count = draw(st.sampled_from(packed))
    split = layout.tp if layout.sequence_parallel and not rotary else 1
    # Chunks of all packed sequences together are cut once more over tp.
    sequence = chunks * split * draw(st.integers(max(count, 1), count + 2))
    case = with_option(case, "packed", count, default=0)
    shape = {"sequence": sequence, "batch": draw(st.integers(1, 2))}
    if rotary:
        pairs = draw(st.integers(1, 3))
        rest = draw(st.integers(0, 2))
        shape |= {"heads": layout.tp * draw(st.integers(1, 2)), "head_size": 2 * pairs + rest}
        case = with_option(case, "rotary_dim", 2 * pairs if rest else None, default=None)
        bases = (10000.0, 2.0, 500000.0)
        case = with_option(case, "base", draw(st.sampled_from(bases)), default=bases[0])
        case = with_option(case, "interleaved", draw(st.sampled_from(_FLAGS)), default=False)
    else:
        more = draw(st.integers(0, 2))
        shape |= {"hidden": draw(st.integers(1, 4)), "max_positions": sequence + more}
    case = dataclasses.replace(case, shape=shape)
    case = with_option(case, "strides", draw(st.sampled_from(strides)), default=STRIDES[0])
    return draw(completed(case, lenses))


@st.composite
def refusable_position_cases(draw: st.DrawFn) -> Case:
    """Cases with features that are not pairs or not there, a base that is none, or a sequence that
    is longer than there are positions."""
    case = draw(position_cases("rotary", "position_embedding", packed=(0,), lenses=("fp64",)))
    if case.concept == "position_embedding":
        fewer = draw(st.integers(1, max(case.shape["sequence"] - 1, 1)))
        longer = max(case.shape["sequence"], 2 * case.layout.world_size)
        shape = {**case.shape, "sequence": longer, "max_positions": min(fewer, longer - 1)}
        return dataclasses.replace(case, shape=shape)
    size = case.shape["head_size"]
    wrong = draw(
        st.sampled_from(
            (("rotary_dim", 2 * size + 2), ("rotary_dim", 3), ("base", -1.0), ("base", 0.0))
        )
    )
    return dataclasses.replace(case, options={**case.options, wrong[0]: wrong[1]})
