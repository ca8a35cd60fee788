"""A run in `sim` without an adversary and the same in torchrun's world: the same verdicts, smallest
cases and exit code; and a rank that dies ends the run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import environment, shardproof
from test_torchrun import TORCHRUN, free_port

from verify.cluster.torchrun import EXIT_WORLD_LOST
from verify.report import read

SAME = ("--target", "impl@reduce-sums-the-gradient", "--suite", "mappings", "--max-examples", "6",
        "--max-world-size", "4", "--no-adversary", "--seed", "2")  # fmt: skip
HISTORY = "mappings.communication_and_memory"


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """The reports of the run in sim and under torchrun, whose exit codes are 1."""
    folder = tmp_path_factory.mktemp("parity")
    alone = shardproof("run", *SAME, "--report", "sim", cwd=folder)
    command = [*TORCHRUN, "--nproc-per-node=4", "-m", "verify", "run", "--cluster", "torchrun"]
    spread = subprocess.run(
        [*command, *SAME, "--report", "torchrun"],
        capture_output=True, text=True, cwd=folder, env=environment(), timeout=500,
    )  # fmt: skip
    assert alone.returncode == 1, alone.stderr
    assert spread.returncode == 1, spread.stderr
    assert spread.stdout.count("shardproof: impl@reduce-sums-the-gradient on torchrun") == 1
    return [read(folder / name / "report.json") for name in ("sim", "torchrun")]


def test_a_failure_shrinks_to_the_same_case(documents):
    assert [each["cluster"]["name"] for each in documents] == ["sim", "torchrun"]
    assert [each["options"]["adversary"] for each in documents] == [False, False]
    # sim alone has a history of communication to check.
    found = [
        [each for each in document["failures"] if each["property"] != HISTORY]
        for document in documents
    ]
    assert found[0]
    names = [[each["property"] for each in failures] for failures in found]
    assert names[0] == names[1], [each["findings"] for each in found[1]]
    for one, other in zip(*found, strict=True):
        assert [f["case"] for f in one["findings"]] == [f["case"] for f in other["findings"]]


def test_the_same_is_drawn_and_said(documents):
    alone, spread = documents
    for part in ("verdict", "opens_gate", "finished", "seed"):
        assert alone[part] == spread[part]
    rows = [
        {
            row["property"]: [row[part] for part in ("verdict", "examples", "layouts", "lenses")]
            for row in document["properties"]
            if row["property"] != HISTORY
        }
        for document in documents
    ]
    assert rows[0] == rows[1]
    assert {"passed", "failed"} <= {verdict for verdict, *_ in rows[0].values()}


def test_a_rank_that_dies_ends_the_run(tmp_path):
    port = free_port()
    command = ["-m", "verify", "run", "--cluster", "torchrun", "--suite", "groups"]
    ranks = [
        subprocess.Popen(
            [sys.executable, *command, "--max-examples", "100000"],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1",
                            MASTER_PORT=port),
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        assert ranks[0].stdout.readline().startswith("shardproof: impl on torchrun")
        time.sleep(1)
        os.kill(ranks[1].pid, signal.SIGKILL)
        out, err = ranks[0].communicate(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode in (1, EXIT_WORLD_LOST)
    assert "rank 1" in out + err
    assert "Traceback" not in err
    document = json.loads(Path(tmp_path, "shardproof-report/report.json").read_text())
    assert not document["opens_gate"]
