"""Data: which samples of a text, and which of their tokens, a rank trains on.

Laws: (1) the microbatches of all ranks of dp and cp together are those of one device, each row and
each token once and in its place, and ranks of tp and pp have them alike; targets are the tokens one
further; (2) in an epoch every sample has its turn once, wherever steps end, and a run that goes on
later has the samples that are left; (3) nothing is communicated; (4) the layout and (5) running
twice change nothing; (6) what does not divide is refused, and a text of no sample.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.runner.examiner import CheckCase
from verify.strategies.data import batch_cases, order_cases, refusable_batch_cases


@given(case=batch_cases())
def test_the_batches_of_every_rank(check: CheckCase, case: Case) -> None:
    """Laws 1 and 3. Must catch: ranks of dp that all have the first rows; rows by rank first, then
    by microbatch; a step that begins with what was consumed; tokens of another chunk; targets that
    are the tokens, or those of this rank's part moved by one."""
    check("communication", case)
    check("equivalence", case)


@given(case=order_cases())
def test_every_sample_has_its_turn(check: CheckCase, case: Case) -> None:
    """Law 2. Must catch: an order with a sample twice; ranks that shuffle each for itself; samples
    of one step that come again in the next; an epoch that ends with the step it ends in; an order
    that is drawn from a generator that goes on."""
    check("equivalence", case)


@given(case=batch_cases())
def test_the_layout_does_not_matter(check: CheckCase, case: Case) -> None:
    """Law 4. Must catch: another order of rows on one rank."""
    check("invariance", case)


@given(case=order_cases())
def test_the_same_bits_again(check: CheckCase, case: Case) -> None:
    """Law 5. Must catch: what a run before has left."""
    check("determinism", case)


@given(case=refusable_batch_cases())
def test_what_does_not_divide_is_refused(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: rows or tokens that are left over; samples that are not there."""
    check("refusal", case)
