"""What the properties of data parallelism and the optimizer cannot see of impl."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Linear, Module

from impl.buckets import lay_out
from impl.data_parallel import DataParallel
from impl.groups import Groups, build_groups
from impl.optimizer.adam import AdamW
from impl.optimizer.loss_scale import DynamicLossScale
from impl.optimizer.mixed import Optimizer, ParameterGroup
from impl.optimizer.schedule import Schedule
from impl.optimizer.sgd import SGD
from verify.cluster import Cluster, RankFailures, open_cluster
from verify.cluster.history import History, mark
from verify.layout import Layout

WIDTH = 3
# Of Linear(3, 3): its bias comes first in a buffer, then its weight.
BIAS, WEIGHT = 3, 9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with open_cluster("sim", world_size=2) as opened:
        yield opened


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(
    numels=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    bucket_size=st.none() | st.integers(1, 60),
    parts=st.integers(1, 7),
)
def test_buckets_tile_the_buffer_and_hold_every_tensor_once(numels, bucket_size, parts):
    buckets = lay_out(numels, bucket_size=bucket_size, parts=parts)
    assert buckets[0].start == 0
    assert all(one.stop == other.start for one, other in pairwise(buckets))
    spans = [span for bucket in buckets for span in bucket.spans]
    assert [span.index for span in spans] == list(reversed(range(len(numels))))
    assert [span.stop - span.start for span in spans] == [numels[span.index] for span in spans]
    for bucket in buckets:
        assert (bucket.stop - bucket.start) % parts == 0
        assert bucket.start == bucket.spans[0].start
        ends = [span.stop for span in bucket.spans]
        assert [span.start for span in bucket.spans[1:]] == ends[:-1]
        assert 0 <= bucket.stop - ends[-1] < parts
        shards = [bucket.shard(part, parts=parts) for part in range(parts)]
        assert [i for each in shards for i in each] == list(range(bucket.start, bucket.stop))
        if bucket_size is not None:
            assert ends[-1] - bucket.start >= bucket_size or bucket is buckets[-1]
            assert ([bucket.start, *ends][-2] - bucket.start) < bucket_size


def _model(dtype: str = "float32") -> Linear:
    model = Linear(WIDTH, WIDTH, dtype=DTYPES[dtype])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    return model


def _optimizer(
    data_parallel: DataParallel,
    groups: Groups,
    *,
    rate: float,
    adam: bool = False,
) -> Optimizer:
    return Optimizer(
        data_parallel,
        groups=groups,
        parameter_groups=[ParameterGroup(parameters=data_parallel.parameters)],
        rule=AdamW() if adam else SGD(),
        schedule=Schedule(maximum=rate),
        weight_decay=0.0,
        norm_order=2.0,
    )


def _step(distributed: bool, overlap: bool, dtype: str) -> None:
    groups, model = build_groups(Layout(dp=2)), _model(dtype)
    data_parallel = DataParallel(
        model, groups=groups, bucket_size=1, overlap=overlap, distributed=distributed
    )
    optimizer = _optimizer(data_parallel, groups, rate=1.0)
    x = torch.ones(2, WIDTH, dtype=DTYPES[dtype])
    with data_parallel.no_sync():
        mark("first round")
        model(x).sum().backward()
    mark("backward")
    model(x).sum().backward()
    mark("finish")
    data_parallel.finish()
    mark("step")
    optimizer.step()
    mark("forward")
    model(x)
    mark("")


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_communicated_and_when(cluster, overlap, dtype):
    phase = "backward" if overlap else "finish"
    history = History()
    cluster.run(_step, False, overlap, dtype, world_size=2, history=history)
    found = [(r.operation, r.tensors[0], r.phase) for r in history.of(0) if r.phase != "step"]
    assert found == [("all_reduce", f"float32 [{n}]", phase) for n in (BIAS, WEIGHT)]

    history = History()
    cluster.run(_step, True, overlap, dtype, world_size=2, history=history)
    records = [(r.operation, r.tensors[0], r.phase) for r in history.of(0)]
    padded = [BIAS + 1, WEIGHT + 1]
    scattered = [("reduce_scatter_tensor", f"float32 [{n}]", phase) for n in padded]
    gathered = [("all_gather_into_tensor", f"{dtype} [{n // 2}]", "step") for n in padded[::-1]]
    assert [each for each in records if each[0] != "all_reduce"] == scattered + gathered
    assert {each[2] for each in records if each[0] == "all_reduce"} == {"step"}


def _states(distributed: bool) -> list[int]:
    groups = build_groups(Layout(dp=2))
    data_parallel = DataParallel(_model("bfloat16"), groups=groups, distributed=distributed)
    return [share.values.numel() for share in data_parallel.shares()]


def test_a_rank_updates_its_shard_of_the_buffer_only(cluster):
    assert cluster.run(_states, False, world_size=2) == [[BIAS, WEIGHT]] * 2
    # The middle of the buffer is inside of the weight.
    middle = (BIAS + WEIGHT) // 2
    assert cluster.run(_states, True, world_size=2) == [[BIAS, middle - BIAS], [middle]]


def _sums(rounds: int) -> list[float]:
    groups, model = build_groups(Layout()), _model("bfloat16")
    data_parallel = DataParallel(model, groups=groups)
    for index in range(rounds):
        factor = 1.0 if index == 0 else 2.0**-10
        model(torch.ones(1, WIDTH, dtype=torch.bfloat16) * factor).sum().backward()
    data_parallel.finish()
    found: list[float] = model.weight.main_grad.unique().tolist()
    return found


def test_small_gradients_add_up_to_large_ones(cluster):
    assert cluster.run(_sums, 257, world_size=1) == [[1.0 + 256 * 2.0**-10]]


def _crept(distributed: bool, adam: bool) -> list[float]:
    """A parameter after steps each of which is lost where it is rounded at once."""
    groups, model = build_groups(Layout(dp=2)), _model("bfloat16")
    data_parallel = DataParallel(model, groups=groups, distributed=distributed)
    optimizer = _optimizer(data_parallel, groups, rate=2.0**-12, adam=adam)
    for _ in range(128):
        data_parallel.zero_gradients()
        (model(torch.ones(1, WIDTH, dtype=torch.bfloat16)).sum() / 2).backward()
        data_parallel.finish()
        optimizer.step()
    found: list[float] = model.weight.detach().unique().tolist()
    return found


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("adam", [False, True])
def test_updates_below_the_precision_of_a_parameter_count(cluster, distributed, adam):
    found = cluster.run(_crept, distributed, adam, world_size=2)
    assert found == [[1.0 - 128 * 2.0**-12]] * 2


class _Tied(Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = _model()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One weight, twice."""
        y: torch.Tensor = self.linear(self.linear(x))
        return y


