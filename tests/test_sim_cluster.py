"""The sim cluster: failures are named at once with their places, and nothing outlives a run."""

import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import sim_faulty_programs as programs
import sim_state_programs as states
import torch
import torch.distributed as dist
from sim_programs import values

from verify.cluster import Cluster, CollectiveMismatch, Deadlock, RankFailures, open_cluster
from verify.cluster.sim.clock import Clock, delayed
from verify.cluster.sim.scheduler import Run
from verify.disk import Disk
from verify.errors import BadArgument, HarnessError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SOON = 5.0


@pytest.fixture(scope="module")
def sim() -> Iterator[Cluster]:
    with open_cluster("sim", world_size=256) as opened:
        yield opened


@pytest.fixture
def impatient() -> Iterator[Cluster]:
    with open_cluster("sim", world_size=4, timeout=0.5) as opened:
        yield opened


def assert_usable(cluster: Cluster) -> None:
    for size in (3, 1):
        total = size * (size + 1) / 2
        assert cluster.run(programs.total, world_size=size) == [(size, total)] * size


def failure(cluster: Cluster, kind: type[RankFailures], program, *args, world_size: int = 3):
    """What a run raises that must fail at once; the cluster is usable afterwards."""
    begin = time.monotonic()
    with pytest.raises(kind) as caught:
        cluster.run(program, *args, world_size=world_size)
    assert time.monotonic() - begin < SOON
    assert_usable(cluster)
    return caught.value


def place(program, text: str) -> str:
    """`sim_faulty_programs.py:12 in program` for its first line that has the text."""
    lines, first = inspect.getsourcelines(program)
    number = next(first + i for i, line in enumerate(lines) if text in line)
    return f"sim_faulty_programs.py:{number} in {program.__qualname__}"


def messages(error: RankFailures) -> dict[int, str]:
    return {each.rank: each.message for each in error.failures}


def test_a_deadlock_says_what_everyone_waits_for(sim):
    error = failure(sim, Deadlock, programs.missing_rank)
    assert "rank 1 finished" in error.headline
    said = messages(error)
    assert set(said) == {0, 2}
    for text in said.values():
        assert "all_reduce of float32 [2, 3]" in text
        assert "ranks 0, 1, 2" in text
        assert "rank 1 did not call it" in text
        assert place(programs.missing_rank, "dist.all_reduce") in text
    assert "in missing_rank" in error.failures[0].traceback


def test_ranks_that_wait_for_each_others_messages(sim):
    error = failure(sim, Deadlock, programs.crossed_receives, world_size=2)
    for rank, text in messages(error).items():
        assert f"recv of float32 [2] from rank {1 - rank}" in text
        assert place(programs.crossed_receives, "dist.recv") in text


def test_groups_in_opposite_orders(sim):
    said = messages(failure(sim, Deadlock, programs.crossed_groups))
    assert {rank: "rank 1 did not" in text for rank, text in said.items()} == {0: True, 1: False}
    assert "rank 0 did not" in said[1]
    assert all("over ranks 0, 1 " in text for text in said.values())


def test_a_key_that_nobody_sets(sim):
    said = messages(failure(sim, Deadlock, programs.waits_for_a_key))
    assert set(said) == {1, 2}
    assert all("never" in text for text in said.values())


def test_a_wait_away_from_its_call(sim):
    said = messages(failure(sim, Deadlock, programs.waits_late, world_size=2))
    assert place(programs.waits_late, "async_op=True") in said[0]


def test_a_deadlock_in_backward(sim):
    said = messages(failure(sim, Deadlock, programs.stuck_in_backward, world_size=2))
    assert "broadcast" in said[0]
    assert place(programs.Stuck.backward, "dist.broadcast") in said[0]


MISMATCHES = {
    programs.other_operation: ["all_reduce", "broadcast"],
    programs.other_shape: ["[2, 3]", "[3, 3]", "shapes differ"],
    programs.other_dtype: ["float32", "float64", "dtypes differ"],
    programs.other_reduction: ["sum", "max"],
    programs.other_root: ["broadcast of float64 [2] root 0", "broadcast of float64 [2] root 1"],
    programs.other_reduce_root: [
        "reduce of float64 [2] sum root 0",
        "reduce of float64 [2] sum root 1",
    ],
    programs.other_gather_shape: ["gather", "[2]", "[3]"],
    programs.other_list_shape: ["all_gather", "[2]", "[3]"],
    programs.other_scatter_shape: ["scatter", "[2]", "[3]"],
    programs.other_splits: ["all_to_all_single", "[2, 2]", "[1, 2]"],
    programs.other_list_of_exchange: ["all_to_all", "[2]", "[3]"],
    programs.other_number_of_tensors: ["numbers of tensors differ"],
    programs.other_order: ["all_reduce", "broadcast"],
}


