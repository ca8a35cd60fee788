"""A stack of layers cut over pipeline stages and trained on microbatches, by every schedule.

Laws: (1) every microbatch's loss, the gradient of the input and of every parameter are those of one
device, whatever the schedule, with fewer microbatches than stages, several chunks a stage, several
rounds, an evaluation before each, frozen weights, and weights that are used by more than their
layer; (2) also where microbatches have different
lengths; (3) memory order, (4) the layout and (5) running twice change nothing; (6) a stage sends
one activation and one gradient of each microbatch over each border of its chunks, and nothing else;
(7) what a schedule cannot do is refused; (8) activations whose memory is freed when they are sent
are sent whole; (9) a stage waits for all that it sends and receives.
Receives may be late, and sends be done only when they are received.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.runner.examiner import CheckCase
from verify.strategies.cases import STRIDES
from verify.strategies.pipeline import pipeline_cases, refusable_pipeline_cases


@given(case=pipeline_cases(variable=(False,)))
def test_losses_and_gradients(check: CheckCase, case: Case) -> None:
    """Law 1. Must catch: gradients of earlier rounds scaled again; a loss not divided by all
    microbatches; a gradient called complete before its last microbatch; a tensor of another
    microbatch or chunk; a receive read before it is done; a send to a rank of the group as if it
    were one of the world; a weight pass left out, done twice, of another microbatch's input, or of
    a frozen weight; a gradient of a weight from elsewhere that it drops."""
    check("equivalence", case)


@given(case=pipeline_cases(min_pp=2, variable=(True,)))
def test_different_lengths(check: CheckCase, case: Case) -> None:
    """Laws 1 and 2. Must catch: a receive of the longest length, or of the last one; sizes in
    another order than tensors."""
    check("equivalence", case)


@given(case=pipeline_cases(strides=STRIDES[1:], schedules=("default", "zb-h1")))
def test_strided_tensors(check: CheckCase, case: Case) -> None:
    """Law 3. Must catch: a send of memory in the order of storage."""
    check("equivalence", case)


@given(case=pipeline_cases(min_pp=2))
def test_the_layout_does_not_matter(check: CheckCase, case: Case) -> None:
    """Law 4. Must catch: a path for one stage that computes something else."""
    check("invariance", case)


@given(case=pipeline_cases(min_pp=2))
def test_the_same_bits_again(check: CheckCase, case: Case) -> None:
    """Law 5. Must catch: a tensor taken by the order in which it happens to arrive."""
    check("determinism", case)


@given(case=pipeline_cases(min_pp=2, variable=(False,)))
def test_communication(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: a shape announced where it is known; an activation sent twice; gradients
    sent from the first chunk."""
    check("communication", case)


@given(case=pipeline_cases(min_pp=2, variable=(True,)))
def test_communication_of_different_lengths(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: the shape of a gradient announced, which its receiver knows."""
    check("communication", case)


@given(case=pipeline_cases(min_pp=2, variable=(False,), freed=(True,)))
def test_memory_is_freed_when_all_is_sent(check: CheckCase, case: Case) -> None:
    """Law 8. Must catch: an activation that is given up while its send is under way."""
    check("equivalence", case)


@given(case=pipeline_cases(min_pp=2, variable=(False,)))
def test_all_is_waited_for(check: CheckCase, case: Case) -> None:
    """Law 9. Must catch: a stage that ends while its last send is under way."""
    check("waiting", case)


@given(case=refusable_pipeline_cases())
def test_what_cannot_be_computed_is_refused(check: CheckCase, case: Case) -> None:
    """Law 7. Must catch: layers left out where they do not divide; a schedule that takes another's
    place without a word."""
    check("refusal", case)
