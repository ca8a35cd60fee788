"""Linear layers split by output features (column) or by input features (row), arXiv:1909.08053.

Laws: (1) the output, the gradient of the input and of every parameter are those of one linear layer
on one device; (2) copies of them on several ranks are equal; (3) a frozen weight gets no gradient,
and everything else gets the same as before; (4) with skip_bias_add the caller gets the bias, and
the gradient it sends back reaches the parameter; (5) a bias counts once, whatever the weights; (6)
how a tensor lies in memory changes nothing; (7) the layout changes nothing; (8) nor does running
twice; (9) no more is communicated than the layer needs, (10) or kept for backward. Sequence
parallelism is on or off. Replicas have data and weights of their own.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.runner.examiner import CheckCase
from verify.strategies.cases import Choices, cases

BOTH = ("column_linear", "row_linear")
PLAIN: Choices = {"strides": ("contiguous",), "frozen_weight": (False,)}
ADDED: Choices = {**PLAIN, "skip_bias_add": (False,)}
RETURNED: Choices = {**PLAIN, "bias": (True,), "skip_bias_add": (True,)}
FROZEN: Choices = {**PLAIN, "frozen_weight": (True,)}
ALONE: Choices = {**PLAIN, "bias": (True,), "zeros": ("weight", "x", "grad y")}
TRANSPOSED: Choices = {**PLAIN, "strides": ("transposed",)}


@given(case=cases("column_linear", options=ADDED))
def test_column_parallel(check: CheckCase, case: Case) -> None:
    """Laws 1 and 2. Must catch: a gradient of the input that is not summed, or twice; a shard of
    the weight or bias of the wrong rank; under sequence parallelism a weight gradient from this
    rank's tokens only; a bias that is dropped when the output is gathered."""
    check("equivalence", case)


@given(case=cases("row_linear", options=ADDED))
def test_row_parallel(check: CheckCase, case: Case) -> None:
    """Laws 1 and 2. Must catch: a bias added by every rank before the sum; a bias gradient of this
    rank's tokens only under sequence parallelism, or summed where it is complete; an input that is
    split twice or not at all."""
    check("equivalence", case)


@given(case=cases(*BOTH, options=RETURNED))
def test_a_bias_left_to_the_caller(check: CheckCase, case: Case) -> None:
    """Law 4. Must catch: a bias that is added and returned, or neither; one that is detached or
    gathered; its gradient summed over the wrong ranks."""
    check("equivalence", case)


@given(case=cases("column_linear", options=FROZEN))
def test_column_parallel_frozen(check: CheckCase, case: Case) -> None:
    """Law 3. Must catch: a frozen weight whose layer skips the sum of the input's gradient, or its
    reduce-scatter; a bias beside it without gradient; a gradient on the frozen weight."""
    check("equivalence", case)


@given(case=cases("row_linear", options=FROZEN))
def test_row_parallel_frozen(check: CheckCase, case: Case) -> None:
    """Law 3. Must catch: the same on the other layer, where no sum belongs to the input's gradient
    but a gather does."""
    check("equivalence", case)


@given(case=cases(*BOTH, options=ALONE))
def test_each_part_alone(check: CheckCase, case: Case) -> None:
    """Law 5: with no weights or no input, what is left is the bias; with no upstream gradient,
    nothing may be. Must catch: a bias scaled by tp, that a sum hides in low precision; gradients
    left over from elsewhere."""
    check("equivalence", case)


@given(case=cases(*BOTH, options=TRANSPOSED))
def test_strided_tensors(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: a view of a transposed input as a matrix, a sum, gather or reduce-scatter
    of memory in the order of storage."""
    check("equivalence", case)


@given(case=cases(*BOTH, options=PLAIN))
def test_the_layout_does_not_matter(check: CheckCase, case: Case) -> None:
    """Law 7. Must catch: an initialisation or a path of its own for one rank; a shard taken by
    global rank instead of tp rank."""
    check("invariance", case)


@given(case=cases(*BOTH, options=PLAIN))
def test_the_same_bits_again(check: CheckCase, case: Case) -> None:
    """Law 8. Must catch: an asynchronous sum that is read before it is done, gradients added to
    what an earlier run left."""
    check("determinism", case)


@given(case=cases(*BOTH, options={"strides": ("contiguous",)}))
def test_communication_and_memory(check: CheckCase, case: Case) -> None:
    """Laws 9 and 10. Must catch: an input kept gathered, or kept for a frozen weight, or gathered
    again for one; a gradient that is summed and then split; a sum of the bias's gradient where it
    is complete."""
    check("communication", case)
    check("memory", case)
