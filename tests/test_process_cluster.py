"""The process cluster: worlds of any size, every failure named, and usable after each."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import cluster_programs as programs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verify.case import Case
from verify.cluster import Deadlock, RankFailures, open_cluster, wire
from verify.cluster.process import ProcessCluster
from verify.errors import BadArgument, HarnessError
from verify.layout import Layout

TIMEOUT, STALL = 8.0, 2.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[ProcessCluster]:
    with open_cluster("process", world_size=4, timeout=TIMEOUT, stall=STALL) as opened:
        yield opened


def assert_usable(cluster: ProcessCluster, world_size: int = 3) -> None:
    for rank, (own, size, x) in enumerate(cluster.run(programs.total, 1.0, world_size=world_size)):
        assert (own, size) == (rank, world_size)
        expected = world_size + world_size * (world_size - 1) / 2
        assert torch.equal(x, torch.full((3,), expected, dtype=torch.float64))


def failure(cluster: ProcessCluster, program, *args, world_size=3, kind=RankFailures):
    """What a run that must fail raises, quickly enough; the cluster is usable afterwards."""
    begin = time.monotonic()
    with pytest.raises(kind) as caught:
        cluster.run(program, *args, world_size=world_size)
    assert time.monotonic() - begin < TIMEOUT + 15
    assert_usable(cluster)
    return caught.value


def test_worlds_of_every_size_reuse_the_same_processes(cluster):
    for world_size in (4, 1, 3, 2, 4):
        assert_usable(cluster, world_size)
    first = cluster.run(programs.process_id, world_size=4)
    assert len({*first, os.getpid()}) == 5
    assert cluster.run(programs.process_id, world_size=2) == first[:2]


def test_a_run_starts_as_a_new_process_would(cluster):
    first = cluster.run(programs.random_number, world_size=2)
    assert cluster.run(programs.random_number, world_size=2) == first
    for _ in range(2):
        assert cluster.run(programs.leave_a_group, world_size=2) == [[0, 1], [0, 1]]


def test_a_group_is_there_when_all_its_members_have_it(cluster):
    """One that is done with it would close connections that another still opens."""
    assert min(cluster.run(programs.make_a_group, 0.5, world_size=2)) >= 0.5


def test_a_message_that_nobody_received_does_not_reach_the_next_run(cluster):
    cluster.run(programs.stray_send, world_size=2)
    assert cluster.run(programs.send_and_receive, 3.0, world_size=2) == [3.0, 3.0]


def test_every_rank_that_raises_is_listed_with_its_traceback(cluster):
    error = failure(cluster, programs.raise_on, [0, 2])
    assert [(f.rank, f.kind, f.message) for f in error.failures] == [
        (0, "ValueError", "refused on 0"),
        (2, "ValueError", "refused on 2"),
    ]
    assert all("in raise_on" in f.traceback for f in error.failures)
    assert "worker.py" not in error.failures[0].traceback


def test_a_rank_that_raises_late_is_listed_too(cluster):
    error = failure(cluster, programs.raise_in_turn, 1.0, world_size=2)
    assert [f.rank for f in error.failures] == [0, 1]


def test_an_exception_that_does_not_pickle(cluster):
    (only,) = failure(cluster, programs.raise_odd).failures
    assert (only.rank, only.kind, only.message) == (1, "Odd", "one")


def test_an_exception_without_a_message_and_a_system_exit(cluster):
    for program, kind in (
        (programs.raise_unprintable, "Unprintable"),
        (programs.leave, "SystemExit"),
    ):
        failures = failure(cluster, program).failures
        assert [(f.rank, f.kind) for f in failures] == [(1, kind)]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("exit", "exit code 3"),
        ("SIGKILL", "SIGKILL"),
        ("segfault", "SIGSEGV"),
    ],
)
def test_a_rank_that_dies_is_named_and_replaced(cluster, how, said):
    (only,) = failure(cluster, programs.die, 1, how).failures
    assert (only.rank, only.kind) == (1, "WorkerDied")
    assert said in only.message
    assert ("in die" in only.traceback) == (how == "segfault")


def test_a_stopped_rank_is_named_and_replaced(cluster):
    before = cluster.run(programs.process_id, world_size=3)
    error = failure(cluster, programs.die, 1, "SIGSTOP")
    assert [(f.rank, f.kind) for f in error.failures] == [(1, "Unresponsive")]
    assert "SIGSTOP" in str(error)
    assert f"did not finish within {TIMEOUT:g} s" in error.headline
    assert "rank 0 waits in torch.distributed" in error.headline
    after = cluster.run(programs.process_id, world_size=3)
    assert not Path(f"/proc/{before[1]}").exists()
    assert after[1] != before[1]


def test_a_collective_that_only_some_ranks_reach_is_a_deadlock(cluster):
    error = failure(cluster, programs.partial_collective, kind=Deadlock)
    assert [f.rank for f in error.failures] == [0, 2]
    assert "rank 1 finished" in error.headline
    assert "in partial_collective" in str(error)
    assert "all_reduce" in error.failures[0].traceback


def test_ranks_that_wait_for_each_other_are_a_deadlock_that_needs_no_new_process(cluster):
    before = cluster.run(programs.process_id, world_size=2)
    error = failure(cluster, programs.cross_wait, world_size=2, kind=Deadlock)
    assert [f.rank for f in error.failures] == [0, 1]
    assert cluster.run(programs.process_id, world_size=2) == before


def test_a_rank_that_loops_is_named_with_its_place(cluster):
    (only,) = failure(cluster, programs.loop_on, 1).failures
    assert only.rank == 1
    assert "in loop_on" in only.message


def test_a_rank_that_holds_the_interpreter_lock_shows_its_stack(cluster):
    (only,) = failure(cluster, programs.hold_the_lock, 1).failures
    assert (only.rank, only.kind) == (1, "Unresponsive")
    assert "in hold_the_lock" in only.traceback


def test_slow_ranks_are_not_taken_for_a_deadlock(cluster):
    assert cluster.run(programs.slow, 1.5 * STALL, world_size=2) == [0, 1]


def test_a_worker_killed_between_runs_is_replaced(cluster):
    victim = cluster.run(programs.process_id, world_size=3)[1]
    os.kill(victim, signal.SIGKILL)
    time.sleep(0.2)
    assert_usable(cluster)


def test_what_does_not_travel_is_named(cluster):
    error = failure(cluster, programs.unsendable)
    assert [f.rank for f in error.failures] == [0, 1, 2]
    assert "does not travel" in str(error)
    with pytest.raises(BadArgument, match="does not travel"):
        cluster.run(programs.identity, object(), world_size=2)
    with pytest.raises(BadArgument, match="top level"):
        cluster.run(lambda: None, world_size=2)
    assert_usable(cluster)


def test_bad_arguments_are_one_line(cluster):
    for world_size in (0, 5):
        with pytest.raises(BadArgument, match="between 1 and"):
            cluster.run(programs.process_id, world_size=world_size)
    for options in ({"backend": "mpi"}, {"timeout": 0.0}, {"stall": -1.0}):
        with pytest.raises(BadArgument, match=f"^{next(iter(options))}: "):
            ProcessCluster(world_size=2, **options)
    if torch.cuda.device_count() < 99:
        with pytest.raises(BadArgument, match="one GPU a rank"):
            ProcessCluster(world_size=99, backend="nccl")


def test_closing_ends_every_worker():
    cluster = ProcessCluster(world_size=2, timeout=TIMEOUT)
    pids = cluster.run(programs.process_id, world_size=2)
    cluster.close()
    cluster.close()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    with pytest.raises(HarnessError, match="closed"):
        cluster.run(programs.process_id, world_size=1)


RUNS = {
    programs.stray_send: set(),
    programs.stray_receive: set(),
    programs.stray_collective: set(),
    programs.destroy: set(),
    programs.leave_a_group: set(),
    partial(programs.raise_on, [1]): {(1, "ValueError")},
    partial(programs.raise_on, [0, 1]): {(0, "ValueError"), (1, "ValueError")},
    partial(programs.die, 0, "SIGKILL"): {(0, "WorkerDied")},
    partial(programs.die, 1, "exit"): {(1, "WorkerDied")},
}


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(list(RUNS)), st.integers(2, 4)), max_size=4))
def test_no_run_reaches_into_a_later_one(cluster, runs):
    for run, world_size in runs:
        program, args = (run.func, run.args) if isinstance(run, partial) else (run, ())
        failed = set()
        try:
            cluster.run(program, *args, world_size=world_size)
        except RankFailures as error:
            failed = {(f.rank, f.kind) for f in error.failures}
        assert failed == RUNS[run]
    for world_size in (2, 4, 3):
        assert_usable(cluster, world_size)
        assert cluster.run(programs.send_and_receive, 3.0, world_size=2) == [3.0, 3.0]


DRIVER = """
import sys, os, signal
import cluster_programs as programs
from verify.cluster import open_cluster
if __name__ == "__main__":
    cluster = open_cluster("process", world_size=3, timeout=60)
    pids = cluster.run(programs.process_id, world_size=3)
    os.kill(pids[0], signal.SIGSTOP)
    from multiprocessing.forkserver import _forkserver
    print(*pids, _forkserver._forkserver_pid, flush=True)
    cluster.run(programs.hold_the_lock, 1, world_size=3)
