"""What the properties cannot see of a layer: refusals by its configuration, and what the published
formulas say of the savings of sequence and context parallelism, which its contract has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest

from impl.groups import build_groups
from impl.latent_attention import LatentSizes
from impl.parameters import defer
from impl.random import parallel_tracker
from impl.transformer import LayerConfig, TransformerLayer
from verify.case import Case
from verify.cluster import RankFailures, open_cluster
from verify.layout import Layout
from verify.oracle.contract import Contract, Step
from verify.oracle.transformer import transformer_layer

SIZES = {"hidden": 4, "heads": 2, "head_size": 2, "ffn": 4}
LATENT = LatentSizes(kv_lora_rank=4, rope_size=2, value_size=2)
SHAPE = {**SIZES, "sequence": 16, "batch": 2, "heads": 4, "groups": 4}
TOKENS = SHAPE["sequence"] * SHAPE["batch"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"latent": LATENT, "groups": 1}, "groups: 1 of 2 heads; with latent attention each head"),
        ({"recompute": "some"}, "'some' is not one of full, full_distributed, selective, or None"),
    ],
)
def test_a_configuration_that_cannot_be(given, words):
    with pytest.raises(ValueError, match=words):
        LayerConfig(**SIZES, **given)
    assert LayerConfig(**SIZES, latent=LATENT, groups=2).latent is LATENT


def test_a_latent_of_no_size():
    with pytest.raises(ValueError, match="rope_size: 0 is no size; give 1 or more"):
        dataclasses.replace(LATENT, rope_size=0)


REFUSED = {
    "scaling": (
        {"layer_scaling": True},
        Layout(tp=2),
        "layer_number: layer_scaling=True needs it; give 1 or more",
    ),
    "split": (
        {"recompute": "full_distributed"},
        Layout(tp=2, sequence_parallel=True),
        "recompute: full_distributed does not go with sequence_parallel=True",
    ),
}


def _made(name: str) -> None:
    given, layout, _ = REFUSED[name]
    tracker = parallel_tracker(1, layout=layout, rank=0)
    config = LayerConfig(**SIZES, **given)
    TransformerLayer(config, groups=build_groups(layout), tracker=tracker, init=defer)


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_that_cannot_be_is_refused_by_every_rank(name):
    with open_cluster("sim", world_size=2) as cluster, pytest.raises(RankFailures) as caught:
        cluster.run(_made, name, world_size=2)
    failures = caught.value.failures
    assert [(each.rank, each.kind) for each in failures] == [(0, "ValueError"), (1, "ValueError")]
    assert all(REFUSED[name][2] in each.message for each in failures)


def contract(layout: Layout, **options) -> Contract:
    case = Case(concept="transformer_layer", layout=layout, shape=SHAPE, options=options)
    return transformer_layer(case)


def sent(steps: Iterable[Step], ranks: int) -> float:
    """The elements that a rank sends over tp where rings do it: n - 1 of n parts, twice to sum and
    give back."""
    times = {"all_gather": ranks - 1, "reduce_scatter": 1 - 1 / ranks, "all_reduce": 2 - 2 / ranks}
    return sum(times[step.operation] * step.elements for step in steps if step.kind == "tp")


@pytest.mark.parametrize("tp", [2, 4])
def test_sequence_parallelism_sends_what_tensor_parallelism_does(tp):
    """arXiv:2205.05198, section 4.2.2: an all-gather and a reduce-scatter are an all-reduce; the
    input of a linear is gathered once more for its gradient, so that it need not be kept whole."""
    plain, split = (contract(Layout(tp=tp, sequence_parallel=flag)) for flag in (False, True))
    again = 2 * (tp - 1) * TOKENS * SHAPE["hidden"] // tp
    assert sent(split.forward, tp) == sent(plain.forward, tp)
    assert sent(split.backward, tp) == sent(plain.backward, tp) + again
    full = [contract(Layout(tp=tp, sequence_parallel=s), recompute="full") for s in (False, True)]
    assert full[0].kept == tp * full[1].kept == TOKENS * SHAPE["hidden"]
    # The inputs of both norms and of what follows them, with two numbers a norm and token; inside
    # of attention and of the perceptron either keeps 1/tp.
    between = TOKENS * (4 * SHAPE["hidden"] + 4)
    assert plain.kept - split.kept == between - between // tp


@pytest.mark.parametrize("cp", [2, 4])
def test_context_parallelism_keeps_and_gathers_its_share(cp):
    alone, split = contract(Layout()), contract(Layout(cp=cp))
    assert alone.kept == cp * split.kept
    keys = TOKENS * SHAPE["groups"] * SHAPE["head_size"]
    gathered = [step.elements for step in split.forward if step.kind == "cp"]
    assert gathered == [keys // cp, keys // cp]


def test_a_distributed_input_is_kept_in_parts():
    layout = Layout(tp=2, cp=2)
    full, part = (contract(layout, recompute=name) for name in ("full", "full_distributed"))
    assert full.kept == 2 * part.kept
