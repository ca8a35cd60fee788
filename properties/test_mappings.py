"""The operations that move a tensor between the placements of tensor and sequence parallelism.

Laws: (1) an operation is the identity of the full tensor, and so is its backward: the output and
the gradient of the input are the reference's, bit for bit where the data are integers; (2) copies
on several ranks are equal; (3) how a tensor lies in memory changes nothing; (4) the layout changes
nothing; (5) nor does running twice; (6) each way is one collective at most, and nothing is kept for
backward. Every other axis of the layout holds replicas with data of their own.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.runner.examiner import CheckCase
from verify.strategies.cases import MAPPINGS, Choices, cases

CONTIGUOUS: Choices = {"strides": ("contiguous",)}
TRANSPOSED: Choices = {"strides": ("transposed",)}


@given(case=cases("copy_to_tp", "reduce_from_tp", options=CONTIGUOUS))
def test_copy_and_reduce(check: CheckCase, case: Case) -> None:
    """Laws 1 and 2 of the all-reduces. Must catch: a sum that is missing, done twice, averaged, or
    over the group of another replica; a sum in the wrong one of forward and backward."""
    check("equivalence", case)


@given(case=cases("scatter_to_tp", "gather_from_tp", options=CONTIGUOUS))
def test_scatter_and_gather(check: CheckCase, case: Case) -> None:
    """Laws 1 and 2. Must catch: slices of the wrong rank or dimension; a gather along dimension 0
    that only has the right shape; a backward that sums where it should split."""
    check("equivalence", case)


@given(case=cases("scatter_to_sp", "reduce_scatter_to_sp", options=CONTIGUOUS))
def test_sequence_parallel_regions(check: CheckCase, case: Case) -> None:
    """Laws 1 and 2 along the sequence. Must catch: a reduce-scatter that scatters without a sum, or
    hands out chunks in another order."""
    check("equivalence", case)


@given(case=cases("gather_from_sp", options=CONTIGUOUS))
def test_the_end_of_a_sequence_parallel_region(check: CheckCase, case: Case) -> None:
    """Laws 1 and 2, whatever follows. Must catch: a backward that splits a Partial gradient, or
    sums a Replicate one (tensor_parallel_output_grad)."""
    check("equivalence", case)


@given(case=cases("all_gather_last_dim", "reduce_scatter_last_dim", options=CONTIGUOUS))
def test_sums_of_the_last_dimension(check: CheckCase, case: Case) -> None:
    """Laws 1 and 2. Must catch: a collective that works on dimension 0 used for the last one
    without moving it there and back; a missing sum in backward."""
    check("equivalence", case)


@given(case=cases("all_to_all_sp_to_hp", "all_to_all_hp_to_sp", options=CONTIGUOUS))
def test_all_to_all(check: CheckCase, case: Case) -> None:
    """Laws 1 and 2. Must catch: chunks that arrive in the wrong order, sequence and batch exchanged
    where batch is above one, a backward that repeats the forward instead of inverting it."""
    check("equivalence", case)


@given(case=cases(*MAPPINGS, options=TRANSPOSED))
def test_strided_tensors(check: CheckCase, case: Case) -> None:
    """Law 3, of inputs and upstream gradients. Must catch: a collective that works in place on a
    contiguous copy and returns the original; memory sent in the order of storage."""
    check("equivalence", case)


@given(case=cases(*MAPPINGS, options=CONTIGUOUS))
def test_the_layout_does_not_matter(check: CheckCase, case: Case) -> None:
    """Law 4. Must catch: whatever holds on one rank only, such as a shortcut for groups of one."""
    check("invariance", case)


@given(case=cases(*MAPPINGS, options=CONTIGUOUS))
def test_the_same_bits_again(check: CheckCase, case: Case) -> None:
    """Law 5. Must catch: a buffer that is read before it is written, an order of summation that
    depends on timing, state that a first run leaves behind."""
    check("determinism", case)


@given(case=cases(*MAPPINGS, options=CONTIGUOUS))
def test_communication_and_memory(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: a sum in full of which a part is taken; a gather where a split would do;
    an input that is kept."""
    check("communication", case)
    check("memory", case)
