"""Disturbed runs of a reference: what they move, what they leave alone, and what they show."""

from dataclasses import replace

import pytest
import torch
from observed import Scene
from test_mutants import CASES
from torch.nn.functional import layer_norm
from torch.utils._python_dispatch import TorchDispatchMode

from verify.case import Case, Lens
from verify.disturbance import ARITHMETIC, Disturbing, moved, of_output
from verify.errors import BadArgument, BeyondRange
from verify.layout import Layout
from verify.lens import generate
from verify.oracle.contract import Contract, TensorSpec
from verify.oracle.norm import normalised
from verify.oracle.positions import rotated
from verify.placement import Partial
from verify.rank_program import contract_of
from verify.reference import Reference
from verify.replica import RankMap
from verify.tolerance import EFFORTS, Tolerance

# Operators of references that only move elements, make them, decide between them, or write them in
# another dtype, which rounds at most once.
_EXACT = """
    _conj _local_scalar_dense _to_copy _unsafe_view abs alias amax amin any arange argmax argsort
    as_strided bitwise_and bitwise_and_ bitwise_not bitwise_or cat clamp clamp_min clone
    constant_pad_nd copy_ detach diagonal diagonal_backward embedding empty_like eq expand fill_
    flip full full_like gather ge gt index index_select isfinite le lift_fresh lt masked_fill max
    maximum min minimum narrow ne neg new_empty new_empty_strided new_zeros ones ones_like permute
    polar promote_types randint repeat repeat_interleave roll scalar_tensor scatter select
    select_backward sign slice slice_backward sort split split_with_sizes squeeze stack t topk
    transpose unbind unsqueeze unsqueeze_ view view_as_complex view_as_real where zero_ zeros
    zeros_like
"""
EXACT = frozenset(_EXACT.split())


def drawn(generator_seed=0):
    return torch.Generator().manual_seed(generator_seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_moved_is_the_next_number_or_the_one_after(dtype):
    values = torch.randn(1000, generator=drawn(1), dtype=torch.float64).to(dtype)
    values[:3] = torch.tensor([0.0, torch.inf, -torch.inf])
    found = moved(values, drawn())
    eps = torch.finfo(dtype).eps
    assert found.dtype is dtype
    assert torch.equal(found[:3], values[:3])
    off = (found.double() / values.double() - 1)[3:]
    assert float(off.abs().max()) <= eps
    for direction in (off > 0, off < 0):
        assert 0.4 < float(direction.double().mean()) < 0.6


def test_only_arithmetic_is_disturbed_and_what_is_written_to_is_not():
    x = torch.randn(50, generator=drawn(1))
    with Disturbing(drawn()):
        kept, ordered, least = x.view(5, 10).t(), x.sort().values, x > 0
        product = x * 1.0
        written = x.clone()
        written += torch.zeros(50)
    assert torch.equal(kept, x.view(5, 10).t())
    assert torch.equal(ordered, x.sort().values)
    assert torch.equal(least, x > 0)
    assert torch.equal(written, x)
    assert not torch.equal(product, x)
    assert torch.allclose(product, x, rtol=torch.finfo().eps, atol=0.0)


def test_backward_is_disturbed_and_complex_numbers_too():
    x = torch.randn(50, generator=drawn(1)).requires_grad_()
    with Disturbing(drawn()):
        (x * 2.0).sum().backward()
    assert not torch.equal(x.grad, torch.full((50,), 2.0))
    turned = torch.view_as_complex(torch.randn(9, 2, generator=drawn(2)))
    with Disturbing(drawn()):
        assert not torch.equal(turned * 1.0, turned)


def spread_of(compute, draws=64):
    """How far apart the elements of disturbed results are, at most."""
    found = []
    for draw in range(draws):
        with Disturbing(drawn(draw)):
            found.append(compute())
    return float((torch.stack(found).double().amax(0) - torch.stack(found).double().amin(0)).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wide_contraction_that_is_narrowed_is_moved_as_its_parts_are_rounded(dtype):
    terms = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.25]).outer(torch.ones(3))
    roundoff = torch.finfo(dtype).eps / 2
    contracted = {
        "sum": lambda: terms.sum(0),
        "sum, viewed": lambda: terms.sum(0, keepdim=True).view(3),
        "matmul": lambda: torch.ones(1, 5) @ terms,
        "matmul, transposed": lambda: (torch.ones(1, 5) @ terms).t(),
    }
    for name, compute in contracted.items():
        narrowed = spread_of(lambda compute=compute: compute().to(dtype))
        assert 2 * roundoff <= narrowed <= 20 * roundoff, name
        assert spread_of(compute) <= 20 * torch.finfo().eps, name
        assert spread_of(lambda compute=compute: compute().double()) <= 20 * torch.finfo().eps, name


