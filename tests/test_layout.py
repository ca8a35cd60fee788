"""Layouts: published examples, bad input, and the arithmetic of megatron-core itself."""

from __future__ import annotations

import importlib.util
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from verify.errors import BadArgument
from verify.layout import AXES, DEFAULT_ORDER, KINDS, Layout
from verify.strategies.layouts import divisors, layouts_of_every_kind

needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="needs megatron-core"
)


def test_four_ranks_of_two_by_two() -> None:
    layout = Layout.for_world(4, tp=2, cp=2)
    assert layout == Layout(tp=2, cp=2)
    assert layout.groups("tp") == ((0, 1), (2, 3))
    assert layout.groups("cp") == ((0, 2), (1, 3))


def test_the_16_gpus_of_megatrons_docstring() -> None:
    """`initialize_model_parallel`: 2-way tensor, 4-way pipeline."""
    layout = Layout.for_world(16, tp=2, pp=4)
    assert layout.groups("dp") == tuple((first, first + 2) for first in (0, 1, 4, 5, 8, 9, 12, 13))
    assert layout.groups("tp") == tuple((first, first + 1) for first in range(0, 16, 2))
    assert layout.groups("pp") == tuple(tuple(range(first, 16, 4)) for first in range(4))
    assert layout.groups("embedding") == tuple((first, first + 12) for first in range(4))
    assert layout.groups("position_embedding") == ((0,), (1,), (2,), (3,))
    assert layout.group_of("embedding", 5) is None
    assert layout.group_of("position_embedding", 12) is None


def test_the_8_gpus_of_megatrons_context_parallel_example() -> None:
    assert Layout(tp=4, cp=2).groups("cp") == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_the_16_gpus_of_megatrons_hierarchical_example() -> None:
    """`create_hierarchical_groups`: sizes 2, 2, 4."""
    layout = Layout(cp=16, hierarchical_cp=(2, 2, 4))
    assert layout.groups("hcp_0") == tuple((i, i + 1) for i in range(0, 16, 2))
    assert layout.groups("hcp_1") == tuple((i, i + 2) for i in (0, 1, 4, 5, 8, 9, 12, 13))
    assert layout.groups("hcp_2") == tuple(tuple(range(i, 16, 4)) for i in range(4))
    assert set(layout.kinds) - set(KINDS) == {"hcp_0", "hcp_1", "hcp_2"}


def test_the_orthogonal_example_of_megatron() -> None:
    """`generate_masked_orthogonal_rank_groups`: sizes 2-3-4 and the data axis in the middle."""
    layout = Layout(tp=2, dp=3, pp=4, order="tp-dp-pp")
    groups = layout.groups("dp")
    assert (groups[0], groups[1], groups[7]) == ((0, 2, 4), (1, 3, 5), (19, 21, 23))


def test_coordinates_follow_the_order() -> None:
    layout = Layout(tp=2, cp=3, dp=2, pp=2, ep=3, etp=1, order="dp-tp-cp-ep-pp")
    assert layout.coordinates(13) == {"dp": 1, "tp": 0, "cp": 0, "pp": 1}
    assert layout.expert_coordinates(14) == {"edp": 2, "etp": 0, "ep": 0, "pp": 1}
    assert layout.edp == 4


def test_all_groups_of_16384_ranks_take_less_than_two_seconds() -> None:
    layout = Layout.for_world(16384, tp=8, cp=4, pp=16, ep=8, etp=2, optimizer_instances=4)
    start = time.perf_counter()
    counts = [len(layout.groups(kind)) for kind in layout.kinds]
    assert time.perf_counter() - start < 2.0
    assert min(counts) == 4


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (Layout(), "1 rank"),
        (Layout(sequence_parallel=True), "1 rank+sp"),
        (Layout(tp=2, cp=2, dp=2, sequence_parallel=True), "tp2-cp2-dp2+sp"),
        (Layout(tp=2, dp=3, order="dp-tp"), "dp3-tp2"),
        (Layout(tp=2, cp=4, hierarchical_cp=(2, 2)), "tp2-cp4-hcp2x2"),
        (Layout(tp=2, dp=4, pp=2, vpp=3, ep=4, etp=1), "tp2-etp1-ep4-dp4-pp2-vpp3"),
        (Layout(tp=2, etp=2), "tp2"),
        (Layout(dp=4, optimizer_instances=2), "dp4+instances2"),
    ],
)
def test_a_layout_has_a_short_name(layout, text) -> None:
    assert str(layout) == text


@given(layouts_of_every_kind(max_world_size=64))
def test_json_gives_the_same_layout(layout) -> None:
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_json_may_leave_out_what_has_a_default() -> None:
    assert Layout.from_json({"tp": 2}) == Layout(tp=2)


