"""Mixture of experts: inputs without doubt, what is drawn, and what properties do not see."""

import dataclasses
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings

from impl.moe.balance import ExpertBias, attach_loss
from impl.moe.permutation import by_expert
from impl.moe.router import Choice
from verify.case import Case
from verify.cluster import open_cluster
from verify.disturbance import Disturbing, moved
from verify.errors import BadArgument
from verify.layout import Layout
from verify.lens import check_fits, generate
from verify.oracle.gpt.routers import Routers
from verify.oracle.gpt.routers import settled as tokens_without_doubt
from verify.oracle.moe.doubt import settled
from verify.oracle.moe.routing import logits_of, route
from verify.oracle.moe.rules import rules
from verify.rank_program import contract_of
from verify.reference import Reference
from verify.replica import RankMap
from verify.strategies.moe import CONTIGUOUS, OPTIONS, moe_cases

SHAPE = {"sequence": 6, "batch": 4, "hidden": 5, "experts": 8, "top_k": 2}
ROUTINGS = (
    {},
    {"pre_softmax": True, "balance": "sequence"},
    {"score": "sigmoid", "expert_bias": True, "balance": "global"},
    {"capacity": 0.5},
    {"score": "sigmoid", "capacity": 1.0},
)
DRAWN = settings(
    max_examples=300,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def router(dtype: str = "bfloat16", groups: int = 1, **options) -> Case:
    shape = {**SHAPE, "groups": groups, "group_top_k": 1} if groups > 1 else SHAPE
    layout = Layout(dp=2, cp=2)
    lens = "fp64" if dtype == "float64" else "native"
    return Case(
        concept="moe_router", layout=layout, shape=shape, options=options, lens=lens, dtype=dtype
    )


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("options", ROUTINGS, ids=str)
def test_disturbed_runs_of_settled_inputs_decide_alike(options, dtype):
    """Of the inputs as drawn they do not: the first seeds show it."""
    flips = 0
    for seed in range(4):
        case = dataclasses.replace(router(dtype, **options), seed=seed)
        contract = contract_of(case)
        ranks = RankMap(case.layout, contract.axes)
        lower = torch.float32 if dtype == "float64" else getattr(torch, dtype)
        given_, flipped = generate(case, contract, ranks, ""), []
        for problem in (given_, generate(case, _unsettled(contract), ranks, "")):
            reference = Reference(case, contract, problem)
            chosen = reference.results["chosen"]
            runs = [reference.rounded(lower, draw)["chosen"] for draw in range(3)]
            runs += [_rounded_once_more(reference, lower, draw)["chosen"] for draw in range(3)]
            flipped.append(sum(not torch.equal(run.double(), chosen) for run in runs))
        assert flipped[0] == 0
        flips += flipped[1]
    assert flips or dtype != "bfloat16"


def _rounded_once_more(reference, dtype, draw):
    """A disturbed run of inputs and weights that were moved besides."""
    generator = torch.Generator().manual_seed(draw)
    with Disturbing(generator):
        return reference.evaluate(
            dtype, lambda name, given: moved(given.full.to(dtype), generator).double()
        )


def _unsettled(contract):
    return dataclasses.replace(contract, settle=None)


def test_settled_tokens_are_made_of_those_drawn_and_left_alone_where_they_can_be():
    case = router(groups=4)
    rule, generator = rules(case), torch.Generator().manual_seed(1)
    x = torch.randn(6, 4, 5, generator=generator).bfloat16().double()
    weight = torch.randn(8, 5, generator=generator).double()
    found = settled(x, weight, rule)
    kept = (found == x).all(-1)
    assert 0 < kept.sum() < kept.numel()
    assert set(found.abs().flatten().tolist()) <= set(x.abs().flatten().tolist())
    assert torch.equal(settled(found, weight, rule), found)
    ties = torch.ones(8, 5, dtype=torch.float64)
    with pytest.raises(BadArgument, match="decisions between 8 experts in doubt"):
        settled(x, ties, rule)


def test_a_model_gets_other_tokens_until_none_of_its_routers_is_in_doubt():
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    states = torch.tensor([[1.0, 1.0 + 2.0**-22], [1.0, 3.0]])
    rule = dataclasses.replace(rules(router("float32")), experts=2, top_k=1)

    def in_doubt(inputs, parameters):
        routers = Routers(asked=True)
        routers.shares(states[inputs["tokens"]], parameters["weight"], rule)
        return routers.in_doubt

    tokens = torch.tensor([[0, 1], [1, 1]])
    found = tokens_without_doubt({"tokens": tokens}, {"weight": weight}, in_doubt)["tokens"]
    assert found.shape == tokens.shape
    assert found.eq(1).all()
    unchanged = tokens_without_doubt({"tokens": found}, {"weight": weight}, in_doubt)["tokens"]
    assert unchanged is found
    with pytest.raises(BadArgument, match="what routers decide in doubt"):
        tokens_without_doubt({"tokens": tokens * 0}, {"weight": weight}, in_doubt)


def test_only_a_model_whose_parameters_are_given_is_settled():
    shape = {"microbatches": 1, "sequence": 2, "batch": 1, "hidden": 3, "heads": 1, "groups": 1}
    shape |= {"head_size": 2, "ffn": 1, "layers": 1, "vocabulary": 3, "steps": 2}
    shape |= {"experts": 2, "top_k": 2}
    for concept, dtype, settling in (
        ("gpt_training", "float32", True),
        ("gpt_training", "bfloat16", False),
        ("resumed_training", "float32", False),
    ):
        case = Case(concept=concept, layout=Layout(), shape=shape, lens="native", dtype=dtype)
        contract = contract_of(case)
        assert (contract.settle is not None) is settling
        assert generate(case, contract, RankMap(case.layout, contract.axes), "").inputs


def test_capacity_by_position_and_by_probability():
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]).view(4, 1, 2)
    shape = {**SHAPE, "sequence": 4, "batch": 1, "experts": 2, "top_k": 1}
    for drop, kept in (("position", [0, 1]), ("probability", [0, 2])):
        options = {"capacity": 1.0, "drop": drop, "pre_softmax": True}
        case = Case(concept="moe_router", layout=Layout(), shape=shape, options=options)
        chosen, weights = route(logits, rules(case))
        assert chosen[:, 0, 0].nonzero().flatten().tolist() == kept
        assert torch.equal(weights != 0, chosen)