def test_what_is_no_longer_the_contraction_is_not_contracted_again():
    terms = torch.tensor([1.0, -1.0, 0.25])

    def written(change):
        matrix, total = terms.repeat(2, 1), torch.empty(2)
        torch.sum(matrix, 1, out=total)
        change(matrix, total)
        return total.to(torch.bfloat16)

    changes = {
        "arithmetic": lambda matrix, total: total.mul_(2.0),
        "other": lambda matrix, total: total.masked_fill_(torch.tensor([True, False]), 3.0),
        "a part": lambda matrix, total: total[1:].zero_(),
        "out": lambda matrix, total: torch.add(total, total, out=total),
        "operands": lambda matrix, total: matrix.zero_(),
    }
    for name, change in changes.items():
        assert spread_of(lambda change=change: written(change)) == 0.0, name
    counted = torch.tensor([True, True, False])
    assert spread_of(lambda: counted.sum().to(torch.bfloat16)) == 0.0
    assert spread_of(lambda: torch.empty(3, 0).sum(1).to(torch.bfloat16)) == 0.0
    assert spread_of(lambda: (terms.sum(0) * 2.0).to(torch.bfloat16)) == 0.0


def test_the_operators_of_all_references_are_known_and_can_be_disturbed():
    """An operator that rounds and is not among them would leave a bound too small."""
    seen = set()

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function.overloadpacket.__name__.removeprefix("_record"))
            return function(*args, **(kwargs or {}))

    for check, case in CASES:
        if check != "equivalence":
            continue
        try:
            contract = contract_of(case)
        except BadArgument:
            continue
        ranks = RankMap(case.layout, contract.axes)
        problem = generate(case, contract, ranks, next(iter(ranks.replicas)))
        masks = {n: torch.ones(spec.shape, dtype=torch.bool) for n, spec in contract.masks.items()}
        reference = Reference(case, contract, problem.with_masks(masks))
        with Noting():
            plain = reference.evaluate(torch.float32)
        disturbed = reference.rounded(torch.float32, 1)
        assert {n: each.shape for n, each in disturbed.items()} == {
            n: each.shape for n, each in plain.items()
        }
    assert seen & ARITHMETIC
    unknown = {name for name in seen if not name.startswith("_function")} - ARITHMETIC - EXACT
    assert not unknown, sorted(unknown)
    assert not ARITHMETIC & EXACT


def test_what_is_given_is_exact_but_for_what_ranks_have_in_parts():
    case = Case(concept="given", layout=Layout(tp=3), lens="native", dtype="bfloat16")
    contract = Contract(
        inputs={"x": TensorSpec((40,)), "parts": TensorSpec((40,), {"tp": Partial()}, {})},
        parameters={},
        outputs={"x": TensorSpec((40,)), "parts": TensorSpec((40,))},
        reference=lambda i, p: {name: each.clone() for name, each in i.items()},
    )
    reference = Scene(case, contract, {}).references[""]
    found = reference.rounded(torch.bfloat16, 1)
    assert torch.equal(found["x"].double(), reference.results["x"])
    given = reference.problem.inputs["parts"]
    off = (found["parts"].double() - given.full).abs()
    allowed = torch.finfo(torch.bfloat16).eps * given.magnitude
    assert bool((off <= allowed).all())
    assert bool((off > torch.finfo(torch.bfloat16).eps * given.full.abs()).any())


def test_a_bound_is_of_the_results_own_precision():
    """What is float32 of a bfloat16 case may not be rounded to bfloat16."""
    case = Case(concept="wide", layout=Layout(), lens="native", dtype="bfloat16")
    contract = Contract(
        inputs={"x": TensorSpec((6, 8))},
        parameters={},
        outputs={"wide": TensorSpec((6, 8), {}, None), "narrow": TensorSpec((6, 8))},
        reference=lambda i, p: {"wide": i["x"].float() / 3, "narrow": i["x"] / 3},
    )
    reference = Scene(case, contract, {}).references[""]
    expected = reference.results["wide"]
    rounded = (expected * (1 + torch.finfo(torch.bfloat16).eps / 2)).clone()
    said = {
        name: Tolerance(reference).excess(name, rounded, expected, lambda full: full)
        for name in ("wide", "narrow")
    }
    assert said["narrow"] is None
    assert said["wide"] is not None