def _tied(overlap: bool) -> list[float]:
    groups, model = build_groups(Layout(dp=2)), _Tied()
    data_parallel = DataParallel(model, groups=groups, bucket_size=1, overlap=overlap)
    model(torch.ones(1, WIDTH)).sum().backward()
    data_parallel.finish()
    found: list[float] = model.linear.weight.main_grad.flatten().tolist()
    return found


def test_a_parameter_that_is_used_twice_is_reduced_once(cluster):
    model = _Tied()
    model(torch.ones(1, WIDTH)).sum().backward()
    expected = (2 * model.linear.weight.grad).flatten().tolist()
    for overlap in (False, True):
        assert cluster.run(_tied, overlap, world_size=2) == [expected] * 2


def _too_late() -> None:
    model = _model()
    DataParallel(model, groups=build_groups(Layout(dp=2)), overlap=True)
    for _ in range(2):
        model(torch.ones(1, WIDTH)).sum().backward()


def _twice() -> None:
    """A gradient of one parameter comes again, while its bucket waits for the others."""
    model = _model()
    DataParallel(model, groups=build_groups(Layout(dp=2)), overlap=True)
    for _ in range(2):
        next(model.parameters()).sum().backward()


def _frozen() -> tuple[float, bool]:
    groups, model = build_groups(Layout(dp=2)), _model()
    model.requires_grad_(False)
    data_parallel = DataParallel(model, groups=groups, distributed=True, overlap=True)
    optimizer = _optimizer(data_parallel, groups, rate=1.0)
    data_parallel.finish()
    done = optimizer.step()
    return float(done.norm), done.skipped


