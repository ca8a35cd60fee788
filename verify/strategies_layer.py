"""Hypothesis strategies of the layer's other parts: norms, positions, the loss, the whole layer.

What every concept's strategies have in common is in `verify.strategies`.
"""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from verify.case import LENSES, Case, Lens
from verify.oracle.norm import KINDS
from verify.strategies import STRIDES, completed, with_option
from verify.strategies_context import layouts

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
