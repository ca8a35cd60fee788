"""Few cases, of which each mutant of attention must fail one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from verify.case import Case, Option
from verify.layout import Layout

HEADS = {"sequence": 4, "batch": 2, "heads": 12, "groups": 6, "head_size": 3}
CORE = {**HEADS, "key_sequence": 6, "value_size": 2}
BLOCK = {**HEADS, "hidden": 4}
LATENT = {
    "sequence": 4,
    "batch": 2,
    "hidden": 4,
    "heads": 6,
    "q_lora": 3,
    "kv_lora": 2,
    "head_size": 3,
    "rope_size": 3,
    "value_size": 2,
}
SCORINGS: tuple[Mapping[str, Option], ...] = (
    {"alibi": True, "causal": False, "window": 2, "sink": True, "layer_number": 3},
    {"padding": True, "window": 1},
    {"dropout": 0.5},
    {"dropout": 0.5, "training": False},
)
REFUSED: tuple[Mapping[str, Option], ...] = ({"window": -1}, {"dropout": 1.5})
TP2, SP2, SP4 = Layout(tp=2), Layout(tp=2, sequence_parallel=True), Layout(tp=4)


def _case(concept: str, layout: Layout, shape: Mapping[str, int], options: Any = ()) -> Case:
    return Case(concept=concept, layout=layout, shape=dict(shape), options=dict(options))


def cases() -> Iterator[tuple[str, Case]]:
    """Checks and cases."""
    for concept, shape in (("core_attention", CORE), ("self_attention", BLOCK)):
        for options in SCORINGS:
            yield "equivalence", _case(concept, TP2, shape, options)
    for options in REFUSED:
        yield "refusal", _case("core_attention", TP2, CORE, options)
    yield "refusal", _case("core_attention", TP2, {**HEADS, "heads": 5, "groups": 1})
    shared = {**CORE, "batch": 2, "heads": 4, "groups": 2}
    yield "misfit", _case("core_attention", TP2, shared, {"misfit": "v 1 one"})
    yield "equivalence", _case("latent_attention", TP2, LATENT)
    yield "equivalence", _case("latent_attention", SP2, LATENT)
    before = {"norm": "layer", "rotary": True}
    yield "equivalence", _case("self_attention", SP2, {**BLOCK, "head_size": 4}, before)
    yield "equivalence", _case("latent_attention", SP2, {**LATENT, "rope_size": 2}, before)
    for groups in (1, 2):
        shape = {**BLOCK, "groups": groups, "head_size": 2}
        yield "equivalence", _case("self_attention", SP4, shape)
    yield "memory", _case("self_attention", TP2, {**BLOCK, "batch": 1, "sequence": 6})
    yield "refusal", _case("self_attention", TP2, {**BLOCK, "groups": 3, "head_size": 2})
