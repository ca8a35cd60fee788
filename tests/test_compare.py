"""Comparison and tolerance: what is right passes, and what is wrong is found where it is."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from observed import Scene, scene

from verify.case import Case
from verify.errors import HarnessError
from verify.layout import Layout
from verify.oracle.contract import Contract, TensorSpec
from verify.placement import Partial
from verify.reference import Reference
from verify.tolerance import MULTIPLES, Tolerance

LENSES = [
    ("exact", "float64"),
    ("fp64", "float64"),
    ("native", "float32"),
    ("native", "bfloat16"),
    ("native", "float16"),
]


@pytest.mark.parametrize(("lens", "dtype"), LENSES)
def test_what_is_right_passes(lens, dtype):
    comparison = scene(lens, dtype).compare()
    assert comparison.divergences == []
    assert comparison.evidence is None


@pytest.mark.parametrize(("lens", "dtype"), LENSES)
@pytest.mark.parametrize("name", ["y", "grad x", "grad weight", "grad bias"])
def test_one_wrong_row_is_found_where_it_is(lens, dtype, name):
    spoilt = scene(lens, dtype)

    def way(tensor, rank):
        tensor[2] *= 1.5
        return tensor

    found = spoilt.spoil(name, way, ranks=[3]).compare().divergences
    assert [each.tensor for each in found] == [name]
    assert found[0].kind == "value"
    assert (found[0].rank, found[0].ranks) == (3, (3,))
    assert found[0].coordinates == {"tp": 1, "dp": 1}
    assert found[0].index[0] == 2
    index = found[0].index
    assert found[0].candidate == float(spoilt.tensors[3][name][index])
    exact = spoilt.references["dp1"].results[name]
    assert found[0].reference == float(spoilt.cut(name, 3, exact)[index])
    assert found[0].error > found[0].bound


def test_divergences_are_in_the_order_of_execution():
    spoilt = scene()
    for name in ("grad bias", "y", "grad x"):
        spoilt.spoil(name, lambda tensor, rank: tensor * 2)
    found = spoilt.compare()
    assert [each.tensor for each in found.divergences] == ["y", "grad x", "grad bias"]
    assert found.evidence.name == "y"


def test_a_wrong_replica_speaks_even_if_the_first_is_right():
    found = scene().spoil("y", lambda t, rank: t + 1, ranks=[2, 3]).compare().divergences
    assert found[0].ranks == (2, 3)
    assert found[0].coordinates["dp"] == 1


def test_ranks_are_not_compared_with_another_replicas_reference():
    swapped = scene()
    tensors = swapped.tensors
    tensors[0]["y"], tensors[2]["y"] = tensors[2]["y"], tensors[0]["y"]
    assert swapped.compare().divergences[0].ranks == (0, 2)


def test_copies_must_hold_the_same_bits():
    def way(tensor, rank):
        tensor[0, 0, 0] *= 1 + 2**-51
        return tensor

    (found,) = scene().spoil("y", way, ranks=[1]).compare().divergences
    assert found.kind == "copies"
    assert (found.rank, found.ranks, found.index) == (1, (1,), (0, 0, 0))
    assert "rank 0, which holds a copy" in found.detail


def test_parts_of_a_shard_are_no_copies():
    def way(tensor, rank):
        return tensor * (1 + 2**-51)

    assert scene().spoil("grad x", way, ranks=[1]).compare().divergences == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("lens", "dtype"), LENSES)
def test_what_is_not_finite_is_wrong(lens, dtype, bad):
    def way(tensor, rank):
        tensor[1, 0] = bad
        return tensor

    (found,) = scene(lens, dtype).spoil("grad weight", way, ranks=[2]).compare().divergences
    assert (found.kind, found.ranks, found.index) == ("value", (2,), (1, 0))


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("missing", lambda tensor, rank: None),
        ("shape", lambda tensor, rank: tensor[:1]),
        ("shape", lambda tensor, rank: tensor.unsqueeze(0)),
        ("dtype", lambda tensor, rank: tensor.float()),
    ],
)
def test_malformed_tensors_are_wrong(kind, way):
    found = scene().spoil("grad weight", way, ranks=[1]).compare().divergences
    assert [(each.tensor, each.kind, each.ranks) for each in found] == [("grad weight", kind, (1,))]
    assert found[0].detail


def test_a_gradient_that_is_zero_must_be_there():
    still = scene(options={"zeros": "grad y"})
    assert not still.full("grad x").any()
    assert still.compare().divergences == []
    found = still.spoil("grad x", lambda tensor, rank: None).compare().divergences
    assert [each.kind for each in found] == ["missing"]


def test_a_frozen_parameter_has_no_gradient():
    frozen = scene(options={"frozen_weight": True})
    assert "grad weight" not in frozen.tensors[0]
    assert frozen.compare().divergences == []
    frozen.tensors[1]["grad weight"] = torch.zeros(6, 4, dtype=torch.float64)
    (found,) = frozen.compare().divergences
    assert (found.tensor, found.kind, found.ranks) == ("grad weight", "unexpected", (1,))


def _partial(case: Case) -> Scene:
    shape = (4, 2, 6)
    contract = Contract(
        inputs={"x": TensorSpec(shape, {}, {"tp": Partial()})},
        parameters={},
        outputs={"y": TensorSpec(shape, {"tp": Partial()}, {})},
        reference=lambda inputs, parameters: {"y": inputs["x"] * 3},
        linear=True,
    )
    return Scene(case, contract, {})


def test_partial_tensors_are_summed():
    case = Case(concept="doubled", layout=Layout(tp=3, dp=2))

    def spread(tensor, rank):
        return tensor + {0: 1.0, 1: 1.0, 2: -2.0}[rank % 3]

    assert _partial(case).spoil("y", spread).compare().divergences == []
    (found,) = _partial(case).spoil("y", lambda t, rank: t + 1, [4]).compare().divergences
    assert found.ranks == (3, 4, 5)
    assert found.detail == "(the sum over ranks 3, 4, 5)"


def test_a_comparison_that_saw_nothing_is_no_success():
    empty = Scene(Case(concept="fake_row", layout=Layout(), shape=_SMALL))
    empty.contract = Contract(inputs={}, parameters={}, outputs={}, reference=lambda i, p: {})
    with pytest.raises(HarnessError, match="saw 0 local tensors"):
        empty.compare()


_SMALL = {"sequence": 1, "batch": 1, "in_features": 2, "out_features": 2}


def test_a_reference_that_is_all_zero_shows_nothing():
    case = Case(concept="zero", layout=Layout())
    contract = Contract(
        inputs={"x": TensorSpec((2,))},
        parameters={},
        outputs={"y": TensorSpec((2,))},
        reference=lambda inputs, parameters: {"y": inputs["x"] * 0},
    )
    with pytest.raises(HarnessError, match=r"every result .* is zero"):
        Scene(case, contract, {}).compare()


def _split_sum(case: Case, reference: Reference, parts: int) -> dict[str, torch.Tensor]:
    """The row-parallel layer as `parts` ranks compute it, each rounding its partial product."""
    dtype = getattr(torch, case.dtype)
    x = reference.problem.inputs["x"].full.to(dtype)
    weight = reference.problem.parameters["weight"].full.to(dtype)
    bias = reference.problem.parameters["bias"].full.to(dtype)
    products = [a @ b.t() for a, b in zip(x.chunk(parts, -1), weight.chunk(parts, 1), strict=True)]
    total = products[0]
    for product in products[1:]:
        total = total + product
    return {"y": total + bias}


@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(["float64", "float32", "bfloat16", "float16"]),
    parts=st.sampled_from([1, 2, 4, 8]),
    rows=st.integers(1, 4),
    out=st.integers(1, 5),
    inside=st.sampled_from([8, 16, 64]),
)
@settings(max_examples=250, deadline=None)
def test_honest_rounding_is_accepted_and_an_error_of_the_size_of_the_terms_is_not(
    seed, dtype, parts, rows, out, inside
):
    shape = {"sequence": rows, "batch": 1, "in_features": inside, "out_features": out}
    lens = "fp64" if dtype == "float64" else "native"
    case = Case(
        concept="fake_row", layout=Layout(tp=1), shape=shape, lens=lens, dtype=dtype, seed=seed
    )
    made = Scene(case)
    reference = made.references[""]
    tolerance, expected = Tolerance(reference), reference.results["y"]
    honest = _split_sum(case, reference, parts)["y"].double()
    assert tolerance.excess("y", honest, expected, lambda full: full) is None
    off = honest + reference.evaluate(torch.float64, lambda name, g: g.magnitude)["y"]
    assert tolerance.excess("y", off, expected, lambda full: full) is not None


def test_a_difference_of_large_numbers_is_as_uncertain_as_they_are():
    """log-sum-exp minus logit: a tiny loss, computed as torch does not, is right."""
    case = Case(concept="loss", layout=Layout(), seed=3)
    contract = Contract(
        inputs={"x": TensorSpec((1, 1, 2))},
        parameters={},
        outputs={"y": TensorSpec((1, 1))},
        reference=lambda i, p: {"y": (8 * i["x"]).logsumexp(-1) - 8 * i["x"].amax(-1)},
    )
    reference = Scene(case, contract, {}).references[""]
    x = 8 * reference.problem.inputs["x"].full
    other = torch.log1p(torch.exp(x.amin(-1) - x.amax(-1)))
    exact = reference.results["y"]
    assert float((other - exact).abs() / exact) > MULTIPLES["fp64"] * 2**-53
    assert Tolerance(reference).excess("y", other, exact, lambda full: full) is None
    assert Tolerance(reference).excess("y", other * 1.001, exact, lambda full: full) is not None


def test_a_wrong_accumulation_dtype_is_beyond_the_native_bound():
    case = Case(
        concept="fake_row",
        layout=Layout(),
        shape={"sequence": 4, "batch": 2, "in_features": 512, "out_features": 8},
        lens="native",
        dtype="float32",
    )
    reference = Scene(case).references[""]
    x = reference.problem.inputs["x"].full
    weight, bias = (reference.problem.parameters[name].full for name in ("weight", "bias"))
    low = (x.bfloat16() @ weight.bfloat16().t()).double() + bias
    found = Tolerance(reference).excess("y", low, reference.results["y"], lambda full: full)
    assert found is not None
    assert found.error > 100 * found.bound


def test_more_ranks_than_32_round_more():
    bounds = []
    for ranks in (8, 32, 128):
        small = scene("native", "float32", layout=Layout()).references[""]
        reference = replace(small, case=replace(small.case, layout=Layout(dp=ranks)))
        tolerance = Tolerance(reference)
        _, whole = tolerance.bounds("y", reference.results["y"], lambda t: t, disturbed=4)
        bounds.append(whole)
    assert bounds[0] == bounds[1]
    assert bounds[2] / bounds[1] == pytest.approx(2.0)


def test_errors_that_rows_may_have_singly_they_may_not_have_together():
    made = scene("native", "float32", layout=Layout())
    tolerance = Tolerance(made.references[""])
    expected = made.references[""].results["grad x"]
    runs = torch.stack([d.abs() for d in tolerance._deviations("grad x", 32)])
    norms = runs.reshape(len(runs), -1, expected.shape[-1]).norm(dim=-1)
    allowed = MULTIPLES["native"] * norms.amax(0)
    off = torch.zeros_like(expected).reshape(-1, expected.shape[-1])
    off[:, 0] = allowed * 0.99
    found = tolerance.excess("grad x", expected + off.view_as(expected), expected, lambda t: t)
    assert found is not None
    assert found.norm == "tensor"
    few = torch.zeros_like(off)
    few[0] = off[0]
    near = expected + few.view_as(expected)
    assert tolerance.excess("grad x", near, expected, lambda t: t) is None
