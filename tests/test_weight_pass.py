"""impl's weight passes: the bits of one backward, its products once, and only theirs are kept."""

from __future__ import annotations

import gc
import weakref
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import get_gradient_edge
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from impl.data_parallel import GradientBuffer
from impl.groups import build_groups
from impl.pipeline.executor import Executor
from impl.pipeline.timeline import Action
from impl.pretrain.options import Options
from impl.pretrain.run import build
from impl.weight_pass import WeightPass, embedding, linear
from verify.cluster import open_cluster

SMALL = {
    "layers": 2,
    "hidden": 16,
    "heads": 2,
    "ffn": 24,
    "sequence": 8,
    "vocabulary_multiple": 8,
    "global_batch_size": 4,
    "microbatch_size": 1,
}
RUNS = {
    "pp4": {"pp": 4, "layers": 4, "bias": True, "norm": "LayerNorm"},
    "untied": {"pp": 2, "tp": 2, "sequence_parallel": True, "tied": False},
    "experts": {"pp": 2, "tp": 2, "sequence_parallel": True, "experts": 4, "bias": False},
    "recompute": {"pp": 2, "recompute": "full", "dropout": 0.1, "positions": "learned_absolute"},
    "replicas": {
        "pp": 2,
        "dp": 2,
        "global_batch_size": 6,
        "overlap": True,
        "bucket": 600,
        "distributed_optimizer": True,
        "bf16": True,
    },
}


