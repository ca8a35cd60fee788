"""Mixture of experts: a router, dispatchers, experts, and the layer of them, on both meshes.

Laws: (1) weights, choices and auxiliary losses, outputs and all gradients are those of one device
that has the tokens of all ranks; (2) copies of them are equal; (3) every dispatcher brings each
token to the experts of its choice and back, and no other; (4) it communicates what is published;
(5) an auxiliary loss counts once, whatever the layout; (6) a capacity drops the tokens it should;
(7) the bias of experts follows the loads of all ranks, one step at a time; (8) neither the layout
nor (9) a second run changes anything; (10) what cannot be computed is refused.

No decision that is drawn is in doubt, so that rounding turns none: see `verify.oracle.moe.doubt`.
Another stage of the pipeline has tokens and weights of its own.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.runner.examiner import CheckCase
from verify.strategies.cases import Choices
from verify.strategies.moe import (
    CONTIGUOUS,
    DROPLESS,
    LOSSLESS,
    balanced_cases,
    moe_cases,
    refusable_moe_cases,
    stage_layouts,
)

PLAIN: Choices = {**CONTIGUOUS, **DROPLESS, **LOSSLESS}
CHOICES: Choices = {**DROPLESS, **LOSSLESS}
LOSSES: Choices = {**CONTIGUOUS, **DROPLESS, "balance": ("sequence", "batch", "global")}
DROPPING: Choices = {**CONTIGUOUS, **LOSSLESS, "capacity": (0.5, 1.0, 1.25)}
# Micro-batches and the tokens that share a capacity are what the layout makes them.
OF_ANY_LAYOUT: Choices = {**CONTIGUOUS, **DROPLESS, "balance": ("none", "sequence", "global")}
SMALL = stage_layouts(max_world_size=8)


@given(case=moe_cases("moe_router", options=CHOICES, layouts=SMALL))
def test_choices_and_weights(check: CheckCase, case: Case) -> None:
    """Laws 1 and 2. Must catch: a bias of experts that reaches the weights; a softmax before or
    after the choice, or a group's limit, of the other kind; a gradient of the router of this rank's
    tokens only, or summed where it is complete."""
    check("equivalence", case)


@given(case=moe_cases("moe_router", options=PLAIN, layouts=SMALL, grouped=(True,)))
def test_groups_of_experts(check: CheckCase, case: Case) -> None:
    """Laws 1 and 2, where a token may go to some groups only. Must catch: a token that goes to any;
    groups ranked by their best expert, or all of them, for the sum of several."""
    check("equivalence", case)


@given(case=moe_cases("moe_router", options=LOSSES, layouts=SMALL))
def test_auxiliary_losses(check: CheckCase, case: Case) -> None:
    """Law 5. Must catch: counts of this rank's tokens only, or reduced over copies or over other
    micro-batches; a loss multiplied by a parallel size, or by none where it should be; a loss whose
    gradient is scaled by what the upstream gradient is, or lost."""
    check("equivalence", case)


@given(case=moe_cases("moe_router", options=DROPPING, layouts=SMALL))
def test_capacity(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: a capacity rounded down, or of one choice a token; the wrong tokens
    dropped; a dropped choice that keeps its weight, or weights that are normalised again."""
    check("equivalence", case)


@given(case=moe_cases("moe_expert_bias", layouts=SMALL))
def test_a_bias_that_balances(check: CheckCase, case: Case) -> None:
    """Law 7. Must catch: counts not reduced, or reduced over copies; counts kept from the step
    before, of evaluation, or twice under recomputation; a bias that moves the wrong way."""
    check("equivalence", case)


@given(case=moe_cases("moe_dispatch"))
def test_dispatch_and_combine(check: CheckCase, case: Case) -> None:
    """Law 3. Must catch: an expert that works for another; chunks in the order of other axes, with
    several local experts on tp and ep; a sum over etp that is missing, forward or backward; tokens
    at an offset that holds for one sequence only."""
    check("equivalence", case)


@given(case=balanced_cases())
def test_what_dispatch_communicates(check: CheckCase, case: Case) -> None:
    """Law 4. Must catch: tokens sent to ranks without an expert of theirs, or twice."""
    check("communication", case)


@given(case=moe_cases("moe_layer", options=PLAIN))
def test_the_layer(check: CheckCase, case: Case) -> None:
    """Laws 1 to 3. Must catch: a gradient below experts that is not summed over etp; a bias added
    by every rank of etp; gate and up cut as one; shared experts without their sum; gradients of
    experts summed over dp instead of edp."""
    check("equivalence", case)


@given(case=moe_cases("moe_layer", options=CONTIGUOUS))
def test_the_layer_with_all_that_routers_have(check: CheckCase, case: Case) -> None:
    """Laws 1 to 6 together. Must catch: losses that are attached twice, or to what is split over tp
    already; empty experts, and ranks without tokens, that some rank waits for."""
    check("equivalence", case)


@given(case=moe_cases("moe_router", "moe_layer", options=OF_ANY_LAYOUT, lenses=("fp64",)))
def test_the_layout_does_not_matter(check: CheckCase, case: Case) -> None:
    """Law 8. Must catch: a loss or a gradient that depends on how many ranks share the tokens."""
    check("invariance", case)


@given(case=moe_cases("moe_layer", options=CONTIGUOUS))
def test_the_same_bits_again(check: CheckCase, case: Case) -> None:
    """Law 9. Must catch: sums of a token's experts in the order of arrival."""
    check("determinism", case)


@given(case=refusable_moe_cases("moe_router", "moe_layer", "moe_dispatch"))
def test_refusals(check: CheckCase, case: Case) -> None:
    """Law 10. Must catch: experts or features that are left out because they do not divide; options
    without meaning that are accepted."""
    check("refusal", case)
