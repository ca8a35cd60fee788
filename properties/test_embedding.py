"""The embedding of a vocabulary that is split over tensor-parallel ranks, arXiv:1909.08053.

Laws: (1) the output is the row of every token, and the gradient of the weight sums over all places
of a token; (2) copies on several ranks are equal; (3) with scatter, a rank has its part of the
sequence, batch inside, and nothing else changes; (4) how a gradient lies in memory changes nothing;
(5) the layout changes nothing; (6) nor does running twice; (7) there is one collective, in backward
only after a scatter.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.runner.examiner import CheckCase
from verify.strategies.cases import Choices, cases

CONTIGUOUS: Choices = {"strides": ("contiguous",)}
TRANSPOSED: Choices = {"strides": ("transposed",)}


@given(case=cases("vocab_embedding", options={**CONTIGUOUS, "scatter": (False,)}))
def test_the_row_of_every_token(check: CheckCase, case: Case) -> None:
    """Laws 1 and 2. Must catch: tokens at the edge of a shard that two ranks or none look up; a row
    of another rank that is not masked, in forward or in the gradient; a missing sum; a gradient
    that counts a repeated token once."""
    check("equivalence", case)


@given(
    case=cases(
        "vocab_embedding",
        sequence_parallel=(True,),
        options={**CONTIGUOUS, "scatter": (True,)},
    )
)
def test_scatter_to_the_sequence(check: CheckCase, case: Case) -> None:
    """Laws 1 to 3. Must catch: a scatter along the batch; parts of the sequence in another order;
    a gradient from this rank's tokens only."""
    check("equivalence", case)


@given(case=cases("vocab_embedding", options=TRANSPOSED))
def test_strided_gradients(check: CheckCase, case: Case) -> None:
    """Law 4. Must catch: a gather of a transposed gradient in the order of storage."""
    check("equivalence", case)


@given(case=cases("vocab_embedding", options=CONTIGUOUS))
def test_the_layout_does_not_matter(check: CheckCase, case: Case) -> None:
    """Law 5. Must catch: another lookup for a vocabulary on one rank, as with padding rows."""
    check("invariance", case)


@given(case=cases("vocab_embedding", options=CONTIGUOUS))
def test_the_same_bits_again(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: a gradient that is accumulated in an order that depends on timing."""
    check("determinism", case)


@given(case=cases("vocab_embedding", options={"strides": ("contiguous",)}))
def test_communication(check: CheckCase, case: Case) -> None:
    """Law 7. Must catch: a sum in full before the scatter; a gradient that is summed, though every
    rank has it whole."""
    check("communication", case)