@pytest.mark.parametrize("program", MISMATCHES, ids=lambda each: each.__name__)
def test_mismatched_collectives(sim, program):
    error = failure(sim, CollectiveMismatch, program)
    ranks = [each.rank for each in error.failures]
    assert 1 in ranks
    assert len(ranks) == 2
    assert "group of ranks 0, 1, 2" in error.headline
    for expected in MISMATCHES[program]:
        assert expected in str(error)
    assert str(error).count(f"in {program.__name__}") >= 2


@pytest.mark.parametrize("program", [programs.other_message_shape, programs.other_message_dtype])
def test_mismatched_messages(sim, program):
    error = failure(sim, CollectiveMismatch, program)
    assert set(messages(error)) == {0, 1}
    assert place(program, "dist.send") in messages(error)[0]
    assert place(program, "dist.recv") in messages(error)[1]


def test_a_mismatch_in_a_subgroup_names_its_members_only(sim):
    error = failure(sim, CollectiveMismatch, programs.in_a_subgroup, world_size=4)
    assert set(messages(error)) == {2, 3}
    assert "group of ranks 2, 3" in error.headline


def test_a_group_that_ranks_make_of_different_members(sim):
    error = failure(sim, CollectiveMismatch, programs.other_members)
    assert "ranks 0, 1, 2" in str(error)
    assert "ranks 0, 1 " in str(error)
    assert "in other_members" in str(error)


