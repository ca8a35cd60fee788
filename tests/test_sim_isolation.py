"""The sim cluster: what each rank has for itself, and that a run starts as a new process would."""

import gc
import os
import threading
from collections.abc import Iterator

import pytest
import sim_faulty_programs as programs
import sim_state_programs as states
import torch

from verify.cluster import Cluster, RankFailures, open_cluster
from verify.cluster.sim.isolation import ModuleGlobals


@pytest.fixture(scope="module")
def sim() -> Iterator[Cluster]:
    with open_cluster("sim", world_size=4) as opened:
        yield opened


def test_a_run_starts_as_a_new_process_would(sim):
    fresh = sim.run(states.state, world_size=3)
    sim.run(states.leaves_everything_changed, world_size=3)
    assert sim.run(states.state, world_size=3) == fresh
    grad, dtype, _, threads, multithreading, autocast, *_ = fresh[0]
    assert (grad, dtype, threads) == (True, torch.float32, 1)
    assert (multithreading, autocast) == (False, False)


def test_random_numbers_of_ranks_are_their_own(sim):
    got = sim.run(states.draws_with_own_seed, world_size=3)
    for rank in (0, 2):
        generator = torch.Generator().manual_seed(rank)
        expected = [torch.rand(2, generator=generator) for _ in range(2)]
        assert got[rank] == torch.cat(expected).tolist()


def test_what_a_rank_drew_last_is_not_what_the_next_begins_with(sim):
    generator = torch.Generator().manual_seed(0)
    expected = torch.rand(2, generator=generator).tolist()
    torch.manual_seed(5)
    for _ in range(2):
        assert sim.run(states.draws_and_ends, world_size=3) == [expected] * 3
    generator.manual_seed(5)
    assert torch.rand(2).tolist() == torch.rand(2, generator=generator).tolist()
    assert sim.run(states.draws_and_ends, world_size=2) == [expected] * 2
    assert torch.rand(2).tolist() == torch.rand(2, generator=generator).tolist()


def test_default_dtypes_of_ranks_are_their_own(sim):
    expected = [torch.float16, torch.float64, torch.float64]
    assert sim.run(states.default_dtypes, world_size=3) == expected
    assert torch.get_default_dtype() is torch.float32


def test_registered_globals_are_apart(sim):
    state = ModuleGlobals(states, ["counter"])
    got = sim.run(states.counts, world_size=3, rank_states=[state])
    assert got == [(rank * 3, [rank] * 3) for rank in range(3)]
    assert states.counter == {"value": 0, "items": []}
    with pytest.raises(RankFailures):
        sim.run(programs.raises, [1], world_size=3, rank_states=[state])
    assert sim.run(states.counts, world_size=2, rank_states=[state])[1] == (2, [1, 1])


def test_arguments_of_ranks_are_their_own(sim):
    x, more, layers = torch.zeros(2), {"x": torch.zeros(1)}, []
    got = sim.run(states.changes_its_arguments, x, more, layers, world_size=3)
    for rank, (mine, other, listed) in enumerate(got):
        assert mine.tolist() == [rank, rank]
        assert other.tolist() == [rank]
        assert listed == [rank]
    assert (x.tolist(), more["x"].tolist(), layers) == ([0, 0], [0], [])


def test_nothing_of_a_run_is_kept(sim):
    gc.disable()
    try:
        sim.run(states.remembers_an_object, world_size=4)
        assert states.forgotten() == 0
    finally:
        gc.enable()


def test_ranks_run_in_the_same_order_every_time(sim):
    orders = []
    for _ in range(3):
        states.ORDER.clear()
        sim.run(states.order_of_ranks, [], world_size=4)
        orders.append(list(states.ORDER))
    assert orders[0] == orders[1] == orders[2]
    assert sorted(orders[0]) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_the_driver_stays_where_it_is_while_ranks_run_and_may_go_anywhere_afterwards(sim):
    before = os.sched_getaffinity(0)
    main = threading.main_thread().native_id
    inside = sim.run(states.processors_of, main, world_size=2)
    ranks = sim.run(states.processors_of, 0, world_size=2)
    assert all(len(each) == 1 for each in (*inside, *ranks))
    assert os.sched_getaffinity(0) == before
    with pytest.raises(RankFailures):
        sim.run(programs.raises, [1], world_size=2)
    assert os.sched_getaffinity(0) == before
