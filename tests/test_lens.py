"""Generated tensors: the same everywhere, exact sums, every option does what it says."""

import dataclasses
import hashlib
import subprocess
import sys

import fake_targets  # noqa: F401  (registers the concepts)
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verify.case import Case
from verify.errors import BadArgument, HarnessError
from verify.layout import Layout
from verify.lens import IGNORED, check_fits, generate, local, not_contiguous
from verify.oracle.contract import Contract, TensorSpec
from verify.placement import Partial, Shard
from verify.rank_program import contract_of
from verify.reference import Reference
from verify.replica import RankMap

SHAPE = {"sequence": 3, "batch": 2, "in_features": 8, "out_features": 5}
LARGE = {"magnitude": 1024}
HALF = torch.full((3, 2, 8), 0.5)


def case_of(concept="fake_row", layout=None, **parts) -> Case:
    shape = SHAPE if concept == "fake_row" else {"sequence": 4, "batch": 2, "hidden": 3}
    return Case(concept=concept, layout=layout or Layout(tp=2, dp=2), **{"shape": shape, **parts})


def problem_of(case: Case, replica: str = ""):
    contract = contract_of(case)
    return generate(case, contract, RankMap(case.layout, contract.axes), replica)


def test_values_are_the_same_in_another_process():
    """The digest would change with any platform on which the values do."""
    problem = problem_of(case_of(seed=3))
    values = [problem.inputs["x"].full, problem.parameters["weight"].full]
    digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in values)).hexdigest()
    assert digest == ("3ad940f0d7b71c34810e9ef2fa341cf49d69412365b889b7991dc8d893d9128b")
    program = (
        "import sys; sys.path.insert(0, 'tests'); import test_lens as t;"
        "p = t.problem_of(t.case_of(seed=3)); print(float(p.inputs['x'].full.sum()))"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert float(told.stdout) == float(values[0].sum()), told.stderr


def test_name_seed_and_replica_change_the_values():
    first = problem_of(case_of())
    for other in (problem_of(case_of(seed=1)), problem_of(case_of(), "dp1")):
        assert not torch.equal(first.inputs["x"].full, other.inputs["x"].full)
        assert not torch.equal(first.parameters["weight"].full, other.parameters["weight"].full)
        assert not torch.equal(first.upstream["y"].full, other.upstream["y"].full)
    assert torch.equal(first.inputs["x"].full, problem_of(case_of()).inputs["x"].full)


def test_replicas_are_those_along_axes_the_contract_does_not_name():
    ranks = RankMap(Layout(tp=2, cp=2, dp=2), ("tp",))
    assert ranks.replicas == {"": (0, 1), "cp1": (2, 3), "dp1": (4, 5), "cp1-dp1": (6, 7)}
    assert RankMap(Layout(tp=2, dp=2), ("tp", "dp")).replicas == {"": (0, 1, 2, 3)}
    with pytest.raises(HarnessError, match="neither of one mesh"):
        _ = RankMap(Layout(tp=2), ("tp", "ep")).sizes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_native_values_are_representable(dtype):
    problem = problem_of(case_of(lens="native", dtype=dtype))
    for given_ in (*problem.inputs.values(), *problem.parameters.values()):
        assert torch.equal(given_.full.to(getattr(torch, dtype)).double(), given_.full)
        assert given_.full.any()


@given(
    st.sampled_from(["float64", "float32", "bfloat16", "float16"]),
    st.integers(1, 16),
    st.integers(0, 99),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_parts_sum_exactly_in_any_order_in_the_dtype(dtype, tp, seed, exact):
    lens = ("exact" if exact else "fp64") if dtype == "float64" else "native"
    case = case_of("fake_sum", Layout(tp=tp), lens=lens, dtype=dtype, seed=seed)
    contract = contract_of(case)
    ranks = RankMap(case.layout, contract.axes)
    given_ = problem_of(case).inputs["x"]
    placed = contract.inputs["x"].placements
    parts = [local(given_, placed, ranks, rank, case) for rank in range(tp)]
    for order in (range(tp), reversed(range(tp))):
        total = torch.zeros_like(parts[0])
        for rank in order:
            total += parts[rank]
        assert torch.equal(total.double(), given_.full)


def test_exact_values_are_small_integers_and_never_zero():
    problem = problem_of(case_of(lens="exact"))
    for given_ in (*problem.inputs.values(), *problem.parameters.values()):
        assert torch.equal(given_.full.round(), given_.full)
        assert 1 <= float(given_.full.abs().min()) <= float(given_.full.abs().max()) <= 9


def _huge(case: Case) -> Contract:
    return Contract(
        inputs={"x": TensorSpec((2,), {}, {})},
        parameters={},
        outputs={"y": TensorSpec((2,))},
        reference=lambda inputs, parameters: {"y": inputs["x"] * 2.0**50},
        linear=True,
    )


def test_the_exact_lens_checks_that_it_is_exact():
    case = case_of(lens="exact")
    contract = _huge(case)
    ranks = RankMap(case.layout, ("tp",))
    with pytest.raises(HarnessError, match="the exact lens needs every sum below"):
        _ = Reference(case, contract, generate(case, contract, ranks, "")).results


FALSE = {
    "thirds": lambda x: x / 3,
    "tenths": lambda x: x * 0.1,
    "a square root": lambda x: x.abs().sqrt(),
    "a mean": lambda x: x.mean(0).expand(x.shape),
    "only its gradient": lambda x: x + (x / 3 - (x / 3).detach()),
    "the last bit": lambda x: x * (1 + 2.0**-52),
}


def _of(function, **options):
    case = Case(concept="f", layout=Layout(), lens="exact", options=options)
    contract = Contract(
        inputs={"x": TensorSpec((3, 5))},
        parameters={},
        outputs={"y": TensorSpec((3, 5))},
        reference=lambda inputs, parameters: {"y": function(inputs["x"])},
        linear=True,
    )
    return Reference(case, contract, generate(case, contract, RankMap(case.layout, ("tp",)), ""))


@pytest.mark.parametrize("way", FALSE)
def test_a_contract_that_is_not_linear_is_told_by_its_results(way):
    with pytest.raises(HarnessError, match=r"no multiple of 1; of what its contract calls linear"):
        _ = _of(FALSE[way]).results


@pytest.mark.parametrize("magnitude", [1, 1024, 0.25, 2.0**-20])
def test_exact_results_are_multiples_of_the_magnitude(magnitude):
    found = _of(lambda x: x * 3 + x.sum(), magnitude=magnitude).results
    assert torch.equal(found["y"] / magnitude % 1, torch.zeros(3, 5, dtype=torch.float64))
    if magnitude < 1:
        with pytest.raises(HarnessError, match="no multiple of"):
            _ = _of(lambda x: x / 3, magnitude=magnitude).results
        with pytest.raises(HarnessError, match="needs every sum below"):
            _ = _of(lambda x: x + x.detach() * 2.0**50, magnitude=magnitude).results


@pytest.mark.parametrize("shape", [(3, 2, 4), (5,), (1, 1, 6), (4, 1)])
def test_strides(shape):
    values = torch.rand(shape)
    moved = not_contiguous(values)
    assert torch.equal(moved, values)
    assert not moved.is_contiguous()


def test_transposed_inputs_and_upstream_gradients_are_not_contiguous():
    case = case_of(options={"strides": "transposed"})
    contract = contract_of(case)
    ranks, problem = RankMap(case.layout, contract.axes), problem_of(case)
    for given_ in (problem.inputs["x"], problem.upstream["y"]):
        plain = local(given_, {}, ranks, 0, case_of())
        moved = local(given_, {}, ranks, 0, case)
        assert torch.equal(plain, moved)
        assert plain.is_contiguous()
        assert not moved.is_contiguous()


def test_a_rank_may_write_to_what_it_is_given():
    case = case_of()
    contract = contract_of(case)
    ranks = RankMap(case.layout, contract.axes)
    before = problem_of(case).inputs["x"].full.clone()
    local(problem_of(case).inputs["x"], {}, ranks, 0, case).fill_(7.0)
    assert torch.equal(problem_of(case).inputs["x"].full, before)


def test_zeros():
    problem = problem_of(case_of(options={"zeros": "weight, grad y"}))
    assert not problem.parameters["weight"].full.any()
    assert not problem.upstream["y"].full.any()
    assert problem.inputs["x"].full.all()
    with pytest.raises(BadArgument, match="zeros: wait: not one of x, weight, bias, grad y"):
        problem_of(case_of(options={"zeros": "wait"}))


@pytest.mark.parametrize("lens", ["exact", "fp64", "native"])
@pytest.mark.parametrize("concept", ["fake_row", "fake_sum"])
def test_magnitude_multiplies_inputs_and_nothing_else(concept, lens):
    """By a power of two, so that parts of a sum still add up exactly."""
    plain, large = (problem_of(case_of(concept, lens=lens, options=o)) for o in ({}, LARGE))
    before, after = plain.inputs["x"], large.inputs["x"]
    assert torch.equal(after.full, before.full * 1024)
    assert (after.parts is None) == (before.parts is None) == (concept == "fake_row")
    if after.parts is not None:
        assert torch.equal(after.parts, before.parts * 1024)
        assert torch.equal(after.parts.sum(0), after.full)
    for name, weight in plain.parameters.items():
        assert torch.equal(large.parameters[name].full, weight.full)
    for name, upstream in plain.upstream.items():
        assert torch.equal(large.upstream[name].full, upstream.full)


def test_magnitude_leaves_integers_alone_and_is_a_power_of_two():
    case = case_of(options=LARGE)
    drawn = generate(case, _targets(case), RankMap(case.layout, ("tp",)), "").inputs["targets"].full
    assert bool((drawn < 4).all())
    for wrong in (0, 3, -2, 0.3, "large"):
        with pytest.raises(BadArgument, match=r"magnitude: .* is not a power of two like 1024"):
            problem_of(case_of(options={"magnitude": wrong}))


def _targets(case: Case) -> Contract:
    return Contract(
        inputs={"targets": TensorSpec((6,), grad_placements=None, high=4)},
        parameters={},
        outputs={},
        reference=lambda inputs, parameters: {},
    )


def test_ignored_targets_are_none_some_or_all():
    seen = set()
    for seed in range(60):
        case = case_of(options={"ignored": True}, seed=seed)
        ranks = RankMap(case.layout, ("tp",))
        drawn = generate(case, _targets(case), ranks, "").inputs["targets"].full
        assert bool(((drawn == IGNORED) | ((drawn >= 0) & (drawn < 4))).all())
        seen.add(int((drawn == IGNORED).sum()))
    assert {0, 6} < seen


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"lens": "fp64", "dtype": "float32"}, "computes in float64, not in float32"),
        ({"options": {"strides": "odd"}}, "'odd' is not one of contiguous, transposed"),
    ],
)
def test_bad_cases_are_refused_in_one_line(parts, message):
    with pytest.raises(BadArgument, match=message) as caught:
        problem_of(case_of(**parts))
    assert "\n" not in str(caught.value)


