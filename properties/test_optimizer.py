"""The optimizer: one step over all ranks is the step of one device.

Laws: (1) parameters after every step of SGD and AdamW, with momentum, weight decay and groups of
parameters, are those of torch's own on one device; (2) the gradient norm, of any order, counts
every parameter once, and clipping scales all gradients alike, those of copies too, by at most one;
(3) a step with a gradient that is not finite, on one rank, is skipped on all, and moves the loss
scale, but neither schedule nor states; (4) learning rates follow their formulas; (5) in low
precision the parameters are rounded copies of main ones; (6) what cannot be computed is refused.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.runner.examiner import CheckCase
from verify.strategies.cases import Choices
from verify.strategies.training import (
    OF_SCALES,
    OPTIONS,
    rate_cases,
    refusable_rate_cases,
    refusable_training_cases,
    training_cases,
)

_ALL = OPTIONS["training_steps"]
_BUFFERS: Choices = {name: _ALL[name] for name in ("bucket", "distributed", "overlap")}
RULES: Choices = {
    **_BUFFERS,
    **{name: _ALL[name] for name in ("optimizer", "momentum", "weight_decay", "groups")},
}
CLIPPED: Choices = {**_BUFFERS, "norm": _ALL["norm"], "clip": (2.0**-4, 2.0**10)}
SCALED: Choices = {
    **_BUFFERS,
    "frozen": _ALL["frozen"],
    "loss_scale": ("static", "dynamic", "dynamic"),
    "hysteresis": _ALL["hysteresis"],
    "overflow": (0, 1, 1, 2),
    "momentum": _ALL["momentum"],
    "schedule": ("constant", "linear"),
    "decay": (3,),
}
# An overflow after the scale has grown.
LATER: Choices = {
    "loss_scale": ("dynamic",),
    "hysteresis": _ALL["hysteresis"],
    "minimum_scale": _ALL["minimum_scale"],
    "overflow": (3, 1, 2),
}
EVERYTHING: Choices = {name: _ALL[name] for name in _ALL if name != "strides"}


@given(case=training_cases(options=RULES))
def test_update_rules_and_groups(check: CheckCase, case: Case) -> None:
    """Laws 1 and 5. Must catch: states of another rank's shard; Adam's correction of bias missing
    or late; decay that is coupled for AdamW or decoupled for SGD; factors of groups mixed up."""
    check("equivalence", case)


@given(case=training_cases(options=CLIPPED, experts=(False, True)))
def test_norms_and_clipping(check: CheckCase, case: Case) -> None:
    """Law 2. Must catch: copies counted on every rank of tp; shards or experts of one rank only;
    copies that count on one rank clipped on that rank only; small gradients that are amplified; a
    norm of its own for experts."""
    check("equivalence", case)


@given(case=training_cases(options=SCALED))
def test_loss_scales_and_skipped_steps(check: CheckCase, case: Case) -> None:
    """Law 3. Must catch: a rank that goes on where another skips; a scale that is not taken out of
    gradients, or in the wrong place; a skipped step that the schedule counts."""
    check("equivalence", case)


@given(case=training_cases(options=LATER, min_steps=4))
def test_loss_scales_that_grow_and_shrink(check: CheckCase, case: Case) -> None:
    """Law 3. Must catch: overflows that count on although the scale has grown; a scale below its
    minimum, or one that may not begin with it."""
    check("equivalence", case)


@given(case=rate_cases())
def test_learning_rates(check: CheckCase, case: Case) -> None:
    """Law 4. Must catch: a warm-up that is one update late; an end that is one early; a cosine
    that counts from zero and not from the warm-up; a minimum that is not added back."""
    check("equivalence", case)


@given(case=training_cases(options=EVERYTHING, experts=(False, True)))
def test_all_together(check: CheckCase, case: Case) -> None:
    """Laws 1 to 5. Must catch: what only goes wrong together."""
    check("equivalence", case)


@given(case=refusable_training_cases())
def test_refusals(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: layers that do not divide; a parameter in two groups or in none; options
    that make no sense and are accepted."""
    check("refusal", case)


@given(case=refusable_training_cases(names=OF_SCALES))
def test_loss_scales_that_cannot_be(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: a scale that may become zero, or begins below its minimum."""
    check("refusal", case)


@given(case=refusable_rate_cases())
def test_no_update_is_before_the_first(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: a rate below zero; one of the schedule's end."""
    check("refusal", case)
