"""The contracts against independent torch, and what they refuse."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F

from verify.case import Case
from verify.errors import BadArgument
from verify.layout import Layout
from verify.lens import check_fits, generate
from verify.oracle import CONTRACTS
from verify.oracle.contract import IGNORED
from verify.rank_program import contract_of
from verify.reference import Reference
from verify.replica import RankMap
from verify.strategies.cases import MAPPINGS, SHAPES, cases

ROUNDOFF = torch.finfo(torch.float64).eps
LINEAR = {"sequence": 3, "batch": 2, "in_features": 4, "out_features": 5}
LOGITS = {"sequence": 4, "batch": 3, "vocabulary": 6}
TOKENS = {"sequence": 4, "batch": 3, "vocabulary": 6, "hidden": 2}
MLP = {"sequence": 3, "batch": 2, "hidden": 4, "ffn": 6}
FULL = {"sequence": 2, "batch": 3, "hidden": 4}
SP = Layout(sequence_parallel=True)


def case_of(concept, shape, *, layout=None, lens="fp64", dtype="float64", **options) -> Case:
    return Case(
        concept=concept,
        layout=layout or Layout(),
        shape=shape,
        options=options,
        lens=lens,
        dtype=dtype,
    )


def reference_of(case: Case) -> Reference:
    contract = contract_of(case)
    ranks = RankMap(case.layout, contract.axes)
    check_fits(case, contract, ranks)
    return Reference(case, contract, generate(case, contract, ranks, ""))


def given_to(case: Case) -> dict[str, torch.Tensor]:
    """Everything that the case's reference is given, as leaves of its own."""
    problem = reference_of(case).problem
    found = {name: each.full for name, each in (*problem.inputs.items(),)}
    found |= {name: each.full for name, each in problem.parameters.items()}
    leaves = {
        name: value.clone().requires_grad_(value.is_floating_point())
        for name, value in found.items()
    }
    return leaves | {f"grad {name}": each.full for name, each in problem.upstream.items()}


def assert_same(case: Case, output: str, wanted: torch.Tensor, tensors: dict) -> None:
    """`wanted`, and its gradients under the case's upstream gradient, are the reference's."""
    results = reference_of(case).results
    names = [name for name, tensor in tensors.items() if tensor.requires_grad]
    leaves = [tensors[name] for name in names]
    gradients = torch.autograd.grad(wanted, leaves, tensors[f"grad {output}"])
    expected = {output: wanted, **{f"grad {n}": g for n, g in zip(names, gradients, strict=True)}}
    assert set(expected) == set(results)
    for name, value in expected.items():
        off = float((results[name] - value).detach().norm())
        assert off <= 1e3 * ROUNDOFF * max(float(value.detach().norm()), 1.0), name


@pytest.mark.parametrize("concept", ["column_linear", "row_linear"])
@pytest.mark.parametrize("layout", [Layout(), SP])
def test_a_linear_layer_is_torchs(concept, layout):
    case = case_of(concept, LINEAR, layout=layout)
    tensors = given_to(case)
    module = torch.nn.Linear(4, 5, dtype=torch.float64)
    y = torch.func.functional_call(
        module, {n: tensors[n] for n in ("weight", "bias")}, (tensors["x"],)
    )
    assert_same(case, "y", y, tensors)


@pytest.mark.parametrize("concept", ["column_linear", "row_linear"])
def test_a_returned_bias_is_added_by_the_caller(concept):
    returned = reference_of(case_of(concept, LINEAR, skip_bias_add=True)).results
    added = reference_of(case_of(concept, LINEAR)).results
    without = reference_of(case_of(concept, LINEAR, bias=False)).results
    assert torch.equal(returned["y"], without["y"])
    off = float((returned["y"] + returned["bias"] - added["y"]).norm())
    assert off <= 1e3 * ROUNDOFF * float(added["y"].norm())
    case = case_of(concept, LINEAR, skip_bias_add=True)
    assert torch.equal(returned["grad bias"], given_to(case)["grad bias"])