def _sharp(seed: int) -> Reference:
    """A softmax of which one share is nearly one; its gradient is what is left of large terms."""
    case = Case(concept="sharp", layout=Layout(), lens="native", dtype="float32", seed=seed)
    contract = Contract(
        inputs={"x": TensorSpec((1, 2, 4))},
        parameters={"weight": (3, 4)},
        outputs={"y": TensorSpec((1, 2, 3))},
        reference=lambda i, p: {"y": torch.softmax(8 * i["x"] @ p["weight"].t(), -1)},
    )
    return Scene(case, contract, {"weight": {}}).references[""]


def test_what_is_left_of_a_sharp_softmax_may_be_rounded_as_its_terms_are():
    """Its gradient as torch does not compute it, by differences of products; but not of products
    that are rounded to bfloat16."""
    for seed in range(25):
        reference = _sharp(seed)
        given = reference.problem
        x, weight, upstream = (
            each.full.float()
            for each in (given.inputs["x"], given.parameters["weight"], given.upstream["y"])
        )
        shares = torch.softmax(8 * x @ weight.t(), -1)
        found = []
        for share in (shares / shares.sum(-1, keepdim=True), shares.bfloat16().float()):
            terms = share * upstream
            logits = terms - share * terms.sum(-1, keepdim=True)
            found.append(8 * torch.einsum("sbe,sbh->eh", logits, x).double())
        expected = reference.results["grad weight"]
        tolerance = Tolerance(reference)
        said = [tolerance.excess("grad weight", x, expected, lambda full: full) for x in found]
        assert said[0] is None
        assert said[1] is not None


def test_errors_of_an_output_reach_scores_that_get_no_gradient():
    """Of one key the share is one, and its gradient minus the sum of all is exactly zero."""
    values, upstream = (torch.randn(3, 50, generator=drawn(i), dtype=torch.float64) for i in (1, 2))

    def gradient(dtype):
        scores = torch.zeros(3, 1, dtype=dtype, requires_grad=True)
        shares = scores.softmax(-1)
        out = of_output(shares * values.to(dtype), scores, shares)
        (found,) = torch.autograd.grad(out, scores, upstream.to(dtype))
        return found.double().flatten()

    assert not gradient(torch.float64).any()
    for dtype in (torch.float32, torch.float16):
        with Disturbing(drawn()):
            found = torch.stack([gradient(dtype) for _ in range(200)])
        wanted = (values * upstream).norm(dim=1) * torch.finfo(dtype).eps / 2
        ratios = found.std(0) / wanted
        assert 0.8 < float(ratios.min()) <= float(ratios.max()) < 2


def _far_from_zero(seed: int) -> Reference:
    """A layer norm of two features that lie close to each other, near six."""
    case = Case(concept="far", layout=Layout(), lens="native", dtype="float32", seed=seed)
    contract = Contract(
        inputs={"x": TensorSpec((2, 8, 2))},
        parameters={"weight": (2,), "bias": (2,)},
        outputs={"y": TensorSpec((2, 8, 2))},
        reference=lambda i, p: {
            "y": normalised(6.0 + i["x"] / 32, p, "", kind="layer", zero_centered=False)
        },
    )
    return Scene(case, contract, {"weight": {}, "bias": {}}).references[""]


def test_torchs_own_layer_norm_is_right_where_the_mean_is_large():
    """And one in whose gradient the mean's is left out is not."""
    for seed in range(12):
        reference = _far_from_zero(seed)
        given = reference.problem
        x = (6.0 + given.inputs["x"].full.float() / 32).requires_grad_()
        weight, bias = (given.parameters[name].full.float() for name in ("weight", "bias"))
        upstream = given.upstream["y"].full.float()
        layer_norm(x, (2,), weight, bias, 1e-5).backward(upstream)
        assert x.grad is not None
        spread = x.detach().std(-1, correction=0, keepdim=True).square().add(1e-5).sqrt()
        found = (x.grad / 32, (x.grad + (upstream * weight).mean(-1, keepdim=True) / spread) / 32)
        expected, tolerance = reference.results["grad x"], Tolerance(reference)
        said = [tolerance.excess("grad x", y.double(), expected, lambda full: full) for y in found]
        assert said[0] is None
        assert said[1] is not None