@pytest.mark.parametrize(
    ("make", "texts"),
    [
        (partial(Layout, tp=0), ["layout.tp: 0", "from 1 up"]),
        (partial(Layout, dp=-2), ["layout.dp: -2"]),
        (partial(Layout, cp=True), ["layout.cp: True"]),
        (partial(Layout, pp=2.0), ["layout.pp: 2.0"]),
        (partial(Layout, ep="2"), ["layout.ep: '2'"]),
        (partial(Layout, etp=0), ["layout.etp: 0"]),
        (partial(Layout, sequence_parallel=1), ["layout.sequence_parallel: 1", "True, False"]),
        (partial(Layout, vpp=2), ["layout.vpp: 2", "raise pp or set vpp=1"]),
        (partial(Layout, tp=2, ep=2), ["ep=2", "must divide the 2 ranks", "change etp, ep or dp"]),
        (partial(Layout, cp=4, hierarchical_cp=[2, 3]), ["[2, 3] must multiply to cp=4, got 6"]),
        (partial(Layout, hierarchical_cp=()), ["got no levels"]),
        (partial(Layout, hierarchical_cp=4), ["hierarchical_cp: 4", "list of sizes"]),
        (partial(Layout, hierarchical_cp=(1, 0)), ["hierarchical_cp[1]: 0"]),
        (partial(Layout, order=None), ["layout.order: None"]),
        (partial(Layout, order="tp-cp-xp"), ["'tp-cp-xp'", DEFAULT_ORDER]),
        (partial(Layout, order="tp-tp"), ["'tp-tp'", "each axis once"]),
        (partial(Layout, order="TP-DP"), ["'TP-DP'"]),
        (partial(Layout, order=""), ["layout.order: ''"]),
        (partial(Layout, dp=2, order="tp"), ["leaves out dp, but dp=2", "size 1"]),
        (partial(Layout, cp=2, order="tp-cp-pp"), ["leaves out dp, but edp=2"]),
        (
            partial(Layout, tp=2, etp=1, pp=2, order="tp-pp-dp"),
            ["does not end in pp", "dp=1 edp=2", "put pp last"],
        ),
        (
            partial(Layout, tp=4, etp=2, ep=2, pp=2, order="tp-pp-ep-dp-cp"),
            ["stages 4 ranks apart for attention and 2 for experts", "put pp last"],
        ),
        (partial(Layout, dp=4, optimizer_instances=3), ["3 must divide dp*cp = 4", "1, 2, 4"]),
        (
            partial(Layout, dp=4, ep=4, optimizer_instances=2),
            ["optimizer_instances: 2", "edp = 1", "allowed are 1"],
        ),
        (partial(Layout.for_world, 6, tp=4), ["6 ranks, tp=4", "must divide", "multiple of 4"]),
        (partial(Layout.for_world, 8, tp=4, dp=3), ["dp=3 does not fit", "give 2"]),
        (partial(Layout.for_world, 0), ["world_size: 0"]),
        (partial(Layout.for_world, 8, tq=4), ["unknown fields ['tq']", "allowed are tp, cp"]),
        (partial(Layout.from_json, {"tq": 4}), ["unknown fields ['tq']"]),
        (partial(Layout.from_json, [4]), ["expected an object, got list"]),
        (partial(Layout().groups, "colour"), ["'colour' is not one of tp, cp"]),
        (partial(Layout().groups, "hcp_0"), ["'hcp_0' is not one of"]),
        (partial(Layout(tp=2).coordinates, 2), ["rank: 2 is not one of the 2 of tp2"]),
        (partial(Layout(tp=2).expert_coordinates, -1), ["rank: -1"]),
        (partial(Layout(tp=2).group_of, "tp", 2), ["rank: 2"]),
    ],
)
def test_bad_input_gets_one_line(make: Callable[[], Any], texts: list[str]) -> None:
    with pytest.raises(BadArgument) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    for text in texts:
        assert text in message


