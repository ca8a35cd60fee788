"""The cases by which mutants of a whole model and its training step are caught."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from mutant_cases_layer import case_of

from verify.adversary import Adversary
from verify.case import Case
from verify.layout import Layout

SMALL = {
    "steps": 1,
    "microbatches": 2,
    "sequence": 4,
    "batch": 1,
    "hidden": 3,
    "heads": 2,
    "groups": 2,
    "head_size": 2,
    "ffn": 2,
    "layers": 2,
    "vocabulary": 4,
}
HARD = Adversary(late=True, rendezvous=True)
PLAIN = {"bias": False, "norm": "rms"}
CLIPPED = {**PLAIN, "clip": 2.0**-4}


def cases() -> Iterator[tuple[str, Case]]:
    """Each with the check to run."""
    shape = {**SMALL, "batch": 2}
    sharded = {"distributed": True, "overlap": True, "bucket": 20, "loss_scale": "static"}
    sharded |= {"split": "0,1,1,0", "multiple": 3, **CLIPPED}
    chunks = Layout(pp=2, vpp=2, dp=2)
    case = case_of("gpt_training", chunks, shape, **sharded)
    yield "equivalence", dataclasses.replace(case, adversary=HARD)
    chunk = {**PLAIN, "overlap": True, "bucket": 20}
    yield "traffic", case_of("gpt_training", Layout(pp=2, dp=2), {**shape, "steps": 2}, **chunk)
    dropped = {"hidden_dropout": 0.25, "evaluated": True, "positions": "learned"}
    # Enough elements for masks not to agree by chance.
    large = {"sequence": 16, "batch": 2, "hidden": 8}
    split = Layout(tp=2, cp=2, sequence_parallel=True)
    yield (
        "equivalence",
        case_of(
            "gpt_training",
            split,
            {**SMALL, **large, "steps": 2, "layers": 1, "microbatches": 1},
            tied=False,
            zero_centered=True,
            **dropped,
        ),
    )
    single = {**SMALL, "microbatches": 1}
    stages = Layout(tp=2, pp=2, sequence_parallel=True)
    yield (
        "equivalence",
        case_of("gpt_training", stages, {**single, "layers": 3, "vocabulary": 3}, first=2, **PLAIN),
    )
    further = {**single, "sequence": 8, "batch": 2, "layers": 1}
    yield (
        "equivalence",
        case_of(
            "gpt_training",
            Layout(tp=2, cp=2, sequence_parallel=True),
            further,
            multi_token=2,
            multi_token_scaling=0.5,
            **PLAIN,
        ),
    )
    apart = case_of(
        "gpt_training", Layout(pp=2), {**further, "layers": 2}, multi_token=1, tied=False, **PLAIN
    )
    yield "equivalence", apart
    handed_on = {"multi_token": 2, "multi_token_normalised": True}
    yield "equivalence", case_of("gpt_training", Layout(tp=2), further, **handed_on, **PLAIN)
    skipped = {"loss_scale": "dynamic", "overflow": 1, "tied": False}
    alone = case_of("gpt_training", Layout(pp=2), {**SMALL, "steps": 2}, **skipped, **PLAIN)
    yield "equivalence", alone
    rows = {**further, "sequence": 16, "layers": 2, "microbatches": 2}
    several = {"packed": 3, "multi_token": 1, "positions": "learned"}
    yield (
        "equivalence",
        case_of("gpt_training", Layout(cp=2, pp=2), rows, **several, **PLAIN),
    )
    latent = {**single, "kv_lora": 4, "rope_size": 2, "value_size": 2}
    scored = {"sink": True, "layer_scaling": True, "alibi": True}
    yield "equivalence", case_of("gpt_training", Layout(tp=2), latent, **scored, **PLAIN)
    balanced = {**SMALL, "experts": 2, "top_k": 1, "layers": 4, "batch": 2}
    added = {"balance": "batch", "z_loss": 0.25, "loss_scale": "static"}
    yield "equivalence", case_of("gpt_training", chunks, balanced, **added, **PLAIN)
    routed = {**single, "layers": 3, "experts": 2, "top_k": 1}
    yield (
        "equivalence",
        case_of("gpt_training", Layout(pp=2), routed, split="1,2", every=2, **CLIPPED),
    )
    yield "refusal", case_of("gpt_training", Layout(pp=2), single, max_sequence=3, **PLAIN)
