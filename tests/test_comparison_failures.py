"""Every way in which a comparison of tensors is known to go wrong silently, in every arithmetic."""

from dataclasses import replace

import pytest
import torch
from observed import Scene, scene

from verify.case import Case
from verify.errors import HarnessError
from verify.layout import Layout
from verify.oracle.contract import Contract, TensorSpec

LENSES = [
    ("exact", "float64"),
    ("fp64", "float64"),
    ("native", "float32"),
    ("native", "bfloat16"),
    ("native", "float16"),
]
EVERY_LENS = pytest.mark.parametrize(("lens", "dtype"), LENSES)
LARGE = {"sequence": 40, "batch": 12, "in_features": 8, "out_features": 144}


def large(lens, dtype):
    """An output of 69 thousand elements, in 480 rows."""
    layout = Layout(tp=2)
    return Scene(Case(concept="fake_row", layout=layout, shape=LARGE, lens=lens, dtype=dtype))


def of_function(function, shape=(4, 3), lens="fp64", dtype="float64", **options):
    """A scene of a concept that computes one output by a function of one input, on one rank."""
    case = Case(concept="f", layout=Layout(), lens=lens, dtype=dtype, options=options)
    contract = Contract(
        inputs={"x": TensorSpec(shape)},
        parameters={},
        outputs={"y": TensorSpec(shape)},
        reference=lambda inputs, parameters: {"y": function(inputs["x"])},
        linear=True,
    )
    return Scene(case, contract, {})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_reference_that_is_not_finite_is_no_expectation(bad):
    """On the reference's side only, or on both: the harness cannot say, whatever the candidate."""
    for candidate in (0.0, bad):
        right = of_function(lambda x: x * 1.0)
        right.spoil("y", lambda y, rank, value=candidate: torch.full_like(y, value))
        bad_contract = of_function(lambda x: x * 1.0).contract
        bad_contract = replace(bad_contract, reference=lambda i, p: {"y": i["x"] * bad})
        right.references[""] = replace(right.references[""], contract=bad_contract)
        with pytest.raises(HarnessError, match=r"y of .* is not finite"):
            right.compare()


@EVERY_LENS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_candidate_that_is_wholly_not_finite_is_wrong_on_every_rank(lens, dtype, bad):
    spoilt = scene(lens, dtype).spoil("y", lambda y, rank: torch.full_like(y, bad))
    (found,) = spoilt.compare().divergences
    assert (found.kind, found.ranks) == ("value", (0, 1, 2, 3))


@EVERY_LENS
@pytest.mark.parametrize("name", ["y", "grad x", "grad weight", "grad bias"])
def test_zeros_for_something_are_wrong(lens, dtype, name):
    spoilt = scene(lens, dtype).spoil(name, lambda tensor, rank: torch.zeros_like(tensor))
    assert [each.tensor for each in spoilt.compare().divergences] == [name]


@EVERY_LENS
@pytest.mark.parametrize("power", [-1, -20])
def test_something_for_zeros_is_wrong(lens, dtype, power):
    """No element of a gradient without an upstream one may be anything, however small."""
    still = scene(lens, dtype, options={"zeros": "grad y"})
    assert still.compare().divergences == []
    spoilt = still.spoil("grad weight", lambda t, rank: t + 2.0**power, ranks=[1])
    (found,) = spoilt.compare().divergences
    assert (found.kind, found.ranks, found.reference) == ("value", (1,), 0.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_denormals_are_numbers(dtype):
    """Where the reference is denormal, so is the candidate; another scale of it is wrong."""
    info = torch.finfo(getattr(torch, dtype))
    tiny = of_function(lambda x: x * (info.tiny / 4), lens="native", dtype=dtype)
    assert 0 < float(tiny.full("y").abs().max()) < 4 * info.tiny
    assert tiny.compare().divergences == []
    spoilt = tiny.spoil("y", lambda y, rank: y * 64)
    assert [each.tensor for each in spoilt.compare().divergences] == ["y"]


@EVERY_LENS
def test_one_wrong_row_of_a_large_tensor_is_wrong(lens, dtype):
    def way(y, rank):
        y[37, 11] *= 1.25
        return y

    (found,) = large(lens, dtype).spoil("y", way).compare().divergences
    assert found.index[:2] == (37, 11)


@EVERY_LENS
def test_one_wrong_element_of_a_large_tensor_is_wrong(lens, dtype):
    def way(y, rank):
        # What is twice as far away as most elements are from each other: bfloat16 has few bits.
        y[37, 11, 5] += 6.0
        return y

    (found,) = large(lens, dtype).spoil("y", way).compare().divergences
    assert found.index == (37, 11, 5)


@EVERY_LENS
@pytest.mark.parametrize("name", ["y", "grad x", "grad weight", "grad bias"])
def test_a_constant_factor_is_wrong(lens, dtype, name):
    """1 + 2^-6, which in bfloat16 is two units in the last place or four."""
    spoilt = large(lens, dtype).spoil_full(name, lambda full: full * (1 + 2.0**-6))
    assert [each.tensor for each in spoilt.compare().divergences] == [name]


@EVERY_LENS
def test_tensors_of_one_shape_that_are_exchanged_are_wrong(lens, dtype):
    shape = {"sequence": 4, "batch": 3, "in_features": 6, "out_features": 6}
    case = Case(concept="fake_row", layout=Layout(), shape=shape, lens=lens, dtype=dtype)
    swapped = Scene(case)
    (tensors,) = swapped.tensors
    tensors["y"], tensors["grad x"] = tensors["grad x"], tensors["y"]
    assert [each.tensor for each in swapped.compare().divergences] == ["y", "grad x"]


@EVERY_LENS
def test_an_empty_tensor_is_right_where_it_should_be_empty_and_nowhere_else(lens, dtype):
    def empty():
        return of_function(lambda x: x * 2, (0, 3), lens, dtype, ignored=True)

    assert empty().compare().divergences == []
    assert empty().compare().elements == 0
    found = empty().spoil("y", lambda y, rank: torch.zeros(1, 3, dtype=y.dtype)).compare()
    assert [each.kind for each in found.divergences] == ["shape"]
    found = scene(lens, dtype).spoil("y", lambda y, rank: y[:, :0]).compare().divergences
    assert [each.kind for each in found] == ["shape"]


@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.int64])
def test_equal_values_of_another_dtype_are_wrong(other):
    ones = of_function(lambda x: x * 0 + 1)
    (found,) = ones.spoil("y", lambda y, rank: y.to(other)).compare().divergences
    assert (found.tensor, found.kind) == ("y", "dtype")


@pytest.mark.parametrize("shape", [(3, 4), (12,), (1, 4, 3), (4, 3, 1)])
def test_equal_values_of_another_shape_are_wrong(shape):
    same = of_function(lambda x: x * 2).spoil("y", lambda y, rank: y.reshape(shape))
    (found,) = same.compare().divergences
    assert (found.tensor, found.kind) == ("y", "shape")


@EVERY_LENS
def test_a_gradient_that_is_not_there_is_not_zero(lens, dtype):
    still = scene(lens, dtype, options={"zeros": "grad y"})
    found = still.spoil("grad bias", lambda tensor, rank: None, ranks=[2]).compare().divergences
    assert [(each.kind, each.ranks) for each in found] == [("missing", (2,))]


def test_how_much_was_compared_is_counted():
    whole = scene()
    count = sum(t.numel() for tensors in whole.tensors for t in tensors.values())
    assert whole.compare().elements == count > 0
