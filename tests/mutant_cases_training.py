"""Few cases, of which each mutant of data parallelism and the optimizer must fail one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from verify.adversary import NONE, Adversary
from verify.case import Case
from verify.layout import Layout
from verify.oracle.learning_rates import STYLES

SHAPE = {"steps": 2, "rounds": 2, "sequence": 4, "batch": 2, "hidden": 3, "ffn": 2}
SMALL = 2.0**-4
WHOLE, LARGE = Layout(tp=2, dp=2), Layout(tp=2, dp=2, cp=2, sequence_parallel=True)
LATE = Adversary(late=True)
DECAYING = {"schedule": "linear", "decay": 3}


def _case(layout: Layout, options: Any = (), *, adversary: Adversary = NONE, **sizes: int) -> Case:
    return Case(
        concept="training_steps",
        layout=layout,
        shape={**SHAPE, **sizes},
        options=dict(options),
        adversary=adversary,
    )


def _steps() -> Iterator[Case]:
    decay: Mapping[str, Any] = {"groups": "several", "weight_decay": 0.5}
    hidden = {"distributed": True, "overlap": True, "bucket": 7, "momentum": 0.5}
    yield _case(LARGE, {**hidden, **decay}, adversary=LATE)
    hidden = {"overlap": True, "bucket": 5, "optimizer": "adam", "clip": SMALL}
    yield _case(WHOLE, {**hidden, **decay}, adversary=LATE)
    skipped = {"loss_scale": "dynamic", "overflow": 2, "frozen": "norm", "clip": 1024.0}
    yield _case(WHOLE, {**skipped, **DECAYING}, steps=4)
    dynamic = {"loss_scale": "dynamic", "overflow": 1}
    yield _case(Layout(dp=2), {**dynamic, "minimum_scale": 4.0})
    yield _case(Layout(dp=2), {**dynamic, "overflow": 3, "hysteresis": 2}, steps=4)
    skipped = {"loss_scale": "dynamic", "overflow": 1, "hysteresis": 2, "bucket": 1}
    alone = {"hidden": 1, "ffn": 1, "sequence": 1, "batch": 3}
    yield _case(Layout(dp=3), {**skipped, "distributed": True}, **alone)
    yield _case(Layout(dp=3), {"distributed": True, "norm": 3.0, "clip": SMALL}, **alone)
    unread = {"spare": "never", "weight_decay": 16.0, "distributed": True, "overlap": True}
    yield _case(Layout(dp=2), {**unread, "bucket": 1}, adversary=LATE, steps=3)
    experts = {"experts": 4, "sequence": 2}
    yield _case(Layout(tp=2, dp=2, ep=2, etp=1), {"clip": SMALL, "norm": 1.0}, **experts)
    yield _case(Layout(tp=2, dp=2, ep=4, etp=1), {"distributed": True}, **experts)


def cases() -> Iterator[tuple[str, Case]]:
    """Checks and cases."""
    for case in _steps():
        yield "equivalence", case
    for bucket in (None, 5, 20):
        yield "traffic", _case(WHOLE, {"overlap": True, "bucket": bucket})
    yield (
        "equivalence",
        Case(
            concept="training_steps",
            layout=Layout(dp=2),
            shape=SHAPE,
            options={"distributed": True, "weight_decay": 16.0},
            lens="native",
            dtype="bfloat16",
        ),
    )
    for refused in ({"groups": "twice"}, {"clip": -1.0}):
        yield "refusal", _case(Layout(dp=2), refused)
    early = {"schedule": "cosine", "warmup": 2, "decay": 7, "step": -1}
    course = {"steps": 3}
    yield "refusal", Case(concept="learning_rates", layout=Layout(), shape=course, options=early)
    for style in STYLES:
        for warm in (0, 2):
            options: dict[str, Any] = {"schedule": style, "warmup": warm, "decay": 7}
            options |= {"minimum": 0.25, "annealing": 3 if style == "wsd" else 0}
            yield (
                "equivalence",
                Case(
                    concept="learning_rates", layout=Layout(), shape={"steps": 10}, options=options
                ),
            )
