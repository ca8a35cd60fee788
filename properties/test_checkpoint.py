"""Checkpoints: what was saved at one layout is there at another one.

Laws: (1) every parameter and every state of the optimizer is loaded to the bit, whatever the sizes
of tp, cp, dp, pp, vpp, ep and etp, when it was saved and now, and however the optimizer shares out
states; so are the counts of steps, samples and updates and the loss scale; and every stream of
random numbers goes on where it was, where its axes have the same sizes; of two checkpoints in a
folder the newest is loaded, or the one that is named; (2) training that is saved
at one layout and goes on at another gives the losses, gradients, norms, learning rates and
parameters of training that was never interrupted; (3) what another model, optimizer, loss scale or
schedule has saved is refused; (4) so is what is not there, or not all of it, or not as it was
saved; (5) a run that is killed at any moment of a save, and a machine that stops then and loses
what was not flushed to the disk, leave a whole checkpoint, which is the new one once it was said to
be saved, or, where it was the first, may leave none; what they leave besides is in the way of
nothing, a folder that is not there is made, and no file stays open.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.runner.examiner import CheckCase
from verify.strategies.checkpoint import (
    damaged_cases,
    interrupted_cases,
    resumed_cases,
    round_trip_cases,
    unlike_cases,
)


@given(case=round_trip_cases())
def test_round_trip(check: CheckCase, case: Case) -> None:
    """Law 1. Must catch: a shard that is put at another's offset; blocks of a gated weight, experts
    or chunks of a stage in another order; padding that is saved as if it were vocabulary; a tied
    copy that is not loaded; states of one rank's share only; a count that is lost; random numbers
    that are seeded anew, or another rank's; the checkpoint of another run after more steps, or
    fewer."""
    check("equivalence", case)


@given(case=resumed_cases())
def test_training_goes_on(check: CheckCase, case: Case) -> None:
    """Law 2. Must catch: updates that Adam or the schedule count from the beginning; main values
    that are rounded ones; a loss scale from the beginning; parameters that are saved while they are
    on their way."""
    check("equivalence", case)


@given(case=unlike_cases())
def test_what_another_run_saved_is_refused(check: CheckCase, case: Case) -> None:
    """Law 3. Must catch: parameters that are there and not loaded, or the reverse; rows that are
    cut off or left as they were; an activation of as many parameters; a schedule that goes on as
    another one."""
    check("refusal", case)


@given(case=damaged_cases())
def test_what_is_damaged_is_refused(check: CheckCase, case: Case) -> None:
    """Law 4. Must catch: a run that begins anew where nothing is to be loaded; a file that is
    missing, and its parameters what they were before; values that are not those that were saved,
    and nobody looks."""
    check("refusal", case)


@given(case=interrupted_cases())
def test_an_interrupted_save_leaves_a_checkpoint(check: CheckCase, case: Case) -> None:
    """Law 5. Must catch: the newest checkpoint named before it is whole, or in a file that is
    written to in its place; one before that is gone before the new one is there; a draft that was
    left and stops the next save; files, names in folders, a new folder's own too, whoever made it,
    that were not flushed before something names them, or not before the save has ended; files that
    stay open."""
    check("equivalence", case)
