"""The two-layer perceptron, column-parallel then row-parallel, with two collectives in all.

Laws: (1) output and all gradients are those of one device, with the activation applied to full
sums; (2) copies on several ranks are equal; (3) memory order, (4) the layout and (5) running twice
change nothing. Sequence parallelism is on or off.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.examiner import CheckCase
from verify.strategies import Choices, cases

CONTIGUOUS: Choices = {"strides": ("contiguous",)}
TRANSPOSED: Choices = {"strides": ("transposed",)}


@given(case=cases("tp_mlp", options=CONTIGUOUS))
def test_output_and_gradients(check: CheckCase, case: Case) -> None:
    """Laws 1 and 2. Must catch: an activation of partial sums, or the approximate gelu for the
    exact one; a sum left out of the input's gradient; either bias added or summed the wrong number
    of times; the shards of fc1 and fc2 not matching."""
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
