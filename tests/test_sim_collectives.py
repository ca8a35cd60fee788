"""Every collective of the sim cluster, against gloo in processes and against torch on one rank."""

from collections.abc import Iterator
from functools import reduce

import pytest
import sim_group_programs as grouped
import sim_programs as programs
import sim_torch_programs as builds
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_programs import values

from verify.cluster import Cluster, RankFailures, open_cluster

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

EVERYWHERE = [
    programs.all_reduce_of_no_element_and_of_a_number,
    programs.all_reduce_of_a_slice,
    programs.all_reduce_of_narrow_types,
    programs.all_gather_list,
    programs.all_gather_into_tensor,
    programs.reduce_scatter_list,
    programs.reduce_scatter_tensor,
    programs.all_to_all_list,
    programs.all_to_all_single,
    programs.all_to_all_single_uneven,
    programs.broadcast,
    programs.scatter,
    programs.gather,
    programs.reduce,
    programs.objects,
    programs.send_object_lists,
    programs.messages_by_tag,
    programs.messages_in_order,
    programs.from_any_rank,
    programs.batched_messages,
    programs.asynchronous,
    programs.futures,
    programs.polling,
    programs.polling_the_store,
    programs.coalesced,
    programs.coalesced_by_name,
    grouped.groups_of_some,
    grouped.group_backwards,
    grouped.groups_made_by_their_members,
    grouped.subgroups,
    grouped.groups_by_backend_name,
    grouped.messages_in_a_group,
    grouped.functional_collectives,
    grouped.functional_gradients,
    grouped.differentiable_collectives,
    grouped.mesh_groups,
    grouped.dtensors,
    builds.collectives_in_backward,
    builds.recomputed,
    builds.hooks,
    builds.tensor_parallel,
    builds.pipelined,
    builds.replicated_dropout,
]
REDUCTIONS = [
    (op, dtype)
    for dtype, ops in (
        (torch.float64, "SUM PRODUCT MIN MAX"),
        (torch.int64, "SUM PRODUCT MIN MAX BAND BOR BXOR"),
    )
    for op in ops.split()
]


@pytest.fixture(scope="module")
def sim() -> Iterator[Cluster]:
    with open_cluster("sim", world_size=16) as opened:
        yield opened


@pytest.fixture(scope="module")
def gloo() -> Iterator[Cluster]:
    with open_cluster("process", world_size=4, timeout=60.0) as opened:
        yield opened


def assert_same(mine: object, theirs: object) -> None:
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def assert_as_gloo(sim: Cluster, gloo: Cluster, program, *args: object) -> None:
    mine = sim.run(program, *args, world_size=4)
    assert_same(mine, gloo.run(program, *args, world_size=4))
    assert_same(mine, sim.run(program, *args, world_size=4))


@pytest.mark.parametrize("program", EVERYWHERE, ids=lambda each: each.__name__)
def test_as_gloo(sim, gloo, program):
    assert_as_gloo(sim, gloo, program)


@pytest.mark.parametrize(("op", "dtype"), REDUCTIONS)
def test_reductions_as_gloo(sim, gloo, op, dtype):
    assert_as_gloo(sim, gloo, programs.all_reduce, op, dtype)


@pytest.mark.parametrize("megabytes", [25.0, 0.0001])
def test_data_parallelism_as_gloo(sim, gloo, megabytes):
    assert_as_gloo(sim, gloo, builds.data_parallel, megabytes)


@pytest.mark.parametrize("resharded", [True, False])
def test_fully_sharded_parameters_as_gloo(sim, gloo, resharded):
    assert_as_gloo(sim, gloo, builds.fully_sharded, resharded)


def test_checkpoints_as_gloo(sim, gloo, tmp_path):
    mine = sim.run(builds.saved_and_loaded, str(tmp_path / "sim"), world_size=4)
    assert_same(mine, gloo.run(builds.saved_and_loaded, str(tmp_path / "gloo"), world_size=4))
    assert [each[1:] for each in mine] == [[7, True]] * 4


@pytest.mark.parametrize("size", range(1, 17))
def test_worlds_of_every_size(sim, size):
    """One after another in one cluster: a reduction, a gather, a ring and an uneven exchange."""
    every = [values(2, 3, rank=rank) for rank in range(size)]
    total = torch.stack(every).sum(0)
    assert_same(sim.run(programs.all_reduce, "SUM", torch.float64, world_size=size), [total] * size)
    assert_same(sim.run(programs.all_gather_list, world_size=size), [every] * size)
    if size > 1:
        sent = [values(3, rank=rank) for rank in range(size)]
        assert_same(
            sim.run(programs.ring, torch.zeros(3), world_size=size), [torch.zeros(3)] * size
        )
        assert_same(sim.run(programs.own_ring, world_size=size), sent[-1:] + sent[:-1])
    assert_same(sim.run(programs.all_to_all_list_uneven, world_size=size), uneven(size))