def test_logits_of_half_precision_are_single():
    x = torch.full((1, 1, 3), 1 / 3).bfloat16()
    logits = logits_of(x, x[0])
    assert logits.dtype is torch.float32
    assert float(logits) == pytest.approx(float((x.float() ** 2).sum()), rel=torch.finfo().eps)


@DRAWN
@given(case=moe_cases("moe_router", "moe_layer", "moe_dispatch", "moe_expert_bias", options={}))
def check_drawn(seen: Counter, case: Case) -> None:
    contract = contract_of(case)
    check_fits(case, contract, RankMap(case.layout, contract.axes))
    assert Case.from_json(case.to_json()) == case
    layout, experts = case.layout, case.shape["experts"]
    local = experts // layout.ep
    seen[case.concept] += 1
    seen["tp, ep, several local experts"] += layout.tp > 1 and layout.ep > 1 and local > 1
    seen["etp, ep, several local experts"] += layout.expert_tp > 1 and layout.ep > 1 and local > 1
    seen["etp is not tp"] += layout.expert_tp != layout.tp
    seen["one expert a rank"] += layout.ep > 1 and local == 1
    seen["eleven experts"] += experts >= 11
    seen["a batch of sequences in parallel"] += layout.sequence_parallel and case.shape["batch"] > 1
    seen["groups"] += "groups" in case.shape
    seen["replicas"] += layout.pp > 1 and layout.edp > 1
    seen[f"top_k {case.shape['top_k']}"] += 1
    seen.update(f"{name}={value}" for name, value in case.options.items())


def test_what_is_drawn():
    seen: Counter = Counter()
    check_drawn(seen)
    wanted = {
        f"{n}={v}" for options in OPTIONS.values() for n, vs in options.items() for v in vs[1:]
    }
    wanted |= {"top_k 1", "top_k 2", "top_k 3", *OPTIONS}
    assert not {name for name in (*wanted, *seen) if not seen[name]}
    assert CONTIGUOUS["strides"] == ("contiguous",)


def test_pairs_come_back_to_their_tokens_whatever_the_order():
    chosen = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)
    permutation = by_expert(chosen, width=2)
    assert permutation.tokens.tolist() == [0, 2, 0, 2]
    x = torch.arange(6.0).view(3, 2).requires_grad_()
    pairs = permutation.spread(x)
    back = permutation.gather(pairs)
    counts = chosen.sum(1, keepdim=True)
    assert torch.equal(back, x * counts)
    back.backward(torch.ones_like(back))
    assert torch.equal(x.grad, counts.expand(3, 2).float())


def test_an_attached_loss_gets_its_scale_whatever_passes():
    x, loss = torch.ones(2, requires_grad=True), torch.ones((), requires_grad=True)
    (attach_loss(x, loss, scale=0.25) * 0).sum().backward()
    assert (float(loss.grad), x.grad.tolist()) == (0.25, [0, 0])


def keep_bias() -> dict[str, bool]:
    """Rank program: the bias that is saved is the one that moves, and counts are not saved."""
    bias = ExpertBias(3, group=dist.group.WORLD, rate=0.5)
    saved = bias.state_dict()
    bias.count(torch.tensor([[True, False, False]]))
    bias.update()
    assert list(saved) == ["bias"]
    assert saved["bias"].tolist() == [-0.5, 0.5, 0.5]
    assert not bias.counts.any()
    return {"moved": bool(saved["bias"].any())}


def test_a_checkpoint_keeps_the_bias_itself():
    with open_cluster("sim", world_size=2) as cluster:
        assert cluster.run(keep_bias, world_size=2) == [{"moved": True}] * 2


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"top_k": 9}, "top_k: 9 is not from 1 to the 8 experts"),
        ({"top_k": 2, "score": "argmax"}, "score: 'argmax' is not one of softmax, sigmoid"),
        ({"top_k": 2, "groups": 3}, "groups: 3 does not divide the 8 experts"),
        ({"top_k": 3, "groups": 4, "group_top_k": 2}, "group_top_k: 2 must be .* divide top_k=3"),
        ({"top_k": 3, "groups": 4}, "1 groups of 2 experts do not have the top_k=3"),
        ({"top_k": 2, "capacity": 0.0}, "capacity: 0.0 is not above 0"),
        ({"top_k": 1, "capacity": 1.0}, "capacity: the probability of an only choice is 1"),
    ],
)
def test_a_choice_that_cannot_be(given_, words):
    with pytest.raises(ValueError, match=words) as caught:
        Choice(**given_).check(8)
    assert "\n" not in str(caught.value)