@pytest.mark.parametrize("ranks", [[1], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize("program", [programs.raises, programs.raises_after_a_collective])
def test_every_rank_that_raises_is_listed_with_its_traceback(sim, program, ranks):
    error = failure(sim, RankFailures, program, ranks)
    assert type(error) is RankFailures
    assert [each.rank for each in error.failures] == ranks
    for each in error.failures:
        assert f"in {program.__name__}" in each.traceback
        assert each.kind in ("ValueError", "KeyError")


def test_ranks_go_on_until_they_wait(sim):
    error = failure(sim, RankFailures, programs.raises_while_others_compute)
    assert messages(error) == {1: "refused on 1", 2: "refused on 2"}


def test_a_program_that_swallows_whatever_is_raised(sim):
    assert messages(failure(sim, RankFailures, programs.swallows)) == {1: "refused on 1"}


@pytest.mark.parametrize("program", [programs.cleans_up, programs.cleans_up_alone])
def test_an_exception_is_not_hidden_by_the_cleaning_up_after_it(sim, program):
    """Which itself does not fit what the others do, or waits for ever."""
    error = failure(sim, RankFailures, program)
    assert type(error) is RankFailures
    assert messages(error)[1] == "refused on 1"
    assert "in communicates" in error.failures[-1].traceback


def test_what_was_raised_is_told_with_the_mismatch_that_followed(sim):
    error = failure(sim, RankFailures, programs.raises_and_the_others_differ)
    assert type(error) is RankFailures
    said = messages(error)
    assert said[0] == "refused on 0"
    assert ("all_reduce" in said[1], "broadcast" in said[2]) == (True, True)


def test_what_was_raised_is_told_with_the_loop_that_followed(impatient):
    error = failure(impatient, RankFailures, programs.raises_and_another_loops)
    assert [(each.rank, each.kind) for each in error.failures] == [
        (0, "ValueError"),
        (1, "Unfinished"),
    ]


@pytest.mark.parametrize(("kind", "name"), [("exit", "SystemExit"), ("interrupt", "Keyboard")])
def test_exits_are_failures(sim, kind, name):
    (only,) = failure(sim, RankFailures, programs.leaves, kind).failures
    assert only.rank == 1
    assert name in only.kind


def test_an_exception_without_text(sim):
    (only,) = failure(sim, RankFailures, programs.raises_unprintable).failures
    assert (only.rank, only.kind.rpartition(".")[2]) == (1, "Unprintable")


@pytest.mark.parametrize(
    ("program", "args", "ranks"),
    [(programs.loops, (1,), {1}), (programs.loops_on_communication, (), {0, 1})],
)
def test_a_loop_ends_with_the_timeout(impatient, program, args, ranks):
    error = failure(impatient, RankFailures, program, *args, world_size=3)
    (only,) = error.failures
    assert only.rank in ranks
    assert f"in {program.__name__}" in only.traceback
    assert "did not" in error.headline


def test_seconds_that_the_machine_gives_to_others_do_not_count(monkeypatch):
    passed = iter([10.0, 10.5, 15.5, 20.5, 80.5, 81.0])
    late = iter([1.0, 1.0, 5.75, 5.75, 5.75, 2.0])
    times = SimpleNamespace(monotonic=lambda: next(passed))
    monkeypatch.setattr("verify.cluster.sim.clock.time", times)
    monkeypatch.setattr("verify.cluster.sim.clock.delayed", lambda: next(late))
    clock, found = Clock(0.5), []
    for _ in range(5):
        clock.look()
        found.append(clock.seconds)
    # It runs, alone and then beside others; it waits; it was stopped; a thread that waited ended.
    assert found == pytest.approx([1.0, 1.25, 1.75, 2.25, 2.75])


def test_threads_that_wait_for_a_processor_are_delayed():
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("this system does not tell how long threads wait for a processor")
    mine = os.sched_getaffinity(0)
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        for process in (other.pid, 0):
            os.sched_setaffinity(process, {min(mine)})
        before, until = delayed(), time.monotonic() + 1
        while time.monotonic() < until:
            pass
        assert delayed() - before > 0.1
    finally:
        os.sched_setaffinity(0, mine)
        other.kill()
        other.wait()


def test_what_a_cluster_reads_is_nothing_that_ranks_do(tmp_path):
    disk = Disk(tmp_path)
    with disk.watching():
        (tmp_path / "written").write_text("by a rank")
        before = len(disk._calls)
        delayed()
        assert len(disk._calls) == before
        # Its files are its own, whoever opens one: to look takes long, and opens what is there.
        looks = []
        disk._look = lambda *said: looks.append(said)
        delayed()
        assert not looks
        del disk._look


STOPPED = """
import time
from verify.cluster import open_cluster

def program():
    print("begun", flush=True)
    until = time.process_time() + 0.5
    while time.process_time() < until:
        pass
    return 1

with open_cluster("sim", world_size=1, timeout=2.0) as cluster:
    print(cluster.run(program, world_size=1))
"""


def test_a_process_that_was_stopped_has_not_taken_longer():
    with subprocess.Popen([sys.executable, "-c", STOPPED], stdout=subprocess.PIPE) as asked:
        assert asked.stdout.readline() == b"begun\n"
        asked.send_signal(signal.SIGSTOP)
        time.sleep(3)
        asked.send_signal(signal.SIGCONT)
        assert asked.stdout.read() == b"[1]\n"


def test_a_rank_that_does_not_let_go_is_named_and_leaves_no_thread_once_it_does():
    before = set(threading.enumerate())
    programs.released.clear()
    with open_cluster("sim", world_size=3, timeout=1.0) as cluster:
        with pytest.raises(RankFailures) as caught:
            cluster.run(programs.loops_and_swallows, world_size=3)
        (only,) = caught.value.failures
        assert (only.rank, only.kind) == (0, "Unresponsive")
        assert "in loops_and_swallows" in only.traceback
        assert_usable(cluster)
        programs.released.set()
        assert_usable(cluster)
    assert no_thread_but(before)


def no_thread_but(before: set[threading.Thread]) -> bool:
    until = time.monotonic() + SOON
    while set(threading.enumerate()) - before and time.monotonic() < until:
        time.sleep(0.01)
    return not set(threading.enumerate()) - before


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (programs.stray_send, "send of float64 [2] to rank 1"),
        (programs.stray_receive, "recv of float64 [2] from rank 1"),
        (programs.stray_collective, "all_reduce of float64 [2]"),
    ],
)
def test_calls_that_nobody_answered(sim, program, said):
    error = failure(sim, CollectiveMismatch, program)
    (only,) = error.failures
    assert only.rank == 0
    for part in (*said.split(" to ")[0].split(" from ")[:1], f"in {program.__name__}"):
        assert part in only.message


def test_closing_leaves_no_thread():
    before = set(threading.enumerate())
    cluster = open_cluster("sim", world_size=8)
    with pytest.raises(Deadlock):
        cluster.run(programs.missing_rank, world_size=8)
    assert_usable(cluster)
    assert len(set(threading.enumerate()) - before) == 8
    cluster.close()
    assert set(threading.enumerate()) == before
    cluster.close()


