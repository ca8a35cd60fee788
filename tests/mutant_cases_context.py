"""The cases by which mutants of context parallelism are caught."""

from __future__ import annotations

from collections.abc import Iterator

from verify.adversary import NONE, Adversary
from verify.case import Case
from verify.layout import Layout

# The second group of each kind does not begin at rank 0, and cp is not the fastest axis.
TWICE = Layout(cp=3, dp=2, order="dp-cp-tp-ep-pp")
THREE, FOUR = Layout(cp=3), Layout(cp=4)
LEVELS = Layout(cp=6, hierarchical_cp=(3, 2))
LAYER = Layout(tp=2, cp=2, sequence_parallel=True)
HARD = Adversary(late=True, rendezvous=True)
SIZES = {"sequence": 12, "batch": 2, "heads": 6, "kv_heads": 3, "head_dim": 3}


def _attention(
    layout: Layout = THREE,
    *,
    adversary: Adversary = NONE,
    sizes: dict[str, int] | None = None,
    **options,
) -> Case:
    return Case(
        concept="context_attention",
        layout=layout,
        shape={**SIZES, **(sizes or {})},
        options=options,
        adversary=adversary,
    )


def _equivalent() -> Iterator[Case]:
    yield _attention(algorithm="all_gather", blocks=True)
    yield _attention(TWICE, algorithm="ring", blocks=True)
    yield _attention(algorithm="ulysses", placement="contiguous", mask="full")
    for kv_heads in (1, 3):
        yield _attention(LEVELS, algorithm="hierarchical", sizes={"kv_heads": kv_heads})
    for algorithm in ("all_gather", "ring"):
        packed = {"packed": 2, "sizes": {"sequence": 24}}
        yield _attention(algorithm=algorithm, adversary=HARD, **packed)
    few = {"heads": 8, "kv_heads": 2, "value_dim": 2, "sequence": 8}
    yield _attention(FOUR, algorithm="ulysses", sizes=few)
    yield _attention(mask="sliding_window", window=2, blocks=True, scale=1.0)
    yield _attention(magnitude=1024, zeros="grad out")
    yield _attention(TWICE, algorithm="ring", dropout=0.25)
    yield _attention(algorithm="ulysses", dropout=0.5)
    scored = {"padding": True, "alibi": True, "sink": True, "layer_number": 5}
    for algorithm in ("all_gather", "ulysses"):
        yield _attention(TWICE, algorithm=algorithm, **scored)


def _refused() -> Iterator[Case]:
    yield _attention(algorithm="ring", sizes={"sequence": 9})
    yield _attention(algorithm="ulysses", sizes={"heads": 4, "kv_heads": 1})
    yield _attention(algorithm="ulysses", sizes={"heads": 6, "kv_heads": 2})
    yield _attention(algorithm="hierarchical")
    yield _attention(window=2)


def cases() -> Iterator[tuple[str, Case]]:
    """Each with the check that it is for."""
    for case in _equivalent():
        yield "equivalence", case
    for case in _refused():
        yield "refusal", case
    yield "misfit", _attention(misfit="k 1 one", sizes={"batch": 2})
    yield "communication", _attention(algorithm="ring")
    yield "memory", _attention(algorithm="all_gather")
    sizes = {"sequence": 8, "batch": 1, "hidden": 3, "heads": 8, "kv_heads": 4, "head_dim": 2}
    layer = Case(concept="context_attention_block", layout=LAYER, shape=sizes)
    for check in ("equivalence", "communication", "memory"):
        yield check, layer
    yield (
        "equivalence",
        Case(concept="context_attention_block", layout=LAYER, shape=sizes, adversary=HARD),
    )
    yield "misfit", _attention(packed=2, misfit="cu_seqlens 25 index", sizes={"sequence": 24})
    shape = {"sequence": 12, "batch": 1, "hidden": 2}
    options = {"packed": 2, "misfit": "cu_seqlens 13 index"}
    yield "misfit", Case(concept="context_split", layout=TWICE, shape=shape, options=options)
    for options in ({}, {"packed": 2}):
        for concept, size in (("context_split", "hidden"), ("tokens_ahead", "depths")):
            shape = {"sequence": 12, "batch": 1, size: 2}
            case = Case(concept=concept, layout=TWICE, shape=shape, options=options)
            yield "equivalence", case
