"""Data parallelism: gradients of tokens on many ranks, in many rounds, are those of all tokens.

Laws: (1) after finalisation every gradient is that of the mean loss over the tokens that count, of
all rounds and ranks, each of which may have none; (2) copies are equal; (3) neither buckets, nor
overlap, nor the distributed optimizer's shards change anything; (4) what one step leaves in buffers
does not reach the next; (5) gradients of experts are summed over their own copies; (6) a frozen
parameter stays as it is; (7) a second run gives the same bits; (8) a parameter that a pass does not
read has a gradient of zero from it, and is updated all the same. All in steps of plain gradient
descent, which shows constant factors that Adam hides; law 8 with Adam too. (9) With overlap,
reductions begin within the backward passes, of buckets of about the size that is asked for. (10)
All that is begun is waited for.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.runner.examiner import CheckCase
from verify.strategies.cases import Choices, late
from verify.strategies.training import OPTIONS, training_cases, with_copies

_ALL = OPTIONS["training_steps"]
PLAIN: Choices = {"zeros": ("", "", "", "mask"), "spare": _ALL["spare"]}
BUFFERS: Choices = {name: _ALL[name] for name in ("bucket", "distributed", "overlap")}
FROZEN: Choices = {**BUFFERS, "frozen": _ALL["frozen"]}
UNREAD: Choices = {
    "spare": tuple(when for when in _ALL["spare"] if when),
    "optimizer": _ALL["optimizer"],
    "momentum": _ALL["momentum"],
    "weight_decay": (0.5, 16.0),
    # In one of several parameters is something that a pass waits for.
    "bucket": (1, 1, 1, 7),
    "distributed": (False, True, True, True),
    "overlap": (True,),
}
OVERLAPPED: Choices = {**FROZEN, "overlap": (True,)}


@given(case=training_cases(options=PLAIN))
def test_gradients_of_all_tokens(check: CheckCase, case: Case) -> None:
    """Laws 1, 2, 4 and 8. Must catch: a mean of means over rounds or ranks; a sum over dp without
    cp; a division by the number of ranks; the last round only; gradients of the step before, also
    of what this step does not read; gradients added up in low precision."""
    check("equivalence", case)


@given(case=training_cases(options=BUFFERS))
def test_buckets_overlap_and_shards(check: CheckCase, case: Case) -> None:
    """Law 3. Must catch: shards of another order than the buffer's; a bucket without padding; a
    reduction that is read before its end, or begins before the last round; parameters that are used
    before they are gathered."""
    check("equivalence", case)


@given(case=training_cases(options=BUFFERS, experts=(True,)))
def test_gradients_of_experts(check: CheckCase, case: Case) -> None:
    """Law 5. Must catch: experts reduced over dp, or not at all where edp is one."""
    check("equivalence", case)


@given(case=training_cases(options=FROZEN))
def test_frozen_parameters(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: buckets that wait for gradients that never come; frozen parameters that
    move."""
    check("equivalence", case)


@given(case=training_cases(options=UNREAD, min_steps=2).map(late))
def test_parameters_that_not_every_pass_reads(check: CheckCase, case: Case) -> None:
    """Law 8. Must catch: an update that is lost where no forward pass waits for it; a bucket that
    is not reduced where the last round has no gradient for it; decay only of what has a gradient.
    Without overlap `optimizer.all_together` has it."""
    check("equivalence", case)


@given(case=training_cases(options=BUFFERS, experts=(False, True)))
def test_the_same_bits_again(check: CheckCase, case: Case) -> None:
    """Law 7. Must catch: buckets reduced in the order of arrival, asynchronous work that is not
    waited for."""
    check("determinism", case)


@given(case=with_copies(training_cases(options=OVERLAPPED, min_steps=2)))
def test_reductions_within_backward(check: CheckCase, case: Case) -> None:
    """Law 9. Must catch: buckets that are all reduced when backward has ended, as without overlap,
    in every step or after the first; one bucket of all gradients; one of each."""
    check("traffic", case)


@given(case=training_cases(options=OVERLAPPED))
def test_all_is_waited_for(check: CheckCase, case: Case) -> None:
    """Law 10. Must catch: parameters whose gather nobody waits for when training ends."""
    check("waiting", case)
