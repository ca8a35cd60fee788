"""Hypothesis strategies of the layer's other parts: norms, positions, the loss.

What every concept's strategies have in common is in `verify.strategies.cases`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hypothesis import strategies as st

from verify.case import LENSES, Case, Lens, Option
from verify.coverage.steering import CONCEPT, chosen
from verify.oracle.norm import KINDS
from verify.strategies.cases import STRIDES, completed, with_option
from verify.strategies.cases import layouts as layouts_over_tp
from verify.strategies.context import PLACEMENTS, layouts

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
    concept = chosen(draw, CONCEPT, concepts)
    layout = draw(layouts(sequence_parallel=_FLAGS))
    kind = chosen(draw, "kind", KINDS)
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
    bias = chosen(draw, "bias", (True, False)) if kind == "layer" else True
    case = with_option(case, "bias", bias, default=True)
    case = with_option(case, "zero_centered", chosen(draw, "zero_centered", _FLAGS), default=False)
    case = with_option(case, "magnitude", chosen(draw, "magnitude", (1, 1, 1024)), default=1)
    case = with_option(case, "strides", chosen(draw, "strides", strides), default=STRIDES[0])
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
    concept = chosen(draw, CONCEPT, concepts)
    rotary = concept == "rotary"
    layout = draw(layouts(min_cp=min_cp, sequence_parallel=_FLAGS))
    case = Case(concept=concept, layout=layout)
    placement = chosen(draw, "placement", PLACEMENTS)
    case = with_option(case, "placement", placement, default=PLACEMENTS[0])
    chunks = layout.cp * (1 if "placement" in case.options else 2)
    count = chosen(draw, "packed", packed)
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
        bases = (10000.0, 2.0, 0.5, 500000.0)
        case = with_option(case, "base", chosen(draw, "base", bases), default=bases[0])
        case = with_option(case, "interleaved", chosen(draw, "interleaved", _FLAGS), default=False)
    else:
        more = draw(st.integers(0, 2))
        shape |= {"hidden": draw(st.integers(1, 4)), "max_positions": sequence + more}
    case = dataclasses.replace(case, shape=shape)
    case = with_option(case, "strides", chosen(draw, "strides", strides), default=STRIDES[0])
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
    # Even, so that nothing else is wrong: without a rotary_dim all features are turned.
    size = case.shape["head_size"] + case.shape["head_size"] % 2
    wrong = draw(
        st.sampled_from(
            (("rotary_dim", 2 * size + 2), ("rotary_dim", 3), ("base", 0.0), ("base", -1e4))
        )
    )
    shape = {**case.shape, "head_size": size}
    return dataclasses.replace(case, shape=shape, options={**case.options, wrong[0]: wrong[1]})


@st.composite
def fused_loss_cases(
    draw: st.DrawFn,
    *,
    min_tp: int = 1,
    lenses: Sequence[Lens] = LENSES,
    strides: Sequence[str] = STRIDES[:1],
    rest: bool = False,
) -> Case:
    """Cases of the output linear with its cross entropy, in chunks that need not divide; with
    `rest` they do not, and every token counts."""
    concept = chosen(draw, CONCEPT, ("linear_cross_entropy",))
    layout = draw(layouts_over_tp(min_tp=min_tp, max_world_size=8))
    least = 3 if rest else 1
    sequence = draw(st.integers(least, least + 2 if layout.sequence_parallel else 6))
    vocabulary = layout.tp * draw(st.integers(1, 4))
    shape = {
        "sequence": sequence * (layout.tp if layout.sequence_parallel else 1),
        "batch": draw(st.integers(1, 2)),
        "hidden": draw(st.integers(1, 5)),
        "vocabulary": vocabulary,
    }
    real = vocabulary - draw(st.integers(0, vocabulary - 1))
    shape |= {"real_vocabulary": real} if real < vocabulary else {}
    masked = chosen(draw, "mask_padding", _FLAGS)
    smooth = (real if masked else vocabulary) > 1
    case = Case(concept=concept, layout=layout, shape=shape)
    given: dict[str, tuple[Option, ...]] = {
        "chunk": (1, 2, 3, 7),
        "label_smoothing": (0.0, 0.1, 0.5) if smooth else (0.0,),
        "z_loss": (0.0, 0.0625),
        "ignored": _FLAGS,
        "loss_mask": _FLAGS,
        "magnitude": (1, 1, 4),
        "strides": tuple(strides),
    }
    case = with_option(case, "mask_padding", masked, default=False)
    if rest:
        full = shape["sequence"]
        # Its values are those of this length: no factor that others would have to meet.
        chunk = draw(st.sampled_from([n for n in range(2, full) if full % n]))
        case = with_option(case, "chunk", chunk, default=1)
        del given["chunk"]
        given |= dict.fromkeys(("ignored", "loss_mask"), (False,))
    for option, values in given.items():
        default = 1 if option == "chunk" else values[0]
        case = with_option(case, option, chosen(draw, option, values), default=default)
    return draw(completed(case, lenses))


@st.composite
def refusable_fused_loss_cases(draw: st.DrawFn) -> Case:
    """Cases with a vocabulary that does not divide by tp, or an option out of range."""
    case = draw(fused_loss_cases(min_tp=2, lenses=("fp64",)))
    options: tuple[tuple[str, Option], ...] = (
        ("chunk", -1),
        ("label_smoothing", 1.0),
        ("label_smoothing", -0.5),
        ("z_loss", -0.25),
    )
    if draw(st.booleans()):
        shape = {n: s for n, s in case.shape.items() if n != "real_vocabulary"}
        vocabulary = case.layout.tp * draw(st.integers(0, 2)) + 1
        options_left = {n: v for n, v in case.options.items() if n != "label_smoothing"}
        return dataclasses.replace(
            case, shape={**shape, "vocabulary": vocabulary}, options=options_left
        )
    option, value = draw(st.sampled_from(options))
    return dataclasses.replace(case, options={**case.options, option: value})
