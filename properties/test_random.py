"""Random numbers: who draws alike, what dropout does with that, and what initialisation does.

Laws: (1) ranks draw the same numbers where they hold copies or replicas that start equal, and other
numbers everywhere else: over tp in tensor-parallel regions, over etp and ep in experts, over pp
always, in full in `verify.checks.stream_laws`; (2) dropout drops copies alike, parts independently,
at its rate, and output and gradients are those of one device under the union of the masks; (3)
outside of training nothing is dropped; (4) dropout communicates nothing; (5) memory order and (6)
running twice change nothing; (7) a probability that is none is refused, and the local
initialisation of copies whose ranks have no stream in common; (8) a model that is
initialised whole is the same on every layout, bit for bit; (9) one that is initialised locally has
equal copies, and parts, layers and stages that differ; (10) both have the promised spread, and
other values with another seed; (11) what is added and does not fit is not computed; (12) streams
refuse what would make two of them meet, or lose one, in full in `verify.checks.stream_misuse`.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.runner.examiner import CheckCase
from verify.strategies.cases import STRIDES
from verify.strategies.misfits import misfit_cases
from verify.strategies.random import (
    dropout_cases,
    initialisation_cases,
    misuse_cases,
    refusable_dropout_cases,
    refusable_initialisation_cases,
    stream_cases,
)


@given(case=stream_cases())
def test_streams_of_every_layout(check: CheckCase, case: Case) -> None:
    """Law 1. Must catch: one seed for all ranks, or none in common; experts that share the
    tensor-parallel stream; stages that share a stream, also that of another ep rank; a fork that
    starts its stream again, or moves another."""
    check("streams", case)


@given(case=dropout_cases())
def test_dropout(check: CheckCase, case: Case) -> None:
    """Laws 2 and 4. Must catch: copies that drop apart, parts that drop alike, also of the sequence
    over cp; no scaling, or by the wrong rate; a bias or residual that is dropped with the rest, or
    not."""
    check("equivalence", case)


@given(case=dropout_cases(training=False))
def test_nothing_is_dropped_outside_of_training(check: CheckCase, case: Case) -> None:
    """Law 3. Must catch: a scaling that stays, a mask that is applied anyway."""
    check("equivalence", case)


@given(case=dropout_cases(strides=STRIDES[1:]))
def test_strided_tensors(check: CheckCase, case: Case) -> None:
    """Law 5. Must catch: a mask that is drawn in the order of storage."""
    check("equivalence", case)


@given(case=dropout_cases())
def test_the_same_bits_again(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: a stream that is not seeded by the run."""
    check("determinism", case)


@given(case=refusable_dropout_cases())
def test_no_probability(check: CheckCase, case: Case) -> None:
    """Law 7. Must catch: everything dropped, or nothing; a rate above one."""
    check("refusal", case)


@given(case=initialisation_cases(way="whole"))
def test_a_model_initialised_whole(check: CheckCase, case: Case) -> None:
    """Laws 8 and 10. Must catch: a part taken by the wrong rank, or of the wrong dimension; layers
    that are drawn alike; values that depend on the size of a group; a spread from the inputs of a
    part, or from the outputs."""
    check("initialisation", case)


@given(case=initialisation_cases(way="local"))
def test_a_model_initialised_locally(check: CheckCase, case: Case) -> None:
    """Laws 9 and 10. Must catch: shards that are drawn alike, experts on two ep ranks too; copies
    on data-parallel replicas that are not; stages that start equal."""
    check("initialisation", case)


@given(case=refusable_initialisation_cases())
def test_copies_that_cannot_be_drawn_locally(check: CheckCase, case: Case) -> None:
    """Law 7. Must catch: copies of an expert's bias that start apart; a size of another group that
    is asked for."""
    check("refusal", case)


@given(case=misfit_cases(dropout_cases()))
def test_a_residual_or_a_bias_that_does_not_fit(check: CheckCase, case: Case) -> None:
    """Law 11. Must catch: one token that is broadcast to all that the other has; one feature of a
    bias for all."""
    check("misfit", case)


@given(case=misuse_cases())
def test_misuse_of_streams(check: CheckCase, case: Case) -> None:
    """Law 12. Must catch: a name that is taken, or a seed that another stream has; a stream that
    there is not; states that lack a stream, or name another; states that are not of now, or that
    a caller's writing changes."""
    check("misuse", case)
