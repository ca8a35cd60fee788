"""Whole models of impl, where the properties do not look."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.init import constant_, zeros_

from impl.context_parallel.zigzag import PackedSequences
from impl.data_parallel import DataParallel
from impl.groups import build_groups
from impl.initialise import initialise_whole, normal
from impl.model import build_model, model_parameters, tie_embeddings
from impl.model_config import ModelConfig, layers_of
from impl.moe.layer import ExpertsConfig
from impl.moe.router import Choice
from impl.optimizer.mixed import Optimizer, ParameterGroup
from impl.optimizer.schedule import Schedule
from impl.optimizer.sgd import SGD
from impl.random import parallel_tracker
from impl.rotary import RotaryEmbedding
from impl.training import Microbatch, Trainer
from impl.transformer import LayerConfig, TransformerLayer
from verify.cluster import RankFailures, open_cluster
from verify.layout import Layout


@pytest.fixture(scope="module")
def sim():
    with open_cluster("sim", world_size=8) as opened:
        yield opened


def config(**given: Any) -> ModelConfig:
    layer = LayerConfig(hidden=4, heads=2, head_size=2, ffn=4, **given.pop("layer", {}))
    plain = {"layers": 4, "vocabulary": 5, "max_sequence": 4, "positions": "learned"}
    return ModelConfig(layer=layer, **{**plain, **given})


@pytest.mark.parametrize(
    ("layout", "given", "wanted"),
    [
        ({}, {}, [[[0, 1, 2, 3]]]),
        ({"pp": 2}, {}, [[[0, 1]], [[2, 3]]]),
        ({"pp": 2, "vpp": 2}, {}, [[[0], [2]], [[1], [3]]]),
        ({"pp": 2}, {"first_stage_layers": 1}, [[[0]], [[1, 2, 3]]]),
        ({"pp": 2}, {"last_stage_layers": 0}, [[[0, 1, 2, 3]], [[]]]),
        ({"pp": 3}, {"first_stage_layers": 1, "last_stage_layers": 2}, [[[0]], [[1]], [[2, 3]]]),
        ({"pp": 2, "vpp": 2}, {"split": (0, 2, 1, 1)}, [[[], [2]], [[0, 1], [3]]]),
        (
            {"pp": 2, "vpp": 2},
            {"layers": 6, "first_stage_layers": 4},
            [[[0, 1], [3, 4]], [[2], [5]]],
        ),
    ],
)
def test_layers_of(layout, given, wanted):
    layout = Layout(**layout)
    of = partial(layers_of, config(**given), layout=layout)
    found = [
        [list(of(stage=stage, chunk=chunk)) for chunk in range(layout.vpp)]
        for stage in range(layout.pp)
    ]
    assert found == wanted


@pytest.mark.parametrize(
    ("layout", "given", "words"),
    [
        ({"pp": 3}, {}, "4 do not divide by 3 stages"),
        ({}, {"first_stage_layers": 2, "last_stage_layers": 2}, "4 are not those of pp=1"),
        ({"pp": 2, "vpp": 2}, {"layers": 6}, "vpp=2"),
        ({"pp": 2}, {"first_stage_layers": 5}, "of which the first has 5"),
        ({}, {"first_stage_layers": 3}, "of which the first has 3"),
        ({"pp": 2}, {"split": (1, 2)}, "does not share out 4 layers to the 2 chunks"),
        ({"pp": 2}, {"split": (1, 3), "last_stage_layers": 3}, "leave out first_stage_layers"),
        ({"pp": 3}, {"split": (2, 0, 2)}, "chunk 1 of 3 would have 0"),
        ({"pp": 2}, {"split": (5, -1)}, "chunk 1 of 2 would have -1"),
    ],
)
def test_layers_that_cannot_be_shared_out(layout, given, words):
    with pytest.raises(ValueError, match=words):
        layers_of(config(**given), layout=Layout(**layout), stage=0, chunk=0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"layers": 0}, "layers: 0 is no size"),
        ({"vocabulary_multiple": -1}, "vocabulary_multiple: -1 is no size"),
        ({"positions": "sinusoidal"}, "is not one of rotary, learned, none"),
        ({"positions": "rotary"}, "give layer.rotary"),
        ({"layer": {"rotary": RotaryEmbedding(dim=2)}}, "only for them"),
        ({"experts_every": 2}, "layer.experts is not"),
    ],
)
def test_configurations_that_make_no_sense(given, words):
    with pytest.raises(ValueError, match=words):
        config(**given)


def test_experts_that_nothing_would_balance_are_refused():
    with pytest.raises(ValueError, match="expert_bias"):
        ExpertsConfig(number=2, ffn=2, choice=Choice(top_k=1, score="sigmoid", expert_bias=True))


def trained(
    layout: Layout,
    schedule: str | None,
    lengths: tuple[int, ...],
    packed: PackedSequences | None = None,
) -> list[float]:
    """Rank program: the losses of two steps of a model that is drawn by the names of parameters,
    of microbatches of so many tokens."""
    groups = build_groups(layout)
    tracker = parallel_tracker(1, layout=layout, rank=dist.get_rank())
    deferred = partial(constant_, val=math.nan)
    model = config(layer={"placement": "contiguous"}, vocabulary=6)
    chunks = build_model(model, groups=groups, tracker=tracker, init=deferred, dtype=torch.float64)
    for chunk in chunks:
        initialise_whole(chunk, groups=groups, seed=3, rule=lambda name, parameter: normal(0.5))
    tie_embeddings(chunks, groups=groups)
    parallel = DataParallel(chunks, groups=groups, overlap=True, distributed=True)
    optimizer = Optimizer(
        parallel,
        groups=groups,
        parameter_groups=[ParameterGroup(parameters=parallel.parameters)],
        rule=SGD(),
        schedule=Schedule(maximum=0.125),
        weight_decay=0.0,
        max_norm=1.0,
        norm_order=2.0,
    )
    trainer = Trainer(
        chunks,
        groups=groups,
        data_parallel=parallel,
        optimizer=optimizer,
        schedule=schedule,
    )
    data = [
        Microbatch(
            torch.arange(2 * length).view(2, length) % 6,
            torch.arange(2 * length).view(2, length) % 5,
            (torch.arange(2 * length).view(2, length) % 3 > 0).long(),
            packed,
        )
        for length in lengths
    ]
    found = [float(trainer.train_step(data).loss) for _ in range(2)]
    found.append(float(trainer.evaluate(data)))
    assert all(each.training for each in chunks.modules())
    groups.destroy()
    return found


@pytest.mark.parametrize(
    ("layout", "schedule"),
    [
        (Layout(pp=2), "gpipe"),
        (Layout(pp=2), "zb-h1"),
        (Layout(pp=2, vpp=2), None),
        (Layout(tp=2, pp=2), None),
    ],
)
def test_microbatches_of_different_lengths(sim, layout, schedule):
    """Also: a model that is initialised as whole models are is the same on any layout."""
    lengths = (3, 1, 4, 2)
    (alone,) = sim.run(trained, Layout(), None, lengths, world_size=1)
    assert alone[2] < alone[1] < alone[0]
    for found in sim.run(trained, layout, schedule, lengths, world_size=layout.world_size):
        assert found == pytest.approx(alone, rel=1e3 * torch.finfo(torch.float64).eps)


def too_long() -> None:
    """Rank program: a row that the model itself is given, without a trainer."""
    tracker = parallel_tracker(1, layout=Layout(), rank=0)
    (model,) = build_model(config(), groups=build_groups(Layout()), tracker=tracker, init=zeros_)
    model(torch.zeros(1, 5, dtype=torch.int64))


def test_a_sequence_that_is_too_long(sim):
    words = r"5 tokens are more than max_sequence=4"
    with pytest.raises(Exception, match=words):
        sim.run(trained, Layout(), None, (5,), world_size=1)
    with pytest.raises(Exception, match=words):
        sim.run(too_long, world_size=1)


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ((2, 1), "microbatch 0: cu_seqlens_padded: ends at 3, the sequence is 4 long on 2 ranks"),
        ((3, 1), "microbatch 0: sequence: 3 does not divide into the 2 chunks"),
    ],
)
def test_packed_sequences_that_do_not_fit_are_refused_on_every_rank(sim, lengths, words):
    packed = PackedSequences(lengths, lengths)
    with pytest.raises(RankFailures) as caught:
        sim.run(trained, Layout(cp=2, pp=2), None, (2, 2), packed, world_size=4)
    assert len(caught.value.failures) == 4
    assert all(each.message.startswith(words) for each in caught.value.failures)


def names(layout: Layout, **given: Any) -> list[str]:
    """Rank program: the parameters of a rank by their names in the model."""
    groups = build_groups(layout)
    tracker = parallel_tracker(1, layout=layout, rank=dist.get_rank())
    init = partial(constant_, val=0.0)
    chunks = build_model(config(**given), groups=groups, tracker=tracker, init=init)
    groups.destroy()
    return list(model_parameters(chunks))


def test_parameters_have_the_names_that_they_have_in_the_whole_model(sim):
    (alone,) = sim.run(names, Layout(), world_size=1)
    first, last = sim.run(names, Layout(pp=2, vpp=2), world_size=2)
    assert "layers.2.mlp.fc1.weight" in first
    assert "layers.3.mlp.fc1.weight" in last
    assert not set(first) & set(last)
    assert {*first, *last} == {*alone, "output.weight"}


def numbers(layout: Layout, **given: Any) -> dict[str, int]:
    """Rank program: the numbers of a rank's layers by their names in the model."""
    groups = build_groups(layout)
    tracker = parallel_tracker(1, layout=layout, rank=dist.get_rank())
    init = partial(constant_, val=0.0)
    chunks = build_model(config(**given), groups=groups, tracker=tracker, init=init)
    groups.destroy()
    return {
        name.partition(".")[2]: each.attention.core.given["layer_number"]
        for name, each in chunks.named_modules()
        if isinstance(each, TransformerLayer)
    }


def test_layers_of_a_model_know_their_numbers_in_it(sim):
    program = partial(numbers, layer={"layer_scaling": True}, multi_token_layers=2)
    first, last = sim.run(program, Layout(pp=2, vpp=2), world_size=2)
    assert first == {"layers.0": 1, "layers.2": 3}
    further = {"multi_token.0.layer": 5, "multi_token.1.layer": 6}
    assert last == {"layers.1": 2, "layers.3": 4, **further}