def uneven(size: int) -> list[list[torch.Tensor]]:
    return [
        [values(abs(rank - source), 2, rank=source + 10 * rank) for source in range(size)]
        for rank in range(size)
    ]


@pytest.mark.parametrize("op", ["AVG", "PREMUL_SUM"])
def test_reductions_that_only_nccl_has(sim, op):
    size, factor = 4, 0.5 if op == "PREMUL_SUM" else None
    scale = 0.5 if factor else 1 / size
    total = sum(values(2, 3, rank=rank) for rank in range(size)) * scale
    got = sim.run(programs.all_reduce, op, torch.float64, factor, world_size=size)
    assert_same(got, [total] * size)
    parts = sum(values(2 * size, rank=rank) for rank in range(size)) * scale
    assert_same(sim.run(programs.reduce_scatter, op, factor, world_size=size), list(parts.split(2)))


def test_stacked_forms(sim):
    every = torch.stack([values(2, 3, rank=rank) for rank in range(4)])
    numbers = torch.stack([values(rank=rank) for rank in range(4)])
    parts = sum(values(4, 2, 3, rank=rank) for rank in range(4))
    expected = [[every, numbers, part] for part in parts]
    assert_same(sim.run(programs.stacked, world_size=4), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_in_rank_order(sim, dtype):
    """Where rounding shows: the chain of additions from rank 0 up, bit for bit."""
    every = [programs.fractions(16, rank).to(dtype) for rank in range(8)]
    chain = reduce(torch.add, every)
    assert not torch.equal(chain, reduce(torch.add, every[::-1]))
    for reduced, scattered, rooted in sim.run(programs.rounded_sums, dtype, world_size=8):
        assert_same([reduced, scattered, rooted], [chain] * 3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_drawn_programs(sim, data):
    """Any collectives on any groups, finished in any order, give what one rank would compute."""
    size = data.draw(st.integers(1, 6))
    members = st.lists(st.integers(0, size - 1), min_size=1, unique=True).map(sorted)
    groups = data.draw(st.lists(members, min_size=1, max_size=3))
    kinds = st.sampled_from(["all_reduce", "all_gather", "broadcast", "all_to_all"])
    step = st.tuples(st.integers(0, len(groups) - 1), kinds)
    steps = data.draw(st.lists(step, max_size=8))
    waits = [data.draw(st.permutations(range(len(steps)))) for _ in range(size)]
    got = sim.run(grouped.drawn, groups, steps, waits, world_size=size)
    for index, (number, kind) in enumerate(steps):
        ranks = groups[number]
        inputs = [grouped.drawn_input(len(ranks), rank, index) for rank in ranks]
        for place, rank in enumerate(ranks):
            assert_same(got[rank][index], grouped.drawn_result(kind, inputs, place))


def test_groups_of_one_name_one_after_another(sim):
    kept = sim.run(grouped.groups_made_by_their_members, world_size=4)
    assert_same(sim.run(grouped.groups_made_by_their_members, True, world_size=4), kept)


def test_names_of_backends(sim):
    """What a program asked for by name is what it is told that it has."""
    assert sim.run(grouped.backend_names, world_size=2) == [("sim", "sim")] * 2


@pytest.mark.parametrize("mode", ["inference_mode", "no_grad", "enable_grad"])
def test_modes_of_the_rank_that_comes_last_do_not_matter(sim, mode):
    """Ranks in different modes: whoever completes the operation does it in its own."""
    for ranks in ([0], [1], [0, 1]):
        got = sim.run(grouped.in_mode, mode, ranks, world_size=2)
        expected = sum(values(2, rank=rank) for rank in range(2))
        assert_same(got, [[expected, values(2, rank=1 - rank)] for rank in range(2)])


def test_dispatch_modes_do_not_see_the_simulator(sim):
    counts = sim.run(grouped.operations_seen, world_size=3)
    assert counts[1:] == counts[:1] * 2


def test_gradients_do_not_flow_through_what_is_not_differentiable(sim):
    assert sim.run(grouped.reduced_leaf, world_size=2) == [([1.0, 1.0], True)] * 2


@pytest.mark.parametrize("operation", grouped.TRANSPOSED)
def test_what_is_not_contiguous_has_a_readable_refusal(sim, operation):
    """As gloo refuses to send and to receive it, and NCCL to reduce it."""
    with pytest.raises(RankFailures, match="contiguous") as caught:
        sim.run(grouped.transposed, operation, world_size=2)
    assert len(caught.value.failures) == 2
