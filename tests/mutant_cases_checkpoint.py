"""Few cases, of which each mutant of checkpoints must fail one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from verify.adversary import Adversary
from verify.case import Case, Lens
from verify.layout import Layout
from verify.oracle.checkpoint import text_of

SHAPE = {
    "steps": 2,
    "microbatches": 2,
    "sequence": 4,
    "batch": 4,
    "hidden": 3,
    "heads": 2,
    "groups": 2,
    "head_size": 2,
    "ffn": 2,
    "layers": 4,
    "vocabulary": 3,
}
# Few parameters, as each mutant runs every case.
PLAIN = {"positions": "none", "norm": "rms", "bias": False}
CHUNKS = Layout(tp=2, pp=2, vpp=2)
# The same ranks in another order.
STAGES, TURNED = Layout(tp=2, pp=2, ep=2, etp=1), Layout(tp=2, pp=2, order="pp-tp-cp-ep-dp")


def _case(
    concept: str,
    layout: Layout,
    saved: Layout,
    shape: dict[str, int] | None = None,
    *,
    lens: Lens = "exact",
    dtype: str = "float64",
    **options: Any,
) -> Case:
    given = {**PLAIN, "saved": text_of(saved), **options}
    sizes = {**SHAPE, **(shape or {})}
    return Case(concept=concept, layout=layout, shape=sizes, options=given, lens=lens, dtype=dtype)


def cases() -> Iterator[tuple[str, Case]]:
    """Checks and cases."""
    shards = {"activation": "swiglu", "distributed": True, "bucket": 20}
    yield "equivalence", _case("checkpoint", Layout(dp=4), CHUNKS, **shards)
    for seed, another in enumerate(("older", "newer", "older")):
        case = _case("checkpoint", Layout(dp=2), Layout(tp=2), another=another)
        yield "equivalence", dataclasses.replace(case, seed=seed)
    experts = {"experts": 4, "top_k": 1, "layers": 2}
    yield "equivalence", _case("checkpoint", STAGES, TURNED, experts)
    for name in ("activation", "schedule", "loss_scale", "optimizer", "vocabulary"):
        yield "refusal", _case("checkpoint", Layout(dp=2), Layout(tp=2), unlike=name)
    for how in ("empty", "missing", "damaged", "altered"):
        # By seed 0 it is the file of a rank, or the metadata.
        yield "refusal", _case("checkpoint", Layout(dp=2), Layout(dp=2), checkpoint=how)
    once = {"layers": 1, "steps": 1, "microbatches": 1, "sequence": 2, "batch": 2}
    # At moments, by the seed, at which each mutant has something to lose.
    for stopped, seed in (("run", 6), ("machine", 2), ("machine", 15), ("machine", 29)):
        case = _case("interrupted_save", Layout(dp=2), Layout(tp=2), once, stopped=stopped)
        yield "equivalence", dataclasses.replace(case, seed=seed)
    few = {"layers": 1, "sequence": 2, "batch": 2, "microbatches": 1}
    narrow: dict[str, Any] = {"lens": "native", "dtype": "bfloat16", "optimizer": "adam"}
    yield (
        "equivalence",
        _case("resumed_training", Layout(dp=2), Layout(tp=2), few, **narrow),
    )
    overlapped: dict[str, Any] = {"distributed": True, "overlap": True, "lens": "fp64"}
    case = _case("resumed_training", Layout(tp=2), Layout(dp=2), few, **overlapped)
    yield "equivalence", dataclasses.replace(case, adversary=Adversary(late=True))