def test_two_clusters_at_once(sim):
    results = []

    def other() -> None:
        with open_cluster("sim", world_size=4) as second:
            results.extend(second.run(programs.total, world_size=4) for _ in range(20))

    thread = threading.Thread(target=other)
    thread.start()
    mine = [sim.run(programs.total, world_size=5) for _ in range(20)]
    thread.join()
    assert mine == [[(5, 15.0)] * 5] * 20
    assert results == [[(4, 10.0)] * 4] * 20


def test_a_rank_cannot_run_a_cluster(sim):
    with pytest.raises(RankFailures, match="cannot itself run"):
        sim.run(programs.nested, sim, world_size=2)
    assert_usable(sim)


def test_bad_arguments_are_one_line(sim):
    for size in (0, 257, -1):
        with pytest.raises(BadArgument, match=r"^world_size: .* 1 to 256"):
            sim.run(programs.total, world_size=size)
    for options in ({"timeout": 0.0}, {"timeout": -1.0}):
        with pytest.raises(BadArgument, match=r"^timeout: "):
            open_cluster("sim", world_size=2, **options)


def test_a_closed_cluster_says_so():
    cluster = open_cluster("sim", world_size=2)
    cluster.close()
    with pytest.raises(HarnessError, match="closed"):
        cluster.run(programs.total, world_size=2)


def test_a_broken_cluster_says_so_at_once_and_works_again(monkeypatch):
    def broken(*_):
        raise KeyError("no description")

    with open_cluster("sim", world_size=2) as cluster:
        monkeypatch.setattr(Run, "describe", broken)
        with pytest.raises(HarnessError, match="the sim cluster broke"):
            cluster.run(programs.missing_rank, world_size=2)
        monkeypatch.undo()
        assert cluster.run(programs.echo, [1], world_size=2) == [[1], [1]]


def test_ranks_share_no_argument(sim):
    given = programs.Argument(torch.zeros(2), [0])
    first, second = sim.run(programs.changed, given, world_size=2)
    assert (first.numbers, second.numbers, given.numbers) == ([0, 0], [0, 1], [0])
    assert [each.tensor.tolist() for each in (first, second, given)] == [[0, 0], [1, 1], [0, 0]]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_ranks_share_a_processor(sim):
    (processors,) = set(sim.run(programs.processors, world_size=3))
    assert len(processors) == 1
    assert processors <= os.sched_getaffinity(0)


def test_destroying_the_default_group(sim):
    assert sim.run(states.destroys, world_size=3) == [False] * 3
    assert_usable(sim)


def test_a_world_of_256_ranks(sim):
    assert sim.run(programs.total, world_size=256) == [(256, 256 * 257 / 2)] * 256
    said = failure(sim, Deadlock, programs.missing_rank, world_size=256)
    assert len(said.failures) == 255
    assert_usable(sim)


OUTSIDE = """
import faulthandler, os, signal, threading, time
import torch, torch.distributed as dist
import torch.distributed._functional_collectives as functional
import sim_faulty_programs as programs
from verify.cluster import RankFailures, open_cluster

faulthandler.dump_traceback_later(100, exit=True)
# A process that a shell started in the background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
own = dist.new_group([0])
torch.manual_seed(3)
torch.set_default_dtype(torch.float64)
before = torch.get_rng_state()
with open_cluster("sim", world_size=3) as sim:
    sim.run(programs.total, world_size=3)
    try:
        sim.run(programs.raises, [1], world_size=3)
    except RankFailures:
        pass
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() is torch.float64
    assert (dist.get_world_size(), dist.get_backend()) == (1, "gloo")
    x = torch.ones(2)
    dist.all_reduce(x, group=own)
    assert functional.all_reduce(x, "sum", own).tolist() == [1, 1]
    dist.all_reduce(x, group=dist.new_group([0]))
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    try:
        sim.run(programs.loops, 1, world_size=3)
    except KeyboardInterrupt:
        assert time.monotonic() - begin < 5
    else:
        raise AssertionError("not interrupted")
    assert sim.run(programs.total, world_size=3) == [(3, 6.0)] * 3
    assert dist.get_backend(own) == "gloo"
assert threading.active_count() == 1, threading.enumerate()
print("as before")
"""


def test_the_driver_is_as_before_and_can_be_interrupted():
    """Its own world, random state and default dtype; in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        check=False,
    )
    assert done.stdout == "as before\n", done.stderr
    assert dist.is_initialized() is False
    assert values(1, rank=0).dtype is torch.float64
