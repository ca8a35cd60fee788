"""The cases by which mutants of a layer's other parts are caught: norms, positions, loss, layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from verify.case import Case
from verify.layout import Layout

# tp is not the fastest axis, and there is a second group of each kind.
STRIDED = Layout(tp=2, cp=2, dp=2, order="cp-dp-tp-ep-pp")
SPLIT = Layout(tp=2, cp=2, sequence_parallel=True)
TP2, SP2 = Layout(tp=2), Layout(tp=2, sequence_parallel=True)


def case_of(concept: str, layout: Layout, shape: dict[str, int], *, lens="fp64", **options) -> Case:
    dtype = "bfloat16" if lens == "native" else "float64"
    return Case(
        concept=concept, layout=layout, shape=shape, options=options, lens=lens, dtype=dtype
    )


def cases() -> Iterator[tuple[str, Case]]:
    """Each with the check to run."""
    yield from _norms()
    yield from _positions()
    for options in ({}, {"activation": "geglu"}, {"activation": "swiglu", "packed": False}):
        mlp = {"sequence": 4, "batch": 2, "hidden": 3, "ffn": 4}
        yield "equivalence", case_of("tp_mlp", SP2, mlp, **options)
        yield "memory", case_of("tp_mlp", SP2, mlp, **options)


def _norms() -> Iterator[tuple[str, Case]]:
    hidden = {"sequence": 4, "batch": 2, "hidden": 5}
    heads = {"sequence": 4, "batch": 2, "heads": 4, "groups": 2, "head_size": 3}
    for kind in ("layer", "rms"):
        for concept, shape in (("norm", hidden), ("qk_norm", heads)):
            yield "equivalence", case_of(concept, STRIDED, shape, kind=kind)
            yield "equivalence", case_of(concept, SPLIT, shape, kind=kind, zero_centered=True)
        large = case_of("norm", TP2, hidden, lens="native", kind=kind, magnitude=1024)
        yield "equivalence", dataclasses.replace(large, dtype="float16")
        yield "memory", case_of("norm", SP2, hidden, kind=kind)


def _positions() -> Iterator[tuple[str, Case]]:
    turned = {"sequence": 8, "batch": 2, "heads": 2, "head_size": 6}
    for options in ({}, {"interleaved": True, "base": 100.0}, {"rotary_dim": 4, "packed": 2}):
        yield "equivalence", case_of("rotary", STRIDED, turned, **options)
    packed = case_of("rotary", STRIDED, {**turned, "sequence": 16}, packed=2)
    for seed in (1, 2, 3):
        yield "equivalence", dataclasses.replace(packed, seed=seed)
    yield "refusal", case_of("rotary", SPLIT, turned, rotary_dim=3)
    learned = {"sequence": 16, "batch": 4, "hidden": 3, "max_positions": 17}
    for layout in (STRIDED, SPLIT):
        yield "equivalence", case_of("position_embedding", layout, learned)
    yield "equivalence", case_of("position_embedding", SPLIT, learned, placement="contiguous")
    few = {**learned, "max_positions": 15}
    yield "refusal", case_of("position_embedding", SPLIT, few)