@contextmanager
def _megatron(world_size: int, rank: int, **sizes: Any) -> Iterator[Any]:
    """megatron-core's `parallel_state` as `rank` of a world that communicates with nobody."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    before = dict(vars(parallel_state))
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(**sizes, create_gloo_process_groups=False)
        yield parallel_state
    finally:
        # It forgets some groups, which the next test would find.
        parallel_state.destroy_model_parallel()
        vars(parallel_state).update(before)
        dist.destroy_process_group()


def _sizes(layout: Layout) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "context_parallel_size": layout.cp,
        "hierarchical_context_parallel_sizes": list(layout.hierarchical_cp or ()) or None,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "num_distributed_optimizer_instances": layout.optimizer_instances,
        "order": layout.order,
    }


def _of_megatron(state: Any, layout: Layout, kind: str) -> tuple[int, ...] | None:
    """What the getter that `Kind.megatron` names answers."""
    call, _, level = layout.kinds[kind].megatron.partition("[")
    name, _, arguments = call.rstrip("()").partition("(")
    options = dict.fromkeys(
        (word.partition("=")[0] for word in arguments.split(", ") if word), True
    )
    try:
        group = getattr(state, name)(**options)
    except AssertionError as error:
        if "initialized" not in str(error):
            raise
        return None
    group = group[int(level.rstrip("]"))] if level else group
    return tuple(dist.get_process_group_ranks(group))


def _of_layout(layout: Layout, kind: str, rank: int) -> tuple[int, ...] | None:
    if kind == "optimizer_inter" and layout.optimizer_instances == 1:
        return None  # Megatron makes no group for one instance.
    return layout.group_of(kind, rank)


@needs_megatron
@settings(max_examples=80, deadline=None)
@given(layout=layouts_of_every_kind(max_world_size=24), data=st.data())
def test_megatron_core_has_the_same_groups(layout: Layout, data: st.DataObject) -> None:
    if importlib.util.find_spec("einops") is None:  # Megatron splits groups with it.
        layout = replace(layout, hierarchical_cp=None, optimizer_instances=1)
    rank = data.draw(st.integers(0, layout.world_size - 1), label="rank")
    with _megatron(layout.world_size, rank, **_sizes(layout)) as state:
        for kind in layout.kinds:
            assert _of_megatron(state, layout, kind) == _of_layout(layout, kind, rank), kind


@needs_megatron
@pytest.mark.parametrize("instances", [1, 2])
def test_megatron_core_has_the_same_groups_on_every_rank(instances: int) -> None:
    if instances > 1:
        pytest.importorskip("einops", reason="Megatron splits groups with einops")
    layout = Layout(tp=2, cp=2, dp=2, pp=3, ep=2, etp=1, optimizer_instances=instances)
    for rank in range(layout.world_size):
        with _megatron(layout.world_size, rank, **_sizes(layout)) as state:
            for kind in layout.kinds:
                assert _of_megatron(state, layout, kind) == _of_layout(layout, kind, rank), kind


@needs_megatron
def test_megatron_core_refuses_the_same_sizes() -> None:
    """Over drawn sizes that need not fit; an order may leave axes out."""
    draw, verdicts = random.Random(0), {True: 0, False: 0}
    orders = list(permutations(AXES))
    for _ in range(400):
        sizes = {axis: draw.choice((1, 1, 2, 3)) for axis in ("tp", "cp", "dp", "pp", "ep")}
        order = draw.choice(orders)
        layout = {
            **sizes,
            "etp": draw.choice((None, 1, 2)),
            "vpp": draw.choice((1, 1, 1, 2)),
            "order": "-".join(order[: draw.choice((3, 4, 5, 5, 5))]),
        }
        accepted = _accepts(lambda layout=layout: Layout(**layout), BadArgument)
        assert accepted == _accepts(lambda layout=layout: _make(layout)), layout
        verdicts[accepted] += 1
    assert min(verdicts.values()) > 50


def _make(layout: dict[str, Any]) -> None:
    given = SimpleNamespace(**layout, hierarchical_cp=None, optimizer_instances=1)
    world_size = given.tp * given.cp * given.dp * given.pp
    with _megatron(world_size, 0, **_sizes(given)):  # type: ignore[arg-type]
        pass


def _accepts(
    make: Callable[[], Any],
    refusal: type[Exception] | tuple[type[Exception], ...] = (RuntimeError, AssertionError),
) -> bool:
    try:
        make()
    except refusal:
        return False
    return True


@pytest.mark.parametrize("number", [1, 2, 12, 13])
def test_divisors(number: int) -> None:
    assert divisors(number) == [n for n in range(1, 14) if number % n == 0]


@given(layouts_of_every_kind(max_world_size=64))
def test_kinds_of_one_division_have_the_same_groups(layout: Layout) -> None:
    """And kinds with the same groups are of one division, unless one of them is a cut."""
    world = set(range(layout.world_size))
    divisions: dict[object, set[object]] = {}
    for kind, found in layout.kinds.items():
        groups = layout.groups(kind)
        alone = world - {rank for group in groups for rank in group}
        parts = frozenset(groups) | {(rank,) for rank in alone}
        divisions.setdefault(layout.division(kind), set()).add(parts)
        if found.cut is None:
            same = {k for k in layout.kinds if set(layout.groups(k)) == set(groups)}
            uncut = {k for k in same if layout.kinds[k].cut is None}
            assert len({layout.division(k) for k in uncut}) == 1
    assert all(len(parts) == 1 for parts in divisions.values())
