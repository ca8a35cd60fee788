"""The feed-forward block, column-parallel then row-parallel, with and without a gate.

Laws: (1) output and all gradients are those of one device, with the activation applied to full
sums, and to the gate; (2) copies on several ranks are equal; (3) memory order, (4) the layout and
(5) running twice change nothing; (6) there are two collectives in all, one more for a gate that is
a layer of its own, and what is kept inside is split over tp; (7) an unknown activation, or an ffn
that does not divide, is refused. Sequence parallelism is on or off.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.runner.examiner import CheckCase
from verify.strategies.cases import Choices, cases, refusable_cases

CONTIGUOUS: Choices = {"strides": ("contiguous",)}
TRANSPOSED: Choices = {"strides": ("transposed",)}


@given(case=cases("tp_mlp", options=CONTIGUOUS))
def test_output_and_gradients(check: CheckCase, case: Case) -> None:
    """Laws 1 and 2. Must catch: an activation of partial sums, or the approximate gelu for the
    exact one; a sum left out of the input's gradient; either bias added or summed the wrong number
    of times; the shards of fc1 and fc2 not matching; a packed weight cut into one slice a rank, its
    halves swapped, or the activation on the wrong one."""
    check("equivalence", case)


@given(case=cases("tp_mlp", options=TRANSPOSED))
def test_strided_tensors(check: CheckCase, case: Case) -> None:
    """Law 3. Must catch: a layer that reads memory in the order of storage."""
    check("equivalence", case)


@given(case=cases("tp_mlp", options=CONTIGUOUS))
def test_the_layout_does_not_matter(check: CheckCase, case: Case) -> None:
    """Law 4. Must catch: a fused path for one rank that computes something else."""
    check("invariance", case)


@given(case=cases("tp_mlp", options=CONTIGUOUS))
def test_the_same_bits_again(check: CheckCase, case: Case) -> None:
    """Law 5. Must catch: an asynchronous sum that is read before it is done."""
    check("determinism", case)


@given(case=cases("tp_mlp", options=CONTIGUOUS))
def test_communication_and_memory(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: an input kept gathered; an all-reduce where a reduce-scatter belongs; the
    halves of a packed product copied."""
    check("communication", case)
    check("memory", case)


@given(case=refusable_cases("tp_mlp"))
def test_what_cannot_be_computed_is_refused(check: CheckCase, case: Case) -> None:
    """Law 7. Must catch: an ffn whose rest is left out; an option that nothing comes of."""
    check("refusal", case)
