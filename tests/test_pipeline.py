"""impl's executor and links where no case of a property looks: what is kept, what is refused."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.distributed as dist

from impl.pipeline.executor import Executor, Stage
from impl.pipeline.p2p import Link, Outgoing, Pending
from impl.pipeline.schedules import build_schedule, forward_only
from impl.weight_pass import linear
from verify.cluster import open_cluster


@pytest.fixture(scope="module")
def sim():
    with open_cluster("sim", world_size=2) as opened:
        yield opened


def most_alive(kind: str, microbatches: int, overlap: bool) -> int:
    """Rank program: the most outputs of a stage's chunk that exist at once, when autograd keeps
    none of them."""
    link = Link(dist.group.WORLD, dtype=torch.float64)
    outputs: list[weakref.ref] = []
    most = 0

    def chunk(x, microbatch):
        nonlocal most
        y = x + 1.0
        outputs.append(weakref.ref(y.untyped_storage()))
        most = max(most, sum(each() is not None for each in outputs))
        return y

    Executor(
        build_schedule(kind, pp=2, vpp=1, microbatches=microbatches),
        stage=Stage(chunks=[chunk], parameters=[()], loss=lambda y, _: y.sum()),
        link=link,
        inputs=[torch.ones(3, dtype=torch.float64, requires_grad=True)] * microbatches,
        scale=1.0,
        shape=(3,),
        overlap=overlap,
    ).run()
    return most


@pytest.mark.parametrize("overlap", [False, True])
def test_outputs_are_freed_when_they_are_sent(sim, overlap):
    """All forwards come first, and yet no stage has all outputs at once."""
    found = sim.run(most_alive, "gpipe", 8, overlap, world_size=2)
    assert max(found) <= 2


def left_under_way(kind: str) -> tuple[int, int]:
    """Rank program: how many exchanges a run begins, and how many of them it does not wait for."""
    begun: list[Pending] = []

    class Watched(Link):
        def exchange(self, transfers):
            begun.append(super().exchange(transfers))
            return begun[-1]

    Executor(
        build_schedule(kind, pp=2, vpp=1, microbatches=3),
        stage=Stage(chunks=[lambda x, _: x + 1.0], parameters=[()], loss=lambda y, _: y.sum()),
        link=Watched(dist.group.WORLD, dtype=torch.float64),
        inputs=[torch.ones(3, dtype=torch.float64, requires_grad=True)] * 3,
        scale=1.0,
        shape=(3,),
        overlap=True,
    ).run()
    return len(begun), sum(bool(each.works) for each in begun)


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
def test_what_is_sent_is_waited_for_too(sim, kind):
    """Until then it has to be kept, and may not be written to."""
    for exchanges, left in sim.run(left_under_way, kind, world_size=2):
        assert exchanges > 0
        assert left == 0


def most_kept(kind: str, microbatches: int) -> tuple[int, int]:
    """Rank program: the most microbatches of which anything is kept, and of which all is."""
    link = Link(dist.group.WORLD, dtype=torch.float64)
    weight = torch.nn.Parameter(torch.ones(3, 3, dtype=torch.float64))
    most = [0, 0]

    class Watched(Executor):
        def _act(self, action):
            super()._act(action)
            kept = len(self._kept) + len(self._late)
            most[:] = max(most[0], kept), max(most[1], len(self._kept))

    Watched(
        build_schedule(kind, pp=2, vpp=1, microbatches=microbatches),
        stage=Stage(
            chunks=[lambda x, _: linear(x, weight)],
            parameters=[[weight]],
            loss=lambda y, _: y.sum(),
        ),
        link=link,
        inputs=[torch.ones(3, 3, dtype=torch.float64, requires_grad=True)] * microbatches,
        scale=1.0,
        shape=(3, 3),
        overlap=True,
    ).run()
    return most[0], most[1]


def test_zero_bubble_keeps_what_its_formula_says(sim):
    """Every stage as many microbatches as there are stages (arXiv:2401.10241, 2.3), and all of as
    many as 1f1b does."""
    found = sim.run(most_kept, "zb-h1", 6, world_size=2)
    plain = sim.run(most_kept, "1f1b", 6, world_size=2)
    assert [some for some, _ in found] == [2, 2]
    assert [whole for _, whole in found] == [whole for _, whole in plain] == [2, 1]


def frozen(kind: str) -> tuple[int, int]:
    """Rank program: nothing to train before the last stage, so nothing to send back from it."""
    link = Link(dist.group.WORLD, dtype=torch.float64)
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=link.stage == 1)
    outcome = Executor(
        build_schedule(kind, pp=2, vpp=1, microbatches=2),
        stage=Stage(
            chunks=[lambda x, _: x * weight], parameters=[[weight]], loss=lambda y, _: y.sum()
        ),
        link=link,
        inputs=[torch.ones(2, dtype=torch.float64)] * 2,
        scale=0.5,
        shape=(2,),
        overlap=True,
    ).run()
    assert outcome.input_gradients == {}
    return len(outcome.losses), 0 if weight.grad is None else int(weight.grad.sum())


@pytest.mark.parametrize("kind", ["1f1b", "zb-h1"])
def test_a_stage_without_gradients(sim, kind):
    assert sim.run(frozen, kind, world_size=2) == [(0, 0), (2, 2)]


def refusals() -> list[str]:
    """Rank program: the messages of runs whose parts do not fit."""
    link = Link(dist.group.WORLD, dtype=torch.float64)
    schedule = build_schedule("gpipe", pp=2, vpp=1, microbatches=2)
    stage = Stage(chunks=[lambda x, _: x.sin()], parameters=[()], loss=lambda y, _: y.sum())
    without = Stage(chunks=[], parameters=[()], loss=stage.loss)
    two = [torch.ones(1)] * 2
    found = []
    for table, own, inputs in (
        (build_schedule("gpipe", pp=3, vpp=1, microbatches=2), stage, two),
        (schedule, without, two),
        (schedule, stage, two[:1]),
    ):
        with pytest.raises(ValueError) as caught:
            Executor(table, stage=own, link=link, inputs=inputs, scale=1.0, overlap=True)
        found.append(str(caught.value))
    for tensor in (torch.ones(1), torch.ones((1,) * 8, dtype=torch.float64)):
        with pytest.raises(ValueError) as caught:
            link.exchange([Outgoing(tensor, 1 - link.stage, announced=True)])
        found.append(str(caught.value))
    return found


def test_what_does_not_fit_is_refused(sim):
    first, last = sim.run(refusals, world_size=2)
    for found in (first, last):
        assert "for pp=3, vpp=1 and microbatches=2; there are 2 stages" in found[0]
        assert "here 0 chunks, parameters of 1 and 2 inputs" in found[1]
        assert "and 1 inputs" in found[2]
        assert "a tensor is torch.float32; the link is torch.float64" in found[3]
        assert "8 dimensions; at most 7" in found[4]


@pytest.mark.parametrize(
    ("kind", "sizes", "words"),
    [
        ("dualpipe", {"pp": 2, "vpp": 1}, "'dualpipe' is not one of gpipe"),
        ("1f1b", {"pp": 0, "vpp": 1}, "pp: 0 is no size"),
        ("interleaved", {"pp": 1, "vpp": 2}, "need pp above 1, got 1"),
        ("interleaved", {"pp": 3, "vpp": 2}, "4 is no multiple of pp=3"),
        ("zb-h1", {"pp": 2, "vpp": 2}, "runs one chunk a stage, got 2"),
    ],
)
def test_a_schedule_that_there_is_not_is_refused(kind, sizes, words):
    with pytest.raises(ValueError, match=words):
        build_schedule(kind, microbatches=4, **sizes)


def test_an_evaluation_goes_forward_only():
    schedule = forward_only(pp=2, vpp=2, microbatches=3)
    for stage in range(2):
        assert {action.work for action in schedule.actions(stage)} == {"forward"}
        assert len(schedule.actions(stage)) == 6