@pytest.mark.parametrize(
    ("concept", "groups", "size", "options"),
    [
        ("core_attention", "groups", "head_size", {}),
        ("context_attention", "kv_heads", "head_dim", {"placement": "contiguous"}),
    ],
)
def test_attention_of_one_key_that_takes_gradients_from_its_output_is_right(
    concept, groups, size, options
):
    """In float16, by appendix B.4 of arXiv:2205.14135: the gradient of a score is what rounding
    leaves of that of the share, minus output times its gradient."""
    case = Case(
        concept=concept,
        layout=Layout(),
        shape={"sequence": 1, "batch": 4, "heads": 2, groups: 2, size: 8},
        options=options,
        lens="native",
        dtype="float16",
    )
    contract = contract_of(case)
    reference = Scene(case, contract, {}).references[""]
    k, v = (reference.problem.inputs[name].full.half() for name in "kv")
    (upstream,) = (each.full.half() for each in reference.problem.upstream.values())
    assert not reference.results["grad q"].any()

    def found(delta):
        scores = (upstream * v).sum(-1).float() - delta
        return (scores.unsqueeze(-1) * k.float() * 8**-0.5).half().double()

    # Half a unit roundoff of each element, all to one side; and one element in eight left out.
    errors = (upstream.double() * v.double()).abs().sum(-1).float() * 2.0**-12
    kept = (upstream * v).float()
    kept[..., 0] = 0
    for delta, right in (((upstream * v).float().sum(-1) + errors, True), (kept.sum(-1), False)):
        excess = Tolerance(reference).excess(
            "grad q", found(delta), reference.results["grad q"], lambda full: full
        )
        assert (excess is None) is right


def test_a_reference_that_overflows_in_the_dtype_of_a_case_is_beyond_its_range():
    contract = Contract(
        inputs={"x": TensorSpec((1, 2, 8))},
        parameters={},
        outputs={"y": TensorSpec((1, 2, 8)), "z": TensorSpec((1, 2, 8), {}, None)},
        reference=lambda inputs, parameters: {
            "y": inputs["x"] * 2.0**15 * 2.0**15,
            "z": inputs["x"].detach() + 1.0,
        },
    )
    case = Case(concept="large", layout=Layout(), lens="native", dtype="bfloat16")
    assert Scene(case, contract, {}).compare().elements == 48
    scene = Scene(replace(case, dtype="float16"), contract, {})
    with pytest.raises(BeyondRange, match="reference: y, grad x overflows"):
        scene.compare()
    wrong = scene.spoil("z", lambda z, rank: z + 1).compare()
    assert [each.tensor for each in wrong.divergences] == ["z"]


def test_a_gradient_that_begins_at_an_odd_element_is_turned():
    """As parts of larger tensors do, which are contiguous where it is the last that is cut."""
    x = torch.randn(3, 1, 1, 4, generator=drawn()).requires_grad_()
    upstream = torch.randn(13, generator=drawn(1))[1:].view(3, 1, 1, 4)
    for interleaved in (True, False):
        given = {"dim": None, "base": 10.0, "interleaved": interleaved}
        y = rotated(x, torch.arange(3), **given)
        (turned_back,) = torch.autograd.grad(y, x, upstream)
        assert torch.allclose(turned_back, rotated(upstream, -torch.arange(3), **given))


def _cut_off(seed: int, lens: Lens, dtype: str, margin: float) -> Reference:
    """A sum that is cut off a little below zero, where its rounding errors may take it above."""
    case = Case(concept="cut", layout=Layout(), lens=lens, dtype=dtype, seed=seed)

    def reference(inputs, parameters):
        x, weight = inputs["x"], parameters["weight"]
        above = (x.double() @ weight.double().t()).detach() + margin
        cut = torch.relu(x @ weight.t() - above.to(x.dtype)).square()
        return {"y": cut, "shown": x.detach().clone()}

    contract = Contract(
        inputs={"x": TensorSpec((1, 1, 16))},
        parameters={"weight": (1, 16)},
        outputs={"y": TensorSpec((1, 1, 1)), "shown": TensorSpec((1, 1, 16), {}, None)},
        reference=reference,
    )
    return Scene(case, contract, {"weight": {}}).references[""]


@pytest.mark.parametrize(
    ("lens", "dtype", "measured", "margin"),
    [("native", "bfloat16", torch.bfloat16, 0.02), ("fp64", "float64", torch.float32, 3e-7)],
)
def test_what_is_zero_in_some_runs_is_judged_by_many(lens, dtype, measured, margin):
    """A gradient that is exactly zero in the reference and in the first runs, but not in all."""
    late, shrink = 0, torch.finfo(getattr(torch, dtype)).eps / torch.finfo(measured).eps
    for seed in range(40):
        reference = _cut_off(seed, lens, dtype, margin)
        expected = reference.results["grad weight"]
        runs = [reference.rounded(measured, n)["grad weight"] for n in range(EFFORTS[-1] + 1)]
        seen = [bool(each.any()) for each in runs]
        if expected.any() or any(seen[: EFFORTS[-2] + 1]) or not any(seen):
            continue
        late += 1
        found = runs[seen.index(True)].double() * shrink
        candidates = (found, 1e5 * found)
        said = [
            Tolerance(reference).excess("grad weight", each, expected, lambda full: full)
            for each in candidates
        ]
        assert said[0] is None
        assert said[1] is not None
    assert late > 2
