"""The torchrun cluster, in worlds that torchrun starts, and in worlds started as srun would."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from verify.cluster import open_cluster
from verify.cluster.place import Place
from verify.cluster.torchrun import EXIT_WORLD_LOST
from verify.errors import BadArgument

MAIN = Path(__file__).parent / "torchrun_main.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
BATTERY = [
    [[1.0] * 3] * 1,
    [[10.0] * 3] * 4,
    [[3.0] * 3] * 2,
    [[6.0] * 3] * 3,
    ["RankFailures", [1, "ValueError"], [2, "ValueError"]],
    ["RankFailures", [0, "WorkerDied"]],
    ["RankFailures", [2, "WorkerDied"]],
    ["RankFailures", [2, "WorkerDied"]],
    ["RankFailures", [1, "Unresponsive"]],
    ["Deadlock", [0, "Unfinished"], [2, "Unfinished"]],
    ["RankFailures", [1, "Unresponsive"]],
]
WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def environment(**variables: object) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in WORLD}
    return {**kept, "OMP_NUM_THREADS": "1", **{name: str(v) for name, v in variables.items()}}


def start(command: list, **variables: object) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def world(mode: str, ranks: range = range(4), size: int = 4) -> Iterator[list[subprocess.Popen]]:
    """A world as srun starts it: one process a task, nobody who watches over them."""
    port = free_port()
    tasks = [
        start(
            [sys.executable, MAIN, mode],
            SLURM_PROCID=rank,
            SLURM_NTASKS=size,
            SLURM_LOCALID=rank,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in ranks
    ]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.kill()
            task.communicate()


def ended(task: subprocess.Popen, within: float = 60) -> tuple[int, str, str]:
    out, err = task.communicate(timeout=within)
    return task.returncode, out, err


def test_under_torchrun_every_failure_is_named_and_the_world_goes_on():
    code, out, err = ended(start([*TORCHRUN, "--nproc-per-node=4", MAIN, "battery"]), 180)
    assert code == 0, err
    assert [json.loads(line) for line in out.splitlines()] == [BATTERY]


def test_two_agents_make_one_world():
    port = free_port()
    agents = [
        start(
            [
                *TORCHRUN,
                "--nnodes=2",
                "--nproc-per-node=2",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint=127.0.0.1:{port}",
                "--rdzv-id=shardproof",
                MAIN,
                "battery",
            ]
        )
        for _ in range(2)
    ]
    results = [ended(agent, 180) for agent in agents]
    assert [code for code, _, _ in results] == [0, 0], results
    lines = [json.loads(line) for _, out, _ in results for line in out.splitlines()]
    assert lines == [BATTERY]


@pytest.mark.parametrize("other", ["process", "sim"])
def test_a_failing_property_shrinks_to_the_same_case_as_elsewhere(other):
    code, out, err = ended(start([*TORCHRUN, "--nproc-per-node=4", MAIN, "property"]), 180)
    assert code == 0, err
    told = json.loads(out)
    assert told["minimal"] == [2, [0, 0]]
    code, out, err = ended(start([sys.executable, MAIN, "property", other]), 180)
    assert code == 0, err
    assert json.loads(out) == told


def test_a_world_of_slurm_tasks():
    with world("property") as tasks:
        results = [ended(task, 120) for task in tasks]
    assert [code for code, _, _ in results] == [0, 0, 0, 0], results
    assert json.loads(results[0][1])["minimal"] == [2, [0, 0]]
    assert [out for _, out, _ in results[1:]] == ["", "", ""]


def lose(rank: int) -> tuple[list[tuple[int, str, str]], list[int]]:
    """Kill one task of a busy world: how every task ended, and the workers' process ids."""
    with world("endless") as tasks:
        pids = json.loads(tasks[0].stdout.readline())
        time.sleep(0.3)
        tasks[rank].kill()
        results = [ended(task) for task in tasks]
    return results, pids


def assert_gone(pids: list[int]) -> None:
    until = time.monotonic() + 5
    while (alive := [p for p in pids if Path(f"/proc/{p}").exists()]) and time.monotonic() < until:
        time.sleep(0.05)
    assert alive == []


def test_a_lost_rank_ends_the_run_on_all_ranks():
    results, pids = lose(2)
    codes = [code for code, _, _ in results]
    assert codes == [1, EXIT_WORLD_LOST, -signal.SIGKILL, EXIT_WORLD_LOST]
    assert f"WorldLost: rank 2 on {socket.gethostname()} is gone" in results[0][2]
    for rank in (1, 3):
        assert results[rank][2].startswith(f"shardproof: rank {rank} ends: rank 2 on ")
        assert "Traceback" not in results[rank][2]
    assert_gone(pids)


def test_losing_rank_0_ends_the_run_on_all_ranks():
    results, pids = lose(0)
    assert [code for code, _, _ in results] == [-signal.SIGKILL, *[EXIT_WORLD_LOST] * 3]
    assert all(err.endswith("rank 0 is gone\n") for _, _, err in results[1:])
    assert_gone(pids)


@pytest.mark.parametrize("present", [range(3), range(1, 4)])
def test_a_rank_that_never_comes_ends_the_run_on_all_ranks(present):
    with world("absent", present) as tasks:
        results = [ended(task) for task in tasks]
    assert all(code != 0 for code, _, _ in results), results
    assert all("3" in err for _, _, err in results)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"])
def test_a_world_that_nobody_started_is_one_line(monkeypatch, missing):
    for name, value in zip(WORLD, ("0", "1", "0", "localhost", "1", ""), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(BadArgument, match=rf"^cluster: torchrun needs {missing}") as caught:
        open_cluster("torchrun", world_size=1)
    assert "\n" not in str(caught.value)


def test_torchrun_variables_come_before_slurm_ones(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("SLURM_PROCID", "5")
    assert Place.from_environment() == Place(3, 3, 3, "node7")
