"""The cases by which mutants of pipelines and their schedules are caught."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from mutant_cases_layer import case_of

from verify.adversary import Adversary
from verify.case import Case
from verify.layout import Layout

SMALL = {"microbatches": 4, "sequence": 3, "batch": 2, "hidden": 3, "layers": 4}
# Stages are not neighbours, and there is a second pipeline.
STRIDED = Layout(pp=2, dp=2, order="tp-cp-ep-dp-pp")
CHUNKS = Layout(pp=2, vpp=2)
HARD = Adversary(late=True, rendezvous=True)


def cases() -> Iterator[tuple[str, Case]]:
    """Each with the check to run."""
    for kind, layout, microbatches in (
        ("gpipe", Layout(pp=3), 4),
        ("1f1b", Layout(pp=4), 2),
        ("1f1b", Layout(pp=4), 6),
        ("interleaved", Layout(pp=3, vpp=2), 6),
        ("zb-h1", Layout(pp=4), 6),
        ("zb-h1", Layout(pp=3), 1),
    ):
        shape = {"microbatches": microbatches}
        yield "schedule", case_of("pipeline_schedule", layout, shape, kind=kind)
    for layout, options in (
        (STRIDED, {"rounds": 2}),
        (CHUNKS, {"variable": True}),
        (CHUNKS, {"overlap": False, "evaluated": True}),
        (Layout(pp=2), {"schedule": "zb-h1"}),
        (Layout(pp=2), {"schedule": "zb-h1", "frozen_weight": True}),
        (Layout(pp=2), {"schedule": "zb-h1", "shared": True}),
    ):
        case = case_of("pipeline", layout, SMALL, **options)
        yield "equivalence", dataclasses.replace(case, adversary=HARD)
    few = case_of("pipeline", Layout(pp=3), {**SMALL, "layers": 3, "microbatches": 1})
    yield "equivalence", few
    yield "communication", case_of("pipeline", CHUNKS, SMALL)
    yield "waiting", case_of("pipeline", CHUNKS, SMALL)
    yield "refusal", case_of("pipeline", CHUNKS, {**SMALL, "microbatches": 3})
    yield "refusal", case_of("pipeline", CHUNKS, SMALL, schedule="gpipe")
