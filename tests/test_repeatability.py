"""Two runs of one profile have the same verdicts and the same examples, however they are spread."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from test_cli import shardproof

from verify.campaign import alarms
from verify.case import Case
from verify.layout import Layout
from verify.report import read
from verify.runner.draws import use_profile
from verify.runner.options import RunOptions
from verify.runner.recorder import Recorder

SUITES = ("--suite", "positions", "--max-examples", "5", "--max-world-size", "6")


def _rows(report):
    document = read(report / "report.json")
    kept = ("verdict", "examples", "digest", "compared", "layouts", "lenses", "not_supported")
    rows = {row["property"]: {name: row[name] for name in kept} for row in document["properties"]}
    return rows, document["coverage"], document["seed"]


def test_a_profile_draws_the_same_examples_alone_and_spread(tmp_path):
    runs = []
    for name, workers in (("alone", ()), ("spread", ("-n", "2"))):
        done = shardproof("run", *SUITES, *workers, "--report", name, cwd=tmp_path)
        assert done.returncode == 0, done.stdout
        runs.append(_rows(tmp_path / name))
    assert runs[0] == runs[1]
    rows, coverage, seed = runs[0]
    assert (seed, coverage["examples"]) == (0, 5 * len(rows))
    assert len({row["digest"] for row in rows.values()}) > 1


def _digest(*cases):
    recorder = Recorder("suite.one", must_check=False, on_example=lambda name, count: None)
    for case in cases:
        with recorder.example({"case": case}):
            pass
    return recorder.conclude().digest


def test_a_digest_is_of_all_that_is_drawn_in_order():
    one = Case(concept="norm", layout=Layout(tp=2))
    others = [replace(one, seed=1), replace(one, dtype="float32"), replace(one, layout=Layout())]
    digests = [_digest(), _digest(one), *(_digest(other) for other in others)]
    digests += [_digest(one, others[0]), _digest(others[0], one)]
    assert len(set(digests)) == len(digests)
    assert _digest(one, others[0]) == digests[-2]


def test_no_example_is_drawn_because_it_is_small():
    undo, drawn = use_profile(RunOptions.parse({"max_examples": "60"})), []
    try:

        @given(each=st.tuples(*[st.integers(0, 99)] * 4))
        def draws(each):
            drawn.append(each)

        draws()
    finally:
        undo()
    assert len(drawn) == len(set(drawn)) == 60
    assert [each for each in drawn if each.count(0) > 2] == [(0, 0, 0, 0)]


def test_an_example_of_several_checks_is_one_example():
    case = Case(concept="norm", layout=Layout(tp=2))
    recorder = Recorder("suite.one", must_check=True, on_example=lambda name, count: None)
    for checks in (("communication", "memory"), ("equivalence",)):
        with recorder.example({"case": case}):
            for check in checks:
                recorder.reached(check, case)
                recorder.checked(check, case, compared=3)
    found = recorder.conclude()
    assert (found.examples, found.compared) == (2, 9)
    for counts in (found.layouts, found.arithmetic, found.rows):
        assert list(counts.values()) == [2]


def _line(seed, options, count=30, bad=()):
    return {
        "seed": seed, "options": list(options), "commit": "abc",
        "target": "impl 1", "platform": "here", "versions": {}, "seconds": 60.0, "properties": 2,
        "examples": count, "compared": 100, "arithmetic": {"fp64 float64": count},
        "concepts": {"norm": count}, "layouts": ["1 rank"],
        "pairs": {"exercised": 5, "missed": 1, "undecided": 0},
        "alarms": [{"property": name, "verdict": "failed", "said": ""} for name in bad],
    }  # fmt: skip


@pytest.fixture
def count(tmp_path, monkeypatch):
    """Count false alarms with seeds that come from `_line`; what it returned, and what ran."""
    ran = []

    def one(seed, options, workers, folder):
        ran.append(seed)
        line = _line(seed, options, bad=["norm.is"] * (seed == 3))
        folder.mkdir(exist_ok=True)
        with (folder / "journal.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        return line

    monkeypatch.setattr(alarms, "_one_seed", one)

    def run(*arguments):
        places = ["--folder", str(tmp_path / "f"), "--summary", str(tmp_path / "s.md")]
        return CliRunner().invoke(alarms.main, [*places, *arguments]), ran

    return run


def test_false_alarms_are_counted_until_there_are_enough_examples_and_resumed(count, tmp_path):
    result, ran = count("--examples", "50")
    assert (result.exit_code, ran) == (0, [1, 2])
    summary = (tmp_path / "s.md").read_text()
    assert "60 examples on the unmodified impl 1: no alarms." in summary
    with (tmp_path / "f/journal.jsonl").open("a") as journal:
        journal.write('{"seed": 3, "opt')
    result, ran = count("--examples", "100")
    assert (result.exit_code, ran) == (1, [1, 2, 3, 4])
    summary = (tmp_path / "s.md").read_text()
    assert "120 examples" in summary
    assert "- seed 3, norm.is: failed" in summary
    assert json.loads((tmp_path / "s.json").read_text())["runs"][0]["seeds"] == [1, 2, 3, 4]


def test_a_folder_goes_on_with_other_options(count, tmp_path):
    count("--examples", "20")
    result, ran = count("--examples", "50", "--suite", "norm,mlp")
    assert (result.exit_code, ran) == (0, [1, 1])
    summary = (tmp_path / "s.md").read_text()
    assert "60 examples on the unmodified impl 1: no alarms." in summary
    command = "ci/false-alarms --examples {} --first-seed 1 --target impl --max-examples 50"
    assert f"    {command.format(30)}\n" in summary
    assert f"    {command.format(60)} --suite norm,mlp\n" in summary
    assert "| all | 1 | 30 |\n| norm, mlp | 1 | 30 |\n" in summary
    assert "pairs" not in summary
    result, _ = count("--examples", "80", "--require-pairs")
    assert result.exit_code == 1
    summary = (tmp_path / "s.md").read_text()
    assert f"    {command.format(90)} --require-pairs\n" in summary
    assert "\nWith seed 1, pairs of values: 5 exercised, 1 missed.\n" in summary


def test_what_failed_is_kept_when_the_same_seed_is_run_with_other_options(tmp_path, monkeypatch):
    def run(command, stdout, **given):
        report = Path(command[command.index("--report") + 1])
        bad = "7" not in command
        report.mkdir()
        document = {"seed": 1, "finished": True, "bad": bad}
        (report / "report.json").write_text(json.dumps(document))
        stdout.write("what was said")
        return subprocess.CompletedProcess(command, int(bad))

    monkeypatch.setattr(alarms.subprocess, "run", run)
    monkeypatch.setattr(alarms, "read", lambda path: json.loads(path.read_text()))
    monkeypatch.setattr(
        alarms,
        "line_of",
        lambda document, options: _line(1, options, bad=["norm.is"] * document["bad"]),
    )
    folder = tmp_path / "f"
    alarms._one_seed(1, ["--max-examples", "50"], "1", folder)
    kept = {path.name for path in folder.iterdir()} - {"journal.jsonl"}
    assert len(kept) == 2
    alarms._one_seed(1, ["--max-examples", "7"], "1", folder)
    assert {path.name for path in folder.iterdir()} == {*kept, "journal.jsonl"}


def test_a_folder_of_another_target_is_refused(count, tmp_path):
    count("--examples", "20")
    result, _ = count("--examples", "20", "--target", "other")
    assert result.exit_code == 2
    assert "is of another target" in result.output
    (tmp_path / "f/journal.jsonl").write_text("[1]\n")
    result, _ = count("--examples", "20")
    assert result.exit_code == 2
    assert "is no journal" in result.output


@pytest.mark.parametrize(
    ("seeds", "said"),
    [([], "none"), ([4], "4"), ([3, 1, 2], "1 to 3"), ([7, 1, 2, 9, 8, 4], "1 to 2, 4, 7 to 9")],
)
def test_seeds_are_told_by_their_ranges(seeds, said):
    assert alarms._ranges(seeds) == said
