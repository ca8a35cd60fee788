"""Where a token is in its sequence: rotary position embedding, and learned positions.

Laws: (1) output and gradients are those of the whole sequence on one device, whichever chunks of it
a rank has, contiguous or zigzag, all of it rotary or the first features of a head, pairs of halves
or of neighbours; (2) in packed sequences positions begin anew in each, and padding counts; (3)
learned positions are cut once more by sequence parallelism, and their gradients complete; (4)
nothing is communicated but gradients, and of what is turned nothing is kept; (5) the layout and (6)
running twice change nothing; (7) features that are no pairs, and positions that are not there, are
refused; (8) tokens of other positions are not computed.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.runner.examiner import CheckCase
from verify.strategies.cases import STRIDES
from verify.strategies.layer import position_cases, refusable_position_cases
from verify.strategies.misfits import misfit_cases

BOTH = ("rotary", "position_embedding")


@given(case=position_cases("rotary", strides=STRIDES))
def test_rotary(check: CheckCase, case: Case) -> None:
    """Laws 1 and 2. Must catch: positions from 0 on every rank, or of contiguous chunks for zigzag
    ones; lengths without padding; neighbours for halves; frequencies by the head's size where fewer
    features turn; angles in float32; the rest of a head lost."""
    check("equivalence", case)


@given(case=position_cases("position_embedding", strides=STRIDES))
def test_learned_positions(check: CheckCase, case: Case) -> None:
    """Laws 1, 2 and 3. Must catch: positions of a rank's part under sequence parallelism; a cut by
    tp before that by cp; a gradient of this rank's tokens."""
    check("equivalence", case)


@given(case=position_cases(*BOTH))
def test_communication_and_memory(check: CheckCase, case: Case) -> None:
    """Law 4. Must catch: positions that are gathered; a copy of what is turned, kept."""
    check("communication", case)
    if case.concept == "rotary":
        check("memory", case)


@given(case=position_cases(*BOTH, packed=(0,)))
def test_the_layout_does_not_matter(check: CheckCase, case: Case) -> None:
    """Law 5. Must catch: another formula for a sequence on one rank."""
    check("invariance", case)


@given(case=position_cases(*BOTH))
def test_the_same_bits_again(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: a table of angles that a longer sequence changed."""
    check("determinism", case)


@given(case=refusable_position_cases())
def test_what_cannot_be_computed_is_refused(check: CheckCase, case: Case) -> None:
    """Law 7. Must catch: the last of an odd number of features left alone; positions that begin
    anew, or are the last one again, where there are too few."""
    check("refusal", case)


@given(case=misfit_cases(position_cases(*BOTH)))
def test_tokens_that_do_not_fit(check: CheckCase, case: Case) -> None:
    """Law 8. Must catch: one token that is broadcast to all positions."""
    check("misfit", case)