class Products(TorchDispatchMode):
    """Counts the multiplications and additions of matrix products: torch's own counter cannot be
    on while gradients are asked for by name."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            count = flop_registry[func._overloadpacket]
            self.total += count(*args, **(kwargs or {}), out_val=found)
        return found


@pytest.fixture(scope="module")
def sim():
    with open_cluster("sim", world_size=4) as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens")


def trained(values: dict) -> list[torch.Tensor]:
    """Rank program: the main gradients of a step."""
    options = Options.from_plain(values)
    run = build(options, build_groups(options.layout()))
    found: list[torch.Tensor] = []

    def finalised() -> None:
        found.extend(buffer.data.clone() for buffer in run.trainer.data_parallel.buffers)

    run.trainer.train_step(run.batches.after(0), finalised=finalised)
    return found


def run_of(sim, given: dict, kind: str, folder: Path) -> list:
    options = Options(**{**SMALL, **given}, pipeline=kind, cache=folder)
    return sim.run(trained, options.to_plain(), world_size=options.layout().world_size)


@pytest.mark.parametrize("name", RUNS)
def test_the_bits_and_the_products_of_one_backward(sim, name, monkeypatch, folder):
    """A step of zero-bubble has the gradients of 1f1b, bit for bit, and multiplies as much."""
    counts: dict[int, Counter] = defaultdict(Counter)

    class Counted(Executor):
        def _act(self, action):
            with Products() as counter:
                super()._act(action)
            counts[dist.get_rank()][action.work] += counter.total

    monkeypatch.setattr("impl.training.Executor", Counted)
    plain = run_of(sim, RUNS[name], "1f1b", folder)
    late = run_of(sim, RUNS[name], "zb-h1", folder)
    for one, other in zip(plain, late, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert any(a.count_nonzero() for a in one)
    for found in counts.values():
        assert found["input"] + found["weight"] == found["backward"]
        assert 0 < found["weight"] < found["input"]


def test_a_weight_pass_does_the_products_of_weights_only(sim, monkeypatch, folder):
    """Of every matrix but that of the look-up one product a token."""
    counts: Counter = Counter()

    class Counted(Executor):
        def _act(self, action):
            with Products() as counter:
                super()._act(action)
            if action.work == "weight":
                counts["done"] += counter.total
                return
            if action.work == "input":
                matrices = [p for p in self.stage.parameters[0] if p.dim() == 2]
                matrices = matrices[1:] if self.link.stage == 0 else matrices
                counts["due"] += sum(2 * SMALL["sequence"] * each.numel() for each in matrices)

    monkeypatch.setattr("impl.training.Executor", Counted)
    run_of(sim, {"pp": 2}, "zb-h1", folder)
    assert counts["done"] == counts["due"] > 0


def test_reductions_over_replicas_begin_within_the_last_weight_pass(sim, monkeypatch, folder):
    """Not with gradients that the input pass found, and not after it all either."""
    doing: dict[int, Action] = {}
    begun: list[Action] = []
    start = GradientBuffer._start

    class Watched(Executor):
        def _act(self, action):
            doing[dist.get_rank()] = action
            super()._act(action)
            del doing[dist.get_rank()]

    def watched(buffer):
        begun.append(doing[dist.get_rank()])
        start(buffer)

    monkeypatch.setattr("impl.training.Executor", Watched)
    monkeypatch.setattr(GradientBuffer, "_start", watched)
    run_of(sim, RUNS["replicas"], "zb-h1", folder)
    assert len(begun) > 4
    assert set(begun) == {Action("weight", 2, 0)}


def chain(depth: int, width: int = 4) -> list[Parameter]:
    torch.manual_seed(0)
    return [Parameter(torch.randn(width, width, dtype=torch.float64)) for _ in range(depth)]


def back(weights: list[Parameter], y: torch.Tensor, x: torch.Tensor) -> WeightPass:
    late = WeightPass([each for each in weights if each.requires_grad])
    late.back(get_gradient_edge(y), gradient=torch.ones_like(y), x=x)
    return late


def test_a_weight_that_is_used_again_and_again():
    """The summands of a parameter come in the order of backward, and its hook runs once."""
    table, weight = chain(2)
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([[0, 1], [2, 3], [1, 1]])

    def output() -> torch.Tensor:
        h = x
        for _ in range(3):
            h = (linear(h, weight) + embedding(rows, table)).tanh() @ table
        return linear(h, table).sum()

    output().backward()
    wanted = [each.grad for each in (x, table, weight)]
    x.grad = table.grad = weight.grad = None
    ran: list[Parameter] = []
    for each in (table, weight):
        each.register_post_accumulate_grad_hook(ran.append)
    late = WeightPass([table, weight])
    y = output()
    found = late.back(get_gradient_edge(y), gradient=torch.ones_like(y), x=x)
    assert ran == []
    assert table.grad is weight.grad is None
    late.run()
    assert len(ran) == 2
    torch.testing.assert_close([found, table.grad, weight.grad], wanted)


def test_nothing_is_kept_but_what_products_need():
    """Of x -> weight -> tanh -> square -> weight, the first pass frees what squares need."""
    first, last = weights = chain(2)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    inner = linear(x, first).tanh()
    squared = inner.square()
    y = linear(squared, last).tanh()
    freed, needed = weakref.ref(inner), weakref.ref(squared)
    late = back(weights, y, x)
    del inner, squared, y
    assert freed() is None
    assert needed() is not None
    late.run()
    del late
    assert needed() is None


def test_a_frozen_weight_has_no_product():
    first, last = weights = chain(2)
    first.requires_grad_(False)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    late = back(weights, linear(linear(x, first), last), x)
    with Products() as counter:
        late.run()
    assert counter.total == 2 * 3 * 4 * 4
    assert first.grad is None
    assert last.grad is not None


def test_a_hook_of_a_gradient_is_refused():
    (weight,) = chain(1)
    weight.register_hook(lambda gradient: 2 * gradient)
    with pytest.raises(ValueError, match=r"shape \[4, 4\] has a hook of its gradient"):
        WeightPass([weight])


def test_a_copy_of_a_weight_in_another_dtype_is_not_kept_by_the_graph():
    weight = Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    copy = weight.float()
    alive = weakref.ref(copy)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: None, lambda nothing: None):
        y = linear(torch.ones(4, 2), copy)
    del copy
    gc.collect()
    assert y.requires_grad
    assert alive() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_is_what_it_is_of_other_layers(dtype):
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(4, 2, generator=generator, dtype=dtype)
    found = []
    for product in (linear, torch.nn.functional.linear):
        x = given.clone().requires_grad_()
        weight = Parameter(torch.arange(6.0, dtype=dtype).view(3, 2) / 7)
        with torch.autocast("cpu", torch.bfloat16):
            y = product(x, weight)
        y.sum().backward()
        found.append((y, x.grad, weight.grad))
    for mine, other in zip(*found, strict=True):
        assert mine.dtype is other.dtype
        assert torch.equal(mine, other)