def test_a_rank_may_have_nothing_to_train(cluster):
    assert cluster.run(_frozen, world_size=2) == [(0.0, False)] * 2


@pytest.mark.parametrize("program", [_too_late, _twice])
def test_a_gradient_that_comes_after_its_last_is_an_error(cluster, program):
    with pytest.raises(RankFailures) as caught:
        cluster.run(program, world_size=2)
    assert [each.kind for each in caught.value.failures] == ["RuntimeError"] * 2
    assert "no_sync" in caught.value.failures[0].message


def _in_two_groups() -> None:
    groups, model = build_groups(Layout(dp=2)), _model()
    data_parallel = DataParallel(model, groups=groups, distributed=True)
    group = ParameterGroup(parameters=data_parallel.parameters)
    schedule = Schedule(maximum=1.0)
    Optimizer(
        data_parallel,
        groups=groups,
        parameter_groups=[group] * 2,
        rule=SGD(),
        schedule=schedule,
        weight_decay=0.0,
        norm_order=2.0,
    )


def test_a_parameter_in_two_groups_is_refused(cluster):
    with pytest.raises(RankFailures, match="is in two of them") as caught:
        cluster.run(_in_two_groups, world_size=2)
    assert len(caught.value.failures) == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: lay_out([1], bucket_size=0, parts=1), "bucket_size: 0"),
        (lambda: DynamicLossScale(value=1.0, minimum=2.0), "minimum: 2.0"),
        (lambda: DynamicLossScale(value=1.0, minimum=0.0), "minimum: 0.0"),
        (lambda: DynamicLossScale(growth_interval=0), "growth_interval: 0"),
        (lambda: DynamicLossScale(hysteresis=0), "hysteresis: 0"),
        (lambda: Schedule(maximum=1.0, minimum=2.0), "minimum: 2.0"),
        (lambda: Schedule(style="step", maximum=1.0), "style: 'step'"),
        (lambda: Schedule(style="cosine", maximum=1.0), "decay_steps: None"),
        (
            lambda: Schedule(style="linear", maximum=1.0, warmup_steps=5, decay_steps=4),
            "decay_steps: 4",
        ),
        (
            lambda: Schedule(style="wsd", maximum=1.0, annealing_steps=5, decay_steps=4),
            "decay_steps: 4",
        ),
        (lambda: Schedule(maximum=1.0).rate(-1), "step: -1"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(make: Callable[[], object], words: str):
    with pytest.raises(ValueError, match="^" + words.replace("(", r"\(")) as caught:
        make()
    assert "\n" not in str(caught.value)


def _scales(overflows: Sequence[bool]) -> list[float]:
    scale, found = DynamicLossScale(value=8.0, growth_interval=2, minimum=4.0), []
    for overflow in overflows:
        scale.update(overflow=overflow)
        found.append(scale.value)
    return found


def test_a_loss_scale_may_begin_with_its_smallest_value():
    scale = DynamicLossScale(value=4.0, minimum=4.0)
    scale.update(overflow=True)
    assert scale.value == 4.0


def test_a_loss_scale_forgives_one_overflow_until_it_grows():
    assert _scales([True, True, True, True]) == [8.0, 4.0, 4.0, 4.0]
    assert _scales([True, False, False, True, True]) == [8.0, 8.0, 16.0, 16.0, 8.0]
    assert _scales([False, True, False, False]) == [8.0, 8.0, 8.0, 16.0]
