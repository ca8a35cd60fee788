"""Layer norm and RMS norm, of hidden states, and of queries and keys head by head.

Laws: (1) output and gradients of the input are those of one device; (2) so are the gradients of
weight and bias, which every rank has, of all tokens and all heads: with sequence parallelism and
without, over tp and over cp; (3) a zero-centred weight stands for 1 + weight; (4) for backward the
input is kept, and a number or two a row, and (5) only gradients of parameters are communicated; (6)
memory order, (7) the layout and (8) running twice change nothing; (9) features that do not fit the
weight are not computed.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.runner.examiner import CheckCase
from verify.strategies.cases import STRIDES
from verify.strategies.layer import norm_cases
from verify.strategies.misfits import misfit_cases

BOTH = ("norm", "qk_norm")


@given(case=norm_cases("norm", strides=STRIDES))
def test_hidden_states(check: CheckCase, case: Case) -> None:
    """Laws 1, 2, 3 and 6. Must catch: one kind of norm, or its bias, whose gradient is not summed
    under sequence parallelism, or summed without it; statistics in low precision; an offset that
    backward forgets."""
    check("equivalence", case)


@given(case=norm_cases("qk_norm", strides=STRIDES))
def test_queries_and_keys(check: CheckCase, case: Case) -> None:
    """Laws 1, 2, 3 and 6. Must catch: a gradient of this rank's heads only, which without sequence
    parallelism nothing else shows; keys that every rank has, whose gradient counts once too often.
    """
    check("equivalence", case)


@given(case=norm_cases(*BOTH))
def test_communication_and_memory(check: CheckCase, case: Case) -> None:
    """Laws 4 and 5. Must catch: what is normalised kept beside the input; a sum of gradients that
    are complete."""
    check("communication", case)
    if case.concept == "norm":
        check("memory", case)


@given(case=norm_cases(*BOTH))
def test_the_layout_does_not_matter(check: CheckCase, case: Case) -> None:
    """Law 7. Must catch: statistics over the rows of a rank."""
    check("invariance", case)


@given(case=norm_cases(*BOTH))
def test_the_same_bits_again(check: CheckCase, case: Case) -> None:
    """Law 8. Must catch: gradients added to what an earlier run left."""
    check("determinism", case)


@given(case=misfit_cases(norm_cases(*BOTH)))
def test_features_that_do_not_fit(check: CheckCase, case: Case) -> None:
    """Law 9. Must catch: one feature that is broadcast to all weights."""
    check("misfit", case)
