"""Every way in which a comparison of tensors is known to go wrong silently, in every arithmetic."""

from dataclasses import replace

import pytest
import torch
from observed import Scene, scene

from verify.case import Case
from verify.errors import BeyondRange, HarnessError
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
BAD = [float("nan"), float("inf"), -float("inf")]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64]
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


def not_finite(lens, dtype, way):
    """A scene whose reference is `way` of what it should be, and whose candidates are right."""
    found = of_function(lambda x: x * 1.0, lens=lens, dtype=dtype)
    contract = replace(found.contract, reference=lambda i, p: {"y": way(i["x"] * 1.0)})
    found.references[""] = replace(found.references[""], contract=contract)
    return found


def everywhere(bad):
    return lambda y: y * 0 + bad


def in_one_place(bad):
    there = torch.zeros(4, 3, dtype=torch.bool)
    there[2, 1] = True
    return lambda y: y.masked_fill(there, bad)


@EVERY_LENS
@pytest.mark.parametrize("where", [everywhere, in_one_place])
@pytest.mark.parametrize("bad", BAD)
def test_a_reference_that_is_not_finite_is_no_expectation(lens, dtype, where, bad):
    """On the reference's side only, or on both in the same place: the harness cannot say, whatever
    the candidate."""
    way = where(bad)
    for both in (False, True):
        spoilt = not_finite(lens, dtype, way)
        if both:
            spoilt.spoil("y", lambda y, rank: way(y))
            assert not spoilt.tensors[0]["y"].isfinite().all()
        with pytest.raises(HarnessError, match=r"y of .* is not finite"):
            spoilt.compare()


@EVERY_LENS
@pytest.mark.parametrize("bad", BAD)
def test_one_element_of_a_candidate_that_is_not_finite_is_wrong(lens, dtype, bad):
    spoilt = of_function(lambda x: x * 1.0, lens=lens, dtype=dtype)
    spoilt.spoil("y", lambda y, rank: in_one_place(bad)(y))
    (found,) = spoilt.compare().divergences
    assert (found.tensor, found.kind, found.index) == ("y", "value", (2, 1))


@pytest.mark.parametrize("bad", [1.0, float("inf")])
def test_what_overflows_in_the_dtype_only_is_no_expectation(bad):
    """A reference that is finite in float64 and not in float16, whatever the candidate."""
    large = of_function(lambda x: x * 1e6, lens="native", dtype="float16")
    large.spoil("y", lambda y, rank: torch.full_like(y, bad))
    with pytest.raises(BeyondRange, match="y, grad x overflows"):
        large.compare()


@EVERY_LENS
@pytest.mark.parametrize("bad", BAD)
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


def denormal(lens, dtype):
    """A scene of denormal results: in the exact lens the magnitude of what is given makes them."""
    tiny = torch.finfo(getattr(torch, dtype)).tiny
    if lens == "exact":
        options = {"magnitude": tiny / 16, "zeros": "grad y"}
        return of_function(lambda x: x * 1.0, lens=lens, dtype=dtype, **options)
    return of_function(lambda x: x * (tiny / 4), lens=lens, dtype=dtype)


@EVERY_LENS
def test_denormals_are_numbers(lens, dtype):
    """Where the reference is denormal, so is the candidate."""
    found = denormal(lens, dtype)
    assert 0 < float(found.full("y").abs().min()) < torch.finfo(getattr(torch, dtype)).tiny
    assert found.compare().divergences == []


@EVERY_LENS
@pytest.mark.parametrize("way", [lambda y: y * 64, torch.zeros_like], ids=["scaled", "flushed"])
def test_only_fp64_takes_a_denormal_for_another(lens, dtype, way):
    """By design: its bound is measured in float32, which ends long before float64 loses digits, and
    so cannot be less than the smallest normal number; and its norms square what is below that."""
    spoilt = denormal(lens, dtype).spoil("y", lambda y, rank: way(y))
    wrong = [] if lens == "fp64" else ["y"]
    assert [each.tensor for each in spoilt.compare().divergences] == wrong


def test_fp64_takes_no_more_than_that():
    spoilt = denormal("fp64", "float64").spoil("y", lambda y, rank: y + 2.0**-500)
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


@EVERY_LENS
@pytest.mark.parametrize("other", DTYPES)
def test_equal_values_of_another_dtype_are_wrong(lens, dtype, other):
    ones = of_function(lambda x: x * 0 + 1, lens=lens, dtype=dtype)
    own = getattr(torch, dtype)
    found = ones.spoil("y", lambda y, rank: y.to(other)).compare().divergences
    assert [(each.tensor, each.kind) for each in found] == [("y", "dtype")] * (other is not own)


@EVERY_LENS
@pytest.mark.parametrize("shape", [(3, 4), (12,), (1, 4, 3), (4, 3, 1)])
def test_equal_values_of_another_shape_are_wrong(lens, dtype, shape):
    same = of_function(lambda x: x * 2, lens=lens, dtype=dtype)
    (found,) = same.spoil("y", lambda y, rank: y.reshape(shape)).compare().divergences
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
