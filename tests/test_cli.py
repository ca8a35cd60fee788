"""The command, run as people run it: what it prints, and its exit codes."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fake_targets  # noqa: F401  (is a target of these runs, and known to be importable)
import pytest

from verify.cli import cli, main
from verify.report import read

HERE = Path(__file__).parent
DEFECT = "group_targets:OtherOrder"
LEAST = ("--suite", "groups", "--max-examples", "6", "--max-world-size", "4")


def environment(**more):
    world = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
    kept = {name: value for name, value in os.environ.items() if name not in world}
    given = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "COLUMNS": "100", **more}
    return {**kept, **{name: str(value) for name, value in given.items()}}


def shardproof(*arguments, cwd, **more):
    command = [sys.executable, "-m", "verify", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment(**more), timeout=300
    )


def in_process(capsys, *arguments):
    """Exit code, stdout and stderr of the command in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


@pytest.fixture(scope="module")
def failed_run(tmp_path_factory):
    """A run of a target with a defect: where, and what it printed."""
    folder = tmp_path_factory.mktemp("failed")
    done = shardproof("run", "--target", DEFECT, *LEAST, cwd=folder)
    return folder, done


def test_a_right_target_opens_the_gate(tmp_path):
    done = shardproof("run", *LEAST, "--report", "out", "--seed", 5, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "shardproof: impl on sim, 3 properties, 6 examples each, seed 5"
    assert sum(line.startswith("passed         groups.") for line in lines) == 3
    assert re.fullmatch(r"passed: impl \S+, 18 examples over \d+ layouts in [\d.]+ s", lines[-3])
    assert re.fullmatch(r"pairs of values: \d+ exercised, \d+ missed", lines[-2])
    assert lines[-1] == "report: out/index.html"
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in done.stdout
    assert read(tmp_path / "out/report.json")["opens_gate"]


def test_a_wrong_target_closes_it_and_repro_shows_the_same_failure(failed_run):
    folder, done = failed_run
    assert (done.returncode, done.stderr) == (1, "")
    for internal in ("Traceback", "_pytest", "site-packages/hypothesis"):
        assert internal not in done.stdout
    path = "shardproof-report/failures/groups.every_rank_of_the_target_has_its_groups.json"
    start = done.stdout.index(f"{DEFECT}, groups: ")
    end = done.stdout.index(f"Replay: shardproof repro {path}")
    message = done.stdout[start:end]
    again = shardproof("repro", path, cwd=folder)
    assert (again.returncode, again.stderr) == (1, "")
    assert "fails again, in the same way:" in again.stdout
    assert message in again.stdout
    assert f"Replay: shardproof repro {path}" in again.stdout


def test_repro_of_a_run_with_another_target_and_cluster(failed_run):
    folder, _ = failed_run
    report = "shardproof-report/report.json"
    done = shardproof("repro", report, "--target", "impl", "--cluster", "process", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert f"note: recorded with target {DEFECT}, run again with impl" in done.stdout
    assert "note: recorded on cluster sim, run again on process" in done.stdout
    assert "groups.every_rank_of_the_target_has_its_groups passes now." in done.stdout


def test_repro_tells_which_versions_differ(failed_run, tmp_path, monkeypatch):
    from verify import provenance
    from verify.replay import Replay

    folder, _ = failed_run
    monkeypatch.setattr(provenance, "shardproof_version", lambda: "9.9")
    monkeypatch.syspath_prepend(str(HERE))
    replay = Replay.of(folder / "shardproof-report/report.json")
    assert any(re.fullmatch(r"shardproof \S+ then, 9.9 now", each) for each in replay.remarks)


def test_repro_refuses_what_has_nothing_to_run(failed_run, tmp_path, capsys):
    folder, _ = failed_run
    whole = (folder / "shardproof-report/report.json").read_text()
    changed = json.loads(whole)
    changed["failures"][0]["findings"][0]["case"]["seed"] = 1
    for text, words in (
        (whole[:200], "is truncated or no JSON"),
        ('{"a": 1}', "is not of shardproof"),
        (json.dumps(changed), "was changed after it was written"),
    ):
        path = tmp_path / "report.json"
        path.write_text(text)
        code, out, err = in_process(capsys, "repro", path)
        assert (code, out) == (2, "")
        assert err.startswith("shardproof: error: report: ")
        assert words in err
        assert err.count("\n") == 1


def test_repro_of_a_report_without_failures(tmp_path, capsys):
    from test_report import PASSED, facts

    from verify.report import describe_run, write

    write(tmp_path / "report.json", describe_run(facts(), [PASSED]))
    code, _, err = in_process(capsys, "repro", tmp_path / "report.json")
    assert code == 2
    assert "has no failing case to run again" in err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("run --target nobody", "target: 'nobody' is not one of impl, megatron-core"),
        ("run --target no.such:Thing", "cannot import no.such"),
        ("run --suite astrology", "--suite: 'astrology' is not one of"),
        ("run --profile slow", "--profile: 'slow' is not one of quick, ci, nightly, explore"),
        ("run --max-examples none", "--max-examples: 'none' is not a whole number from 1 up"),
        ("run --seed -3", "--seed: '-3' is not a whole number from 0 up"),
        ("run --cluster moon", "--cluster: 'moon' is not one of sim, process, torchrun"),
        ("run --cluster torchrun", "torchrun needs RANK"),
        ("run --cluster torchrun -n 2", "-n: the torchrun cluster is one world"),
        ("run -n many", "-n: 'many' is not a number of workers, nor auto"),
        ("run --lens blurred", "--lens: 'blurred' is not one of exact, fp64, native"),
        ("run --colour", "No such option"),
        ("walk", "No such command 'walk'"),
        ("repro", "Missing argument 'REPORT'"),
        ("repro nothing.json", "cannot read nothing.json: No such file"),
        ("layout --world-size 6 --tp 4", "must divide the number of ranks"),
        ("layout --world-size 4 --tp 2 --kind tq", "kind: 'tq' is not one of tp, cp"),
        ("layout --order tp-xp", "layout.order: 'tp-xp' is not a permutation"),
        ("layout --cp 4 --hierarchical-cp two", "--hierarchical-cp: 'two' is not a list"),
        ("layout --tp two", "'two' is not a valid integer"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(capsys, monkeypatch, command, words):
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    code, out, err = in_process(capsys, *command.split())
    assert (code, out) == (2, "")
    assert err.startswith("shardproof: error: ")
    assert err.count("\n") == 1
    assert words in err


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="must divide"):
        main(["layout", "--world-size", "6", "--tp", "4", "--debug"])


def test_a_defect_of_ours_is_one_line_too(capsys, monkeypatch):
    from verify.runner import listing

    monkeypatch.setattr(listing, "print_suites", lambda: {}["x"])
    code, _, err = in_process(capsys, "suites")
    assert code == 1
    assert err.startswith("shardproof: error: KeyError: 'x'")
    assert "--debug shows the traceback" in err
    assert err.count("\n") == 1


def test_the_layout_of_four_ranks(capsys):
    code, out, _ = in_process(
        capsys, "layout", "--world-size", 4, "--tp", 2, "--cp", 2, "--kind", "tp,cp"
    )
    assert code == 0
    assert re.search(r"^  tp +2 of 2 +\[0,1\] \[2,3\]$", out, re.MULTILINE)
    assert re.search(r"^  cp +2 of 2 +\[0,2\] \[1,3\]$", out, re.MULTILINE)
    assert "dp_cp" not in out
    assert "cp1   2   3" in out


def test_names_may_be_given_one_by_one(capsys):
    sizes = ("layout", "--world-size", 4, "--tp", 2, "--cp", 2)
    together = in_process(capsys, *sizes, "--kind", "tp,cp")
    assert in_process(capsys, *sizes, "--kind", "tp", "--kind", "cp") == together
    assert in_process(capsys, *sizes, "--kind", "cp") != together


def test_all_axes_of_a_large_layout(capsys):
    sizes = "--tp 8 --cp 2 --pp 4 --ep 8 --etp 1 --vpp 2 --optimizer-instances 2"
    code, out, _ = in_process(
        capsys, "layout", "--world-size", 1024, *sizes.split(), "--sequence-parallel",
        "--hierarchical-cp", "2,1", "--order", "tp-cp-ep-dp-pp",
    )  # fmt: skip
    assert code == 0
    assert "shortened: more than 64 ranks" in out
    assert "hcp_0" in out
    assert max(map(len, out.splitlines())) <= 100
    assert len(out.splitlines()) < 150


def test_the_suites_are_listed_with_what_they_say():
    done = shardproof("suites", cwd=HERE)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    at = lines.index("groups: Who belongs with whom: the process groups of every layout.")
    assert lines[at + 1] == "  every_rank_of_the_target_has_its_groups"
    assert lines[at + 2].startswith("    Laws 1 to ")
    assert max(map(len, lines)) <= 100


def test_the_targets_are_listed_with_their_versions():
    done = shardproof("targets", cwd=HERE)
    assert done.returncode == 0
    assert re.search(r"^impl +\d+\.\d+", done.stdout, re.MULTILINE)
    assert re.search(r"^megatron-core +(\d+\.\d+|-)", done.stdout, re.MULTILINE)
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_every_command_teaches_with_examples(capsys):
    for name in (None, *cli.commands):
        code, out, _ = in_process(capsys, *([name] if name else []), "--help")
        assert code == 0
        assert re.search(r"^ +(torchrun .*|shardproof) ", out, re.MULTILINE), name
        assert max(map(len, out.splitlines())) <= 100


def test_help_does_not_wait_for_torch():
    program = (
        "import sys, verify.cli\n"
        "try: verify.cli.main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'hypothesis', 'pytest', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_interrupt_leaves_a_report_of_what_is_known(tmp_path):
    arguments = ["run", "--max-examples", "100000", "--suite", "groups", "--report", "out"]
    command = [sys.executable, "-m", "verify", *arguments]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline().startswith("shardproof: impl on sim")
        time.sleep(8)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in out + err
    assert "unknown (the run did not finish): impl" in out
    document = read(tmp_path / "out/report.json")
    assert not document["finished"]
    assert {row["verdict"] for row in document["properties"]} == {"unknown"}
    assert document["properties"][0]["examples"] > 0
    assert (tmp_path / "out/index.html").exists()


def test_two_workers(tmp_path):
    done = shardproof("run", *LEAST, "-n", "2", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    document = read(tmp_path / "shardproof-report/report.json")
    assert document["options"]["workers"] == 2
    assert [row["examples"] for row in document["properties"]] == [6, 6, 6]


def test_settings_of_the_repository_it_runs_in_do_not_matter(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    (tmp_path / "conftest.py").write_text("raise RuntimeError('foreign')\n")
    assert shardproof("run", *LEAST, "--max-examples", "1", cwd=tmp_path).returncode == 0
    assert not (tmp_path / ".pytest_cache").exists()


def test_a_terminal_gets_bars_and_colours(tmp_path):
    command = [sys.executable, "-m", "verify", "run", *LEAST]
    driver, terminal = pty.openpty()
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(TERM="xterm"), stdout=terminal, stderr=terminal
    ) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                part = os.read(driver, 4096)
            except OSError:
                break
            shown += part
        os.close(driver)
    assert process.returncode == 0
    text = shown.decode()
    assert "\x1b[" in text
    assert re.search(r"properties.*[0-3]/3", text)
    assert "passed" in text


def test_torchrun_runs_it_on_rank_0_and_all_end_with_its_code(tmp_path):
    """As srun starts it; rank 0 prints, the others serve."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "verify", "run", "--cluster", "torchrun", "--suite", "groups",
             "--max-examples", "4", "--target", DEFECT],
            cwd=tmp_path,
            env=environment(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=4, MASTER_ADDR="127.0.0.1",
                            MASTER_PORT=port),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(4)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in ranks]
    assert [process.returncode for process in ranks] == [1] * 4
    assert "groups.every_rank_of_the_target_has_its_groups" in outputs[0][0]
    assert all(output == ("", "") for output in outputs[1:])
    document = read(tmp_path / "shardproof-report/report.json")
    assert document["cluster"] == {"name": "torchrun", "device": None, "max_world_size": 4}
    again = shardproof("repro", "shardproof-report/report.json", cwd=tmp_path)
    assert again.returncode == 1
    assert "note: recorded on cluster torchrun, run again on sim" in again.stdout
    assert "fails again, in the same way" in again.stdout