"""


def test_nothing_outlives_a_killed_driver(tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    with subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    ) as driver:
        pids = [int(word) for word in driver.stdout.readline().split()]
        time.sleep(0.5)
        driver.kill()
    assert len(pids) == 4
    until = time.monotonic() + 10
    while (alive := [p for p in pids if Path(f"/proc/{p}").exists()]) and time.monotonic() < until:
        time.sleep(0.05)
    assert alive == []


dtypes = st.sampled_from(
    [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    plain | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(plain, inner, max_size=3)
        | st.frozensets(plain, max_size=3)
    ),
    max_leaves=8,
)


@given(values)
def test_values_come_back_equal(value):
    back = wire.decode(bytearray(wire.encode(value)))
    assert back == value
    assert type(back) is type(value)


@given(dtypes, st.lists(st.integers(0, 3), max_size=3), st.booleans())
def test_tensors_come_back_bit_for_bit(dtype, shape, transposed):
    tensor = torch.testing.make_tensor(shape, dtype=torch.float32, device="cpu").to(dtype)
    tensor = tensor.T if transposed and tensor.dim() == 2 else tensor
    back = wire.decode(bytearray(wire.encode({"x": [tensor, 1]})))["x"][0]
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (back, tensor) if t.numel()]
    assert not raw or torch.equal(*raw)


def test_the_things_of_this_project_travel():
    case = Case(concept="tp_mlp", layout=Layout(tp=2), shape={"hidden": 4}, options={"bias": True})
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    value = [case, torch.Size([1, 2]), torch.bfloat16, torch.device("cpu"), slice(1, None), 1 + 2j]
    assert wire.decode(bytearray(wire.encode(value))) == value
    back = wire.decode(bytearray(wire.encode((array, array[1, 1], programs.total))))
    assert np.array_equal(back[0], array)
    assert back[1:] == (array[1, 1], programs.total)
