"""The output linear with its cross entropy, a part of the sequence at a time.

Laws: (1) the loss of every token, and the gradients of hidden states and of the weight, are those
of whole logits on one device, whatever the chunk: one row, several, more than there are, or with a
rest; with smoothing, z-loss, ignored targets, masked padding, and a mask of the loss; (2) for each
chunk the ranks exchange three or four numbers a token, and of hidden states what a column linear
does; (3) hidden states and a few numbers a token are all that is kept; (4) the layout and (5)
running twice change nothing; (6) what cannot be computed is refused; (7) inputs of which one does
not fit the others are not computed, (8) nor is a target that is no class.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.misfit import INDEX
from verify.runner.examiner import CheckCase
from verify.strategies.cases import STRIDES
from verify.strategies.layer import fused_loss_cases, refusable_fused_loss_cases
from verify.strategies.misfits import misfit_cases


@given(case=fused_loss_cases(strides=STRIDES))
def test_loss_and_gradients(check: CheckCase, case: Case) -> None:
    """Law 1. Must catch: the gradient of hidden states left Partial, with chunks or without; a
    weight's gradient of the last chunk; a rest that is left out; the upstream gradient of another
    token; a mask that is forgotten."""
    check("equivalence", case)


@given(case=fused_loss_cases(rest=True))
def test_rows_that_do_not_fill_a_chunk(check: CheckCase, case: Case) -> None:
    """Law 1. Must catch: a rest that is left out, in forward or backward."""
    check("equivalence", case)


@given(case=fused_loss_cases(lenses=("fp64",)))
def test_communication_and_memory(check: CheckCase, case: Case) -> None:
    """Laws 2 and 3. Must catch: logits that are kept, or made whole; hidden states kept gathered; a
    sum of the hidden states' gradient for each chunk."""
    check("communication", case)
    check("memory", case)


@given(case=fused_loss_cases())
def test_the_layout_does_not_matter(check: CheckCase, case: Case) -> None:
    """Law 4. Must catch: another formula for a vocabulary on one rank."""
    check("invariance", case)


@given(case=fused_loss_cases())
def test_the_same_bits_again(check: CheckCase, case: Case) -> None:
    """Law 5. Must catch: a sum over chunks that begins with an earlier run's."""
    check("determinism", case)


@given(case=refusable_fused_loss_cases())
def test_what_cannot_be_computed_is_refused(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: a chunk of no rows; a vocabulary whose rest belongs to nobody."""
    check("refusal", case)


@given(case=misfit_cases(fused_loss_cases()))
def test_inputs_that_do_not_fit(check: CheckCase, case: Case) -> None:
    """Law 7. Must catch: targets, or a mask, of more tokens or fewer than hidden states, whose rest
    is left out or which are broadcast."""
    check("misfit", case)


@given(case=misfit_cases(fused_loss_cases(), how=(INDEX,)))
def test_targets_that_are_no_class(check: CheckCase, case: Case) -> None:
    """Law 8. Must catch: a loss of log-sum-exp where no rank has the target; a class of padding."""
    check("misfit", case)
