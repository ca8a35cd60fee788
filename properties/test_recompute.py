"""Activations computed again in backward (arXiv:2205.05198, section 5): full, selective, nested.

Laws: (1) output and all gradients are those of one device, under the masks that forward drew; (2)
they are bit for bit those without recomputation, and every random stream is left as without it; (3)
all layers' inputs are what autograd keeps, 1/tp of them where they are distributed or split; (4)
backward communicates what forward did once more, and gathers what was distributed; (5) running
twice changes nothing; (6) a plan that makes no sense is refused. Uniform, block, nested and
selective; dropout inside and outside of tensor-parallel regions; sequence parallelism on or off.
Of any function: (7) it is given the second time what it was given the first, as it lay in memory,
under the same autocast, and what it makes is freed; (8) one that does something else then is
refused, both in full in `verify.checks.rerun`.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.checks.rerun import DTYPES
from verify.runner.examiner import CheckCase
from verify.strategies.cases import STRIDES
from verify.strategies.random import (
    WHOLE,
    recomputed_cases,
    refusable_plans,
    rerun_cases,
)


@given(case=recomputed_cases())
def test_output_and_gradients(check: CheckCase, case: Case) -> None:
    """Laws 1 and 2. Must catch: other masks in backward than in forward; layers left out or run
    twice where they do not divide; a bias whose gradient counts twice."""
    check("equivalence", case)


@given(case=recomputed_cases(strides=STRIDES))
def test_nothing_changes(check: CheckCase, case: Case) -> None:
    """Law 2. Must catch: streams that go on from where backward left them; a tensor-parallel stream
    that is not put back; a gathered input in another order, or in other memory."""
    check("recomputation", case)


@given(case=recomputed_cases(methods=WHOLE, every_layer=True))
def test_what_is_kept(check: CheckCase, case: Case) -> None:
    """Law 3. Must catch: activations that are kept all the same; an input kept whole, or as a view
    of the whole."""
    check("memory", case)


@given(case=recomputed_cases())
def test_what_is_communicated(check: CheckCase, case: Case) -> None:
    """Law 4. Must catch: a layer that runs once too often; a gather of what is not split."""
    check("communication", case)


@given(case=recomputed_cases())
def test_the_same_bits_again(check: CheckCase, case: Case) -> None:
    """Law 5. Must catch: a generator that is seeded by the clock or left by an earlier run."""
    check("determinism", case)


@given(case=refusable_plans())
def test_plans_without_sense(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: no layer, or one that is not there, taken for some; an input that does not
    divide, cut short."""
    check("refusal", case)


@given(case=rerun_cases())
def test_a_function_runs_as_it_did(check: CheckCase, case: Case) -> None:
    """Law 7. Must catch: an input in other memory than it was in; what the second run made, kept
    after backward."""
    check("rerun", case)


@given(case=rerun_cases(autocasts=DTYPES, lies=("packed",)))
def test_a_function_under_autocast(check: CheckCase, case: Case) -> None:
    """Law 7. Must catch: the autocast of backward, or none; one of another dtype; one that is kept
    only where there was any, under a backward that has one."""
    check("rerun", case)


@given(case=rerun_cases(lies=("packed",), changed=True))
def test_a_function_that_does_something_else(check: CheckCase, case: Case) -> None:
    """Law 8. Must catch: tensors of the second run that take the places of others; one too many, or
    too few."""
    check("unrepeatable", case)