def test_a_frozen_weight_has_no_gradient():
    results = reference_of(case_of("column_linear", LINEAR, frozen_weight=True)).results
    assert set(results) == {"y", "grad x", "grad bias"}


@pytest.mark.parametrize("scatter", [False, True])
def test_an_embedding_is_torchs(scatter):
    case = case_of("vocab_embedding", TOKENS, layout=SP, **({"scatter": True} if scatter else {}))
    tensors = given_to(case)
    module = torch.nn.Embedding(6, 2, dtype=torch.float64)
    y = torch.func.functional_call(module, {"weight": tensors["weight"]}, (tensors["tokens"],))
    assert_same(case, "y", y.permute(1, 0, 2) if scatter else y, tensors)


def test_the_perceptron_is_torchs():
    case = case_of("tp_mlp", MLP)
    tensors = given_to(case)
    fc1 = tensors["x"] @ tensors["fc1.weight"].T + tensors["fc1.bias"]
    gelu = 0.5 * fc1 * (1 + torch.erf(fc1 / 2**0.5))
    y = gelu @ tensors["fc2.weight"].T + tensors["fc2.bias"]
    assert_same(case, "y", y, tensors)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("real", [6, 4, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("magnitude", [1, 16])
def test_cross_entropy_is_torchs(smoothing, ignored, real, masked, magnitude):
    """Torch's smoothing gives the target a share of it too; a K / (K - 1) makes up for that."""
    case = case_of(
        "vocab_cross_entropy",
        {**LOGITS, "real_vocabulary": real},
        label_smoothing=smoothing,
        ignored=ignored,
        mask_padding=masked,
        magnitude=magnitude,
    )
    tensors = given_to(case)
    classes = real if masked else LOGITS["vocabulary"]
    loss = F.cross_entropy(
        tensors["logits"][..., :classes].flatten(0, 1),
        tensors["targets"].flatten(),
        label_smoothing=smoothing * classes / (classes - 1),
        ignore_index=IGNORED,
        reduction="none",
    )
    assert int(tensors["targets"].max()) < real
    assert_same(case, "loss", loss.unflatten(0, (4, 3)), tensors)


def test_smoothing_is_a_distribution_over_the_classes():
    """By the sum that defines it: 1 - a for the target, a / (K - 1) for each other class."""
    case = case_of("vocab_cross_entropy", LOGITS, label_smoothing=0.3)
    tensors = given_to(case)
    weights = torch.full((4, 3, 6), 0.3 / 5, dtype=torch.float64)
    weights.scatter_(-1, tensors["targets"].unsqueeze(-1), 0.7)
    loss = -(weights * torch.log_softmax(tensors["logits"], -1)).sum(-1)
    assert_same(case, "loss", loss, tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_loss_of_low_precision_logits_is_float32(dtype):
    case = case_of("vocab_cross_entropy", LOGITS, lens="native", dtype=dtype)
    dtypes = reference_of(case).dtypes
    assert dtypes["loss"] is torch.float32
    assert dtypes["grad logits"] is getattr(torch, dtype)


def test_padding_and_ignored_targets_get_no_gradient():
    shape = {**LOGITS, "real_vocabulary": 4}
    seen = 0
    for seed in range(12):
        case = case_of(
            "vocab_cross_entropy", shape, mask_padding=True, ignored=True, label_smoothing=0.1
        )
        case = dataclasses.replace(case, seed=seed)
        reference = reference_of(case)
        gradient = reference.results["grad logits"]
        ignored = reference.problem.inputs["targets"].full == IGNORED
        assert not gradient[..., 4:].any()
        assert not gradient[ignored].any()
        assert not reference.results["loss"][ignored].any()
        seen += int(ignored.sum())
    assert seen


@pytest.mark.parametrize("concept", MAPPINGS)
def test_a_mapping_is_the_identity(concept):
    case = case_of(concept, FULL)
    reference = reference_of(case)
    assert torch.equal(reference.results["y"], reference.problem.inputs["x"].full)
    assert torch.equal(reference.results["grad x"], reference.problem.upstream["y"].full)


@given(case=cases(*SHAPES, lenses=("fp64",)))
@settings(max_examples=60, deadline=None)
def test_gradients_are_those_of_finite_differences(case: Case) -> None:
    contract = contract_of(case)
    generated = generate(case, contract, RankMap(case.layout, contract.axes), "")
    fixed = {n: g.full for n, g in generated.inputs.items() if not g.full.is_floating_point()}
    moved = {n: g.full for n, g in generated.inputs.items() if n not in fixed}
    moved |= {n: g.full for n, g in generated.parameters.items()}
    # Large logits make a softmax whose differences are below any step.
    names = list(moved)
    leaves = [moved[n].clamp(-4, 4).requires_grad_() for n in names]

    def compute(*values: torch.Tensor) -> torch.Tensor:
        tensors = dict(zip(names, values, strict=True)) | fixed
        outputs = contract.reference(
            {n: tensors[n] for n in contract.inputs}, {n: tensors[n] for n in contract.parameters}
        )
        return torch.cat([output.flatten() for output in outputs.values()])

    assert torch.autograd.gradcheck(compute, leaves, fast_mode=True)


def test_every_concept_that_is_drawn_has_a_contract():
    assert set(SHAPES) <= set(CONTRACTS)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (case_of("column_linear", {**LINEAR, "hidden": 3}), "unknown hidden"),
        (case_of("row_linear", {"sequence": 3}), "missing batch, in_features, out_features"),
        (case_of("tp_mlp", {**MLP, "ffn": 0}), "case.shape.ffn: 0 is no size"),
        (case_of("copy_to_tp", FULL, bias=True), "copy_to_tp has no option bias"),
        (case_of("gather_from_sp", FULL, tensor_parallel_output_grad=1), "not one of True, False"),
        (case_of("tp_mlp", MLP, activation="relu"), "'relu' is not one of gelu, squared_relu"),
        (case_of("column_linear", LINEAR, layout=SP, gather_output=True), "gather_output: True"),
        (case_of("row_linear", LINEAR, layout=SP, input_is_parallel=False), "input_is_parallel"),
        (case_of("vocab_embedding", TOKENS, scatter=True), "scatter: True on 1 rank: it needs"),
        (case_of("vocab_cross_entropy", LOGITS, label_smoothing=1.0), "1.0 is not in [0, 1)"),
        (case_of("vocab_cross_entropy", LOGITS, label_smoothing="a"), "'a' is not in [0, 1)"),
        (
            case_of("vocab_cross_entropy", {**LOGITS, "vocabulary": 1}, label_smoothing=0.1),
            "needs another class",
        ),
        (
            case_of("vocab_cross_entropy", {**LOGITS, "real_vocabulary": 7}),
            "real_vocabulary: 7 exceeds vocabulary=6",
        ),
    ],
)
def test_what_is_no_case_is_refused_in_one_line(case, message):
    with pytest.raises(BadArgument) as caught:
        contract_of(case)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("concept", "shape", "name"),
    [
        ("column_linear", {**LINEAR, "out_features": 5}, "y"),
        ("row_linear", {**LINEAR, "in_features": 5}, "x"),
        ("vocab_embedding", {**TOKENS, "vocabulary": 5}, "vocabulary: 5"),
        ("vocab_cross_entropy", {**LOGITS, "vocabulary": 5}, "logits"),
        ("tp_mlp", {**MLP, "ffn": 5}, "ffn: 5"),
    ],
)
def test_a_size_that_does_not_divide_is_no_case(concept, shape, name):
    case = case_of(concept, shape, layout=Layout(tp=2))
    contract = contract_of(case)
    with pytest.raises(BadArgument, match=f"{name} .*does not divide by 2"):
        check_fits(case, contract, RankMap(case.layout, contract.axes))
