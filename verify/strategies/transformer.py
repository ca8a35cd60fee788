"""Hypothesis strategies of a whole transformer layer: valid cases, and ones to be refused.

What every concept's strategies have in common is in `verify.strategies.cases`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from math import gcd

from hypothesis import strategies as st

from verify.case import LENSES, Case, Lens, Option
from verify.coverage.steering import CONCEPT, chosen
from verify.layout import Layout
from verify.oracle.mlp import ACTIVATIONS
from verify.oracle.norm import KINDS
from verify.strategies.cases import STRIDES, Choices, completed, with_option
from verify.strategies.context import ALGORITHMS, MASKS, PLACEMENTS, SCORED, layouts, shared_by
from verify.strategies.layouts import divisors

RECOMPUTED = ("full", "full_distributed", "selective")
_FLAGS = (False, True)
_DEFAULTS: Mapping[str, Option] = {
    "norm": KINDS[0],
    "activation": ACTIVATIONS[0],
    "bias": True,
    "interleaved": False,
    "zero_centered": False,
    **{name: values[0] for name, values in SCORED.items()},
}
# An option, its value, its default.
Given = tuple[str, Option, Option]


@st.composite
def layer_cases(
    draw: st.DrawFn,
    *,
    algorithms: Sequence[str] = ALGORITHMS,
    dropout: Sequence[float] = (0.0,),
    attention_dropout: Sequence[float] = (0.0,),
    recompute: Sequence[str] = ("",),
    packed: Sequence[int] = (0,),
    min_tp: int = 1,
    min_cp: int = 1,
    sequence_parallel: Sequence[bool] = _FLAGS,
    lenses: Sequence[Lens] = LENSES,
    strides: Sequence[str] = STRIDES[:1],
    latent: Sequence[bool] = (False, True),
    qk_norm: Sequence[bool] = _FLAGS,
    rotary: Sequence[bool] = _FLAGS,
    training: bool = True,
    plain: bool = False,
) -> Case:
    """Cases of a whole layer, by any algorithm of context parallelism. Groups of heads are any that
    tp divides or that divide tp. `qk_norm` says whether to normalise queries and keys, and
    `rotary` whether to turn them.

    Half of them may have what few layers have: latents in the place of groups (`latent` says which
    to draw), packed sequences, zero-centred norms, other ways of scoring. The others show, also of
    targets that have none of it, what all layers have. A `plain` one has no context parallelism,
    and latents as most layers do that have them: keys that share a part which turns in pairs of
    neighbours, and no biases."""
    concept = chosen(draw, CONCEPT, ("transformer_layer",))
    shares = chosen(draw, "attention_dropout", attention_dropout)
    algorithm = chosen(draw, "algorithm", algorithms)
    layout = draw(
        layouts(
            min_tp=min_tp,
            min_cp=min_cp,
            most_cp=1 if plain else None,
            levels=algorithm == "hierarchical",
            sequence_parallel=sequence_parallel,
        )
    )
    case = Case(concept=concept, layout=layout)
    placement = chosen(draw, "placement", PLACEMENTS)
    rich = not plain and draw(st.booleans())
    count = chosen(draw, "packed", packed if rich else packed[:1])
    again = chosen(draw, "recompute", recompute)
    if again == "full_distributed" and layout.sequence_parallel:
        again = "full"
    shape = draw(_layer_sizes(layout, algorithm, placement, count))
    if again == "full_distributed":
        shape["hidden"] = layout.tp * -(-shape["hidden"] // layout.tp)
    if plain or (rich and draw(st.sampled_from(latent))):
        shape |= draw(latents(shape["heads"], least=2 if plain else 1))
    given: list[Given] = [
        ("algorithm", algorithm, ALGORITHMS[0]),
        ("placement", placement, PLACEMENTS[0]),
        ("packed", count, 0),
        ("hidden_dropout", chosen(draw, "hidden_dropout", dropout), 0.0),
        ("attention_dropout", shares, 0.0),
        ("recompute", again, ""),
        ("training", training, True),
        ("strides", chosen(draw, "strides", strides), STRIDES[0]),
        *draw(_parts(shape, qk_norm, rotary, rich=rich, plain=plain)),
    ]
    case = dataclasses.replace(case, shape=shape)
    for option, value, default in given:
        case = with_option(case, option, value, default=default)
    case = draw(completed(case, lenses))
    if not case.adversary:
        return case
    hard = dataclasses.replace(case.adversary, rendezvous=draw(st.booleans()))
    return dataclasses.replace(case, adversary=hard)


@st.composite
def _parts(
    draw: st.DrawFn,
    shape: dict[str, int],
    qk_norm: Sequence[bool],
    rotary: Sequence[bool],
    *,
    rich: bool,
    plain: bool,
) -> list[Given]:
    """What the parts of a layer of these sizes are, with what few layers have if it is `rich`, as
    those with latents have them if it is `plain`."""
    pairs = shape.get("rope_size", shape["head_size"]) // 2
    mask = chosen(draw, "mask", MASKS)
    window = draw(st.integers(1, shape["sequence"] + 1)) if mask == "sliding_window" else None
    few: Choices = {"zero_centered": _FLAGS, **SCORED}
    choices: dict[str, Sequence[Option]] = {
        "norm": KINDS,
        "activation": ACTIVATIONS,
        "bias": (False,) if plain else (True, False),
        "interleaved": (True,) if plain else _FLAGS,
        **{name: values if rich else values[:1] for name, values in few.items()},
    }
    turns = plain or (pairs and draw(st.sampled_from(rotary)))
    turned = 2 * draw(st.integers(1, pairs)) if turns else None
    return [
        ("mask", mask, MASKS[0]),
        ("window", window, None),
        ("rotary_dim", turned, None),
        ("qk_norm", chosen(draw, "qk_norm", qk_norm), False),
        *((name, chosen(draw, name, each), _DEFAULTS[name]) for name, each in choices.items()),
    ]


@st.composite
def _layer_sizes(
    draw: st.DrawFn, layout: Layout, algorithm: str, placement: str, packed: int
) -> dict[str, int]:
    """Sizes with room for so many packed sequences."""
    chunks = layout.cp * (2 if placement == "zigzag" else 1)
    chunks *= layout.tp if layout.sequence_parallel else 1
    return {
        "sequence": chunks * draw(st.integers(max(packed, 1), packed + 1)),
        "batch": draw(st.integers(1, 2)),
        "hidden": draw(st.integers(3, 5)),
        **draw(grouped_heads(layout, algorithm, most=5)),
        "ffn": layout.tp * draw(st.integers(1, 2)),
    }


@st.composite
def grouped_heads(draw: st.DrawFn, layout: Layout, algorithm: str, *, most: int) -> dict[str, int]:
    """Heads, groups of them that tp divides or that divide tp, and a size of at most `most` or what
    the fused projection needs to divide by tp."""
    tp, shared = layout.tp, shared_by(layout, algorithm)
    # Of a group that ranks of tp share each has a copy, as an algorithm's ranks have of one.
    # Two of them on a rank are told apart only where each has several queries.
    two = 2 * tp * shared
    groups = draw(st.sampled_from([tp * shared, tp, *divisors(tp), two, two, two]))
    size = draw(st.integers(2, most))
    return {
        "heads": max(tp * shared, groups) * draw(st.sampled_from((1, 2, 2))),
        "groups": groups,
        "head_size": size * (tp // gcd(tp, 2 * groups * size)),
    }


@st.composite
def latents(draw: st.DrawFn, heads: int, *, least: int = 1) -> dict[str, int]:
    """Sizes of latent attention, of latents that can be normalised, in the place of groups, and of
    at `least` so many features that have positions."""
    found = {"groups": heads, "kv_lora": draw(st.integers(4, 6))}
    found |= {"rope_size": draw(st.integers(least, 4)), "value_size": draw(st.integers(1, 4))}
    inner = draw(st.sampled_from((0, 4, 5)))
    return found | ({"q_lora": inner} if inner else {})


@st.composite
def refusable_layer_cases(draw: st.DrawFn) -> Case:
    """Cases on at least two ranks of tp and cp each, with one thing wrong: heads or an ffn that do
    not divide, a probability that is none, an option that names nothing, features that are not
    pairs, a layer before the first, an input to distribute that sequence parallelism splits."""
    fault = draw(st.sampled_from(("sizes", "options", "split")))
    given = {"algorithms": ("all_gather",), "min_tp": 2, "min_cp": 2, "lenses": ("fp64",)}
    given |= {"latent": (False,)}
    given |= {"sequence_parallel": (True,)} if fault == "split" else {}
    case = draw(layer_cases(**given))  # type: ignore[arg-type]
    if fault == "split":
        return _with(case, "recompute", "full_distributed")
    tp = case.layout.tp
    sizes: tuple[dict[str, int], ...] = (
        {"heads": tp + 1, "groups": tp + 1},
        {"ffn": tp + 1},
        {"heads": tp * (tp + 1), "groups": tp + 1},
    )
    options: tuple[tuple[str, Option], ...] = (
        ("layer_number", -1),
        ("hidden_dropout", 1.0),
        ("hidden_dropout", -0.5),
        ("attention_dropout", 1.5),
        ("recompute", "some"),
        ("norm", "batch"),
        ("activation", "relu"),
        ("algorithm", "striped"),
        ("rotary_dim", 3),
    )
    if fault == "sizes":
        return dataclasses.replace(case, shape={**case.shape, **draw(st.sampled_from(sizes))})
    option, value = draw(st.sampled_from(options))
    return _with(case, option, value)


def _with(case: Case, option: str, value: Option) -> Case:
    return dataclasses.replace(case, options={**case.options, option: value})
