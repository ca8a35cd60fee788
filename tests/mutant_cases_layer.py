"""The cases by which mutants of a layer's other parts are caught: norms, positions, loss, layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

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
    yield from _layers()
    yield from _losses()
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
        yield "misfit", case_of("norm", SP2, hidden, kind=kind, misfit="x 2 one")
        yield "misfit", case_of("qk_norm", TP2, heads, kind=kind, misfit="k 3 one")


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


def _layers() -> Iterator[tuple[str, Case]]:
    layer = partial(case_of, "transformer_layer")
    sizes = {"sequence": 8, "batch": 1, "hidden": 3, "heads": 4, "groups": 2, "head_size": 4}
    sizes |= {"ffn": 2}
    apart = Layout(tp=2, cp=2, order="cp-tp-ep-dp-pp")
    normal = {"qk_norm": True, "norm": "rms", "zero_centered": True}
    yield "equivalence", layer(apart, sizes, rotary_dim=2, **normal)
    yield "equivalence", layer(SPLIT, sizes, rotary_dim=4, packed=2)
    # Enough elements for two masks that are drawn apart to differ.
    many = {**sizes, "batch": 12}
    yield "equivalence", layer(SPLIT, many, rotary_dim=4, hidden_dropout=0.25)
    yield "equivalence", layer(TP2, many, hidden_dropout=0.25)
    whole = {"hidden_dropout": 0.25, "attention_dropout": 0.25}
    window = {"mask": "sliding_window", "window": 2}
    yield "equivalence", layer(SP2, sizes, **whole, **window)
    yield "equivalence", layer(SP2, sizes, **whole, training=False)
    for again in ("full", "selective"):
        yield "recomputation", layer(SP2, sizes, **whole, recompute=again)
    yield "communication", layer(SPLIT, sizes, recompute="selective")
    yield "memory", layer(SPLIT, sizes, recompute="full")
    yield "memory", layer(Layout(cp=2), sizes, recompute="selective")
    yield "equivalence", layer(SPLIT, {**sizes, "batch": 4}, attention_dropout=0.5)
    scored = {"padding": True, "alibi": True, "sink": True, "layer_number": 5}
    yield "equivalence", layer(apart, sizes, algorithm="ulysses", **scored)
    yield "recomputation", layer(apart, {**sizes, "hidden": 4}, recompute="full_distributed")
    yield "memory", layer(TP2, {**sizes, "hidden": 4}, recompute="full_distributed")
    latent = {**sizes, "groups": 4, "kv_lora": 4, "rope_size": 2, "value_size": 3}
    yield "equivalence", layer(SPLIT, latent, rotary_dim=2, qk_norm=True)


def _losses() -> Iterator[tuple[str, Case]]:
    fused = partial(case_of, "linear_cross_entropy")
    sizes = {"sequence": 4, "batch": 2, "hidden": 3, "vocabulary": 6}
    for layout in (TP2, SP2):
        yield "equivalence", fused(layout, sizes, chunk=3, loss_mask=True, z_loss=0.25)
        yield "memory", fused(layout, sizes, chunk=2)
    yield "communication", fused(TP2, sizes, chunk=2)
    yield "refusal", fused(TP2, sizes, z_loss=-0.25)
    for misfit in ("targets -1 index", "targets 6 index", "targets 0 one"):
        yield "misfit", fused(SP2, sizes, misfit=misfit)
    logits = {"sequence": 3, "batch": 2, "vocabulary": 6}
    yield "equivalence", case_of("vocab_cross_entropy", TP2, logits, z_loss=0.25)
    yield "memory", case_of("vocab_cross_entropy", TP2, logits)
    yield "refusal", case_of("vocab_cross_entropy", TP2, logits, z_loss=-0.25)