def test_a_tensor_that_does_not_divide_is_a_bad_case():
    case = case_of(shape={**SHAPE, "in_features": 7})
    contract = contract_of(case)
    with pytest.raises(
        BadArgument, match=r"x of fake_row .* a dimension of 7 does not divide by 2"
    ):
        check_fits(case, contract, RankMap(case.layout, contract.axes))


def test_two_partial_axes_have_a_part_for_each_pair():
    ranks = RankMap(Layout(tp=2, cp=3), ("tp", "cp"))
    placed = {"tp": Partial(), "cp": Partial()}
    assert ranks.parts(placed) == 6
    assert sorted(ranks.part(placed, rank) for rank in range(6)) == list(range(6))
    assert ranks.summed(placed, range(6)) == [(0, 1, 2, 3, 4, 5)]
    assert ranks.summed({"tp": Partial()}, range(6)) == [(0, 1), (2, 3), (4, 5)]
    assert ranks.alike({"tp": Shard(0)}, range(6)) == [(0, 2, 4), (1, 3, 5)]


def test_a_contract_settles_inputs_of_which_a_decision_would_be_in_doubt():
    case = case_of()
    contract = dataclasses.replace(contract_of(case), settle=lambda given, _: {**given, "x": HALF})
    ranks = RankMap(case.layout, contract.axes)
    assert generate(case, contract, ranks, "").inputs["x"].full is HALF
    narrow = case_of(lens="native", dtype="bfloat16")
    third = dataclasses.replace(contract, settle=lambda given, _: {**given, "x": HALF / 3})
    with pytest.raises(HarnessError, match=r"x of .* settled to what is no bfloat16"):
        generate(narrow, third, ranks, "")


def test_a_size_may_be_divided_by_some_axes_only():
    case = case_of()
    contract = dataclasses.replace(contract_of(case), divided={"batch": 3}, over={"batch": ("tp",)})
    with pytest.raises(BadArgument, match=r"batch: 3 of .* does not divide by 2 over tp"):
        check_fits(case, contract, RankMap(case.layout, contract.axes))
    check_fits(
        case,
        dataclasses.replace(contract, over={"batch": ("pp",)}),
        RankMap(case.layout, contract.axes),
    )
