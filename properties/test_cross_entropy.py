"""The cross entropy of logits whose vocabulary is split over tensor-parallel ranks.

Laws: (1) the loss of every token, and the gradient of every logit under an upstream gradient that
differs from token to token, are those of one softmax over the whole vocabulary; (2) every rank has
the same loss; (3) it is finite, and right, for logits in the thousands; (4) smoothing spreads over
the other classes of the whole vocabulary; (5) an ignored target has no loss and no gradient; (6)
masked padding is no class, even where a rank has nothing else; (7) memory order, (8) the layout and
(9) running twice change nothing; (10) a rank keeps its part of the logits once, and three numbers a
token; (11) targets and logits that do not fit are not computed; (12) nor is a target that
is no class: it is refused, or its loss is not a number. Targets and padding fall where they may: at
edges of shards, all on one rank, none on another.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.misfit import INDEX
from verify.runner.examiner import CheckCase
from verify.strategies.cases import Choices, cases
from verify.strategies.misfits import misfit_cases

CONTIGUOUS: Choices = {"strides": ("contiguous",)}
PLAIN: Choices = {
    **CONTIGUOUS,
    "label_smoothing": (0.0,),
    "ignored": (False,),
    "mask_padding": (False,),
    "magnitude": (1,),
}
MASKED: Choices = {"ignored": (False, True), "mask_padding": (False, True)}
CONCEPT = "vocab_cross_entropy"


@given(case=cases(CONCEPT, options=PLAIN))
def test_loss_and_gradient(check: CheckCase, case: Case) -> None:
    """Laws 1 and 2. Must catch: a softmax over one rank's part; a target's logit that only its own
    rank has, or that comes without gradient; a target at the edge of a shard counted twice; a
    gradient times the upstream gradient of another token."""
    check("equivalence", case)


@given(case=cases(CONCEPT, options={**PLAIN, "magnitude": (16, 1024)}))
def test_large_logits(check: CheckCase, case: Case) -> None:
    """Law 3. Must catch: exponentials without the maximum taken off, or with the maximum of one
    rank's part."""
    check("equivalence", case)


@given(case=cases(CONCEPT, options={**PLAIN, "label_smoothing": (0.1, 0.5)}))
def test_label_smoothing(check: CheckCase, case: Case) -> None:
    """Law 4. Must catch: a mean over one rank's part, or a count of it; the target smoothed too; a
    gradient without the smoothing."""
    check("equivalence", case)


@given(case=cases(CONCEPT, options={**PLAIN, "ignored": (True,)}))
def test_ignored_targets(check: CheckCase, case: Case) -> None:
    """Law 5. Must catch: a loss of log-sum-exp where no rank has the target; a gradient of softmax
    there; -100 taken for an index from the end."""
    check("equivalence", case)


@given(case=cases(CONCEPT, options={**PLAIN, "mask_padding": (True,)}))
def test_masked_padding(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: padding in the maximum, the sum or the gradient; padding counted from the
    start of each rank's part; NaN where a rank has nothing but padding."""
    check("equivalence", case)


@given(case=cases(CONCEPT))
def test_everything_together(check: CheckCase, case: Case) -> None:
    """Laws 1 to 7: smoothing, ignored targets, padding, size and strides in any combination. Must
    catch: smoothing over the padding, smoothing of an ignored target, an infinity times zero."""
    check("equivalence", case)


@given(case=cases(CONCEPT, options=CONTIGUOUS))
def test_the_layout_does_not_matter(check: CheckCase, case: Case) -> None:
    """Law 8. Must catch: another formula for a vocabulary on one rank."""
    check("invariance", case)


@given(case=cases(CONCEPT, options=CONTIGUOUS))
def test_the_same_bits_again(check: CheckCase, case: Case) -> None:
    """Law 9. Must catch: logits of the caller, overwritten and used again; sums that depend on
    timing."""
    check("determinism", case)


@given(case=cases(CONCEPT, lenses=("fp64",), options={**CONTIGUOUS, "magnitude": (1,)}))
def test_what_is_kept(check: CheckCase, case: Case) -> None:
    """Law 10. Must catch: probabilities kept beside logits; a mask of the whole vocabulary; logits
    that are kept gathered."""
    check("memory", case)


@given(case=misfit_cases(cases(CONCEPT, options={**CONTIGUOUS, "label_smoothing": (0.0,)})))
def test_targets_that_do_not_fit(check: CheckCase, case: Case) -> None:
    """Law 11. Must catch: targets of some tokens that are taken for all, or are a part of what is
    gathered; a vocabulary of fewer classes than there are."""
    check("misfit", case)


@given(case=misfit_cases(cases(CONCEPT, options={**PLAIN, **MASKED}), how=(INDEX,)))
def test_targets_that_are_no_class(check: CheckCase, case: Case) -> None:
    """Law 12. Must catch: a loss of log-sum-exp where no rank has the target; padding for a class;
    -1 for the last."""
    check("misfit", case)
