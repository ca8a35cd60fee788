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
from verify.errors import BadArgument
from verify.layout import Layout
from verify.report import read, same
from verify.runner.draws import use_profile
from verify.runner.options import RunOptions
from verify.runner.recorder import Recorder

SUITES = ("--suite", "positions", "--max-examples", "5", "--max-world-size", "6")


def compared(*reports):
    """The exit code of the comparison, and what it says."""
    result = CliRunner().invoke(same.main, [str(each) for each in reports])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Reports of a suite: alone, spread over processes, and with another seed."""
    folder = tmp_path_factory.mktemp("runs")
    for name, how in (("alone", ()), ("spread", ("-n", "2")), ("other", ("--seed", "1"))):
        done = shardproof("run", *SUITES, *how, "--report", name, cwd=folder)
        assert done.returncode == 0, done.stdout
    return folder


def test_a_profile_draws_the_same_examples_alone_and_spread(runs):
    assert compared(runs / "alone", runs / "spread/report.json")[0] == 0
    document = read(runs / "alone/report.json")
    rows = document["properties"]
    assert (document["seed"], document["coverage"]["examples"]) == (0, 5 * len(rows))
    assert len({row["digest"] for row in rows}) > 1


def test_runs_of_another_seed_are_of_another_command_and_drew_otherwise(runs):
    code, said = compared(runs / "alone", runs / "other")
    assert code == 2
    assert "report: seed is 0 and 1; compare one command's" in said
    one, two = (read(runs / name / "report.json") for name in ("alone", "other"))
    found = [*same.differences(one, {**two, "seed": 0})]
    assert sum(": digest " in line for line in found) == len(one["properties"])
    assert any(line.startswith("coverage: layouts ") for line in found)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"verdict": "unknown"}, ": verdict passed, unknown"),
        ({"examples": 4}, ": examples 5, 4"),
        ({"digest": "ab"}, ", ab"),
        ({"left_out": {"why": 1}}, ": left_out {}, {'why': 1}"),
        ({"seconds": 1e9, "reason": "elsewhere"}, ""),
    ],
)
def test_whatever_of_a_property_is_not_the_same_is_told(runs, change, line):
    one = read(runs / "alone/report.json")
    first, *rest = one["properties"]
    found = [*same.differences(one, {**one, "properties": [{**first, **change}, *rest]})]
    assert len(found) == bool(line)
    assert all(each.startswith(first["property"]) and each.endswith(line) for each in found)


def test_a_property_that_was_not_run_and_other_coverage_are_told(runs):
    one = read(runs / "alone/report.json")
    first, *rest = one["properties"]
    found = [*same.differences(one, {**one, "properties": rest})]
    assert f"{first['property']}: verdict passed, None" in found
    other = {**one["coverage"], "examples": 7}
    (line,) = same.differences(one, {**one, "coverage": other})
    assert line == f"coverage: examples {one['coverage']['examples']}, 7"


def test_what_is_no_whole_report_is_not_compared(runs):
    one = read(runs / "alone/report.json")
    with pytest.raises(BadArgument, match="did not finish"):
        [*same.differences(one, {**one, "finished": False})]
    with pytest.raises(BadArgument, match="'shardproof failure' is not 'shardproof report'"):
        [*same.differences(one, {**one, "format": "shardproof failure"})]
    code, said = compared(runs / "alone", runs / "nowhere")
    assert code == 2
    assert "cannot read" in said


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
