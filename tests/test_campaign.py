"""Campaigns: their plan, their journal and their merged report; and whole ones on an embedded Ray,
of which workers and the driver are killed."""

import dataclasses
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console
from test_cli import DEFECT, environment, in_process, shardproof
from test_report import BROKEN, CASE, FAILED, FINDING, LISTED, PASSED, facts

from verify.campaign import alarms
from verify.campaign.document import Merge
from verify.campaign.driver import Campaign
from verify.campaign.engine import Outcome
from verify.campaign.journal import Journal
from verify.campaign.plan import Plan, Unit, parse_seeds
from verify.campaign.summary import page, print_summary, validate, write_campaign
from verify.errors import BadArgument
from verify.report import describe_run, read, write
from verify.runner.options import RunOptions
from verify.runner.record import KnownOutcome
from verify.targets import load_target
from verify.verdict import Verdict

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (the extra campaign)"
)
LEAST = ("--suite", "groups", "--max-examples", "20", "--max-world-size", "4", "-n", "2")


def plan(tmp_path, **changes):
    given = {"run": RunOptions(report=tmp_path), "suites": ("linear", "mlp"), "first": 0, "end": 3}
    return Plan(**{**given, **changes})


def document(tmp_path, *records, seed=0):
    """What a unit reports, as it is after its journey."""
    described = describe_run(facts(options=RunOptions(seed=seed)), list(records))
    write(tmp_path / "unit.json", described)
    return read(tmp_path / "unit.json")


def described(merge):
    made = merge.describe(seconds=1.0, finished=True, workers=2)
    write_campaign(merge.folder, made)
    validate(json.loads((merge.folder / "campaign.json").read_text()))
    return made


@pytest.mark.parametrize(("text", "seeds"), [("0:100", (0, 100)), ("7", (0, 7)), ("3:4", (3, 4))])
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--seeds 5:5", "--seeds: '5:5' is no range of seeds like 0:100"),
        ("--seeds many", "--seeds: 'many' is no range"),
        ("--seeds 5:3", "--seeds: '5:3' is no range"),
        ("-n 0", "-n: '0' is not a whole number from 1 up"),
        ("--unit-timeout soon", "--unit-timeout: 'soon' is not a whole number"),
        ("--cluster torchrun", "--cluster: a campaign starts its own processes"),
        ("--target nobody", "target: 'nobody' is not one of impl"),
    ],
)
def test_bad_usage_is_one_line(capsys, command, words):
    code, out, err = in_process(capsys, "campaign", *command.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_units_go_seed_by_seed(tmp_path):
    units = plan(tmp_path).units()
    assert units[:3] == [Unit("linear", 0), Unit("mlp", 0), Unit("linear", 1)]
    assert len(units) == 6
    assert plan(tmp_path).options(units[2]).seed == 1


def test_a_journal_is_gone_on_with(tmp_path):
    first = Journal(tmp_path / "c", plan(tmp_path), resume=False)
    reported = document(tmp_path, FAILED)
    first.finish(Unit("linear", 1), reported, {"a/b": "aGk="})
    first.lose(Unit("mlp", 0), "its worker was lost")
    first.close()
    with (tmp_path / "c/journal.jsonl").open("a") as stream:
        stream.write('{"unit": {"suite": "mlp", "se')
    second = Journal(tmp_path / "c", plan(tmp_path, end=9), resume=True)
    assert list(second.documents()) == [(Unit("linear", 1), reported)]
    assert second.examples() == {"a/b": "aGk="}
    second.finish(Unit("mlp", 1), reported, {})
    second.close()
    third = Journal(tmp_path / "c", plan(tmp_path), resume=True)
    assert list(third.done) == [Unit("linear", 1), Unit("mlp", 1)]


def test_a_journal_of_another_campaign_is_refused(tmp_path):
    Journal(tmp_path / "c", plan(tmp_path), resume=False).close()
    for folder, given, resume, words in (
        ("c", {}, False, "has a campaign; go on with --resume"),
        ("none", {}, True, "has no campaign; leave --resume out"),
        ("c", {"suites": ("mlp",)}, True, "is a campaign with --target impl"),
    ):
        with pytest.raises(BadArgument, match=words):
            Journal(tmp_path / folder, plan(tmp_path, **given), resume=resume)
    (tmp_path / "c/journal.jsonl").write_text("no JSON\n")
    with pytest.raises(BadArgument, match="no journal of a campaign, or damaged"):
        Journal(tmp_path / "c", plan(tmp_path), resume=True)


def test_one_failure_is_reported_once_whatever_seeds_find_it(tmp_path):
    merge = Merge(plan(tmp_path), tmp_path)
    other = dataclasses.replace(FINDING, case=dataclasses.replace(CASE, seed=9))
    both = dataclasses.replace(FAILED, findings=(other, FINDING))
    for seed, record in ((0, FAILED), (2, both), (1, FAILED)):
        merge.add(Unit("linear", seed), document(tmp_path, PASSED, record, seed=seed))
    made = described(merge)
    assert [(f["seeds"], f["file"]) for f in made["failures"]] == [
        ([0, 1, 2], "failures/linear.b.json"),
        ([2], "failures/linear.b-2.json"),
    ]
    assert made["verdict"] == "failed"
    rows = {row["property"]: row for row in made["properties"]}
    assert rows["linear.b"]["failed_seeds"] == [0, 1, 2]
    assert rows["linear.a"]["examples"] == 3 * PASSED.examples
    assert made["totals"] == {
        "units": 6, "done": 3, "lost_attempts": 0, "examples": 30, "layouts": 1, "failures": 2,
    }  # fmt: skip
    assert read(tmp_path / "failures/linear.b-2.json")["failures"][0]["findings"] == [
        other.to_json()
    ]
    merge.again("linear", document(tmp_path, FAILED))
    assert [f["again"] for f in described(merge)["failures"]] == [True, None]
    merge.again("linear", document(tmp_path, PASSED))
    assert [f["again"] for f in described(merge)["failures"]] == [False, False]
    assert "did not fail again" in page(described(merge), tmp_path)


def merge_that_knows_one(tmp_path):
    """A merge where what `LISTED` has is known."""
    head = f'target = "impl"\nversion = "{load_target("impl").version()}"\n'
    entry = '[[finding]]\nproperty = "linear.e"\nreason = "it is so"\nreference = "there"\n'
    (tmp_path / "known.toml").write_text(head + entry + 'words = ["sum over tp"]\n')
    run = RunOptions(report=tmp_path, known=tmp_path / "known.toml")
    return Merge(plan(tmp_path, run=run), tmp_path)


def test_what_is_known_is_told_once_for_its_cases_are_as_drawn(tmp_path):
    merge = merge_that_knows_one(tmp_path)
    (finding,) = LISTED.findings
    other = dataclasses.replace(finding, case=dataclasses.replace(CASE, seed=9))
    for seed, record in enumerate((LISTED, dataclasses.replace(LISTED, findings=(other,)))):
        merge.add(Unit("linear", seed), document(tmp_path, record, seed=seed))
    merge.again("linear", document(tmp_path, PASSED))
    assert [(f["seeds"], f["again"]) for f in described(merge)["failures"]] == [([0, 1], None)]
    assert merge.failing() == set()
    merge = Merge(plan(tmp_path), tmp_path)
    merge.add(Unit("linear", 0), document(tmp_path, LISTED))
    assert merge.failing() == {"linear"}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_what_stands_beside_a_known_failure_is_a_failure_of_its_own(tmp_path, order):
    merge = merge_that_knows_one(tmp_path)
    failed = dataclasses.replace(LISTED, verdict=Verdict.FAILED, reason="something else")
    unknown = dataclasses.replace(LISTED, verdict=Verdict.UNKNOWN, reason="it broke")
    records = (failed, LISTED, unknown)
    for seed in order:
        merge.add(Unit("linear", seed), document(tmp_path, records[seed], seed=seed))
    made = described(merge)
    assert sorted((f["verdict"], f["reason"], f["seeds"]) for f in made["failures"]) == [
        ("failed", "something else", [0]),
        ("failed (known)", "", [0, 1, 2]),
        ("unknown", "it broke", [2]),
    ]
    known = next(f for f in made["failures"] if f["finding"])
    assert known["verdict"] == "failed (known)"
    assert read(tmp_path / known["file"])["failures"][0]["verdict"] == "failed (known)"
    assert "linear.e: failed: something else" in page(made, tmp_path)
    assert merge.failing() == {"linear"}
    for record, again in ((failed, True), (LISTED, False)):
        merge.again("linear", document(tmp_path, record))
        told = {f["reason"]: f["again"] for f in described(merge)["failures"]}
        assert told == {"something else": again, "": None, "it broke": None}


def test_one_of_two_known_findings_of_one_reason_is_gone(tmp_path):
    run = RunOptions(report=tmp_path, known_strict=True)
    merge = Merge(plan(tmp_path, run=run), tmp_path)
    outcomes = [KnownOutcome("it is so", "there", s) for s in ("fails", "no longer fails")]
    record = dataclasses.replace(LISTED, known=tuple(outcomes))
    for seed in range(2):
        merge.add(Unit("linear", seed), document(tmp_path, record, seed=seed))
    made = described(merge)
    states = [each["state"] for each in made["properties"][0]["known"]]
    assert states == ["fails", "no longer fails"]
    assert not made["opens_gate"]


def test_what_is_run_once_more_is_told_as_that(tmp_path):
    run = RunOptions(report=tmp_path / "c")
    given = plan(tmp_path, run=run)
    journal = Journal(run.report, given, resume=False)
    console = Console(file=io.StringIO(), width=200)
    campaign = Campaign(given, journal, SimpleNamespace(workers=2), 60.0, console)
    unit = Unit("linear", 0, again=True)
    skipped = dataclasses.replace(BROKEN, reason="skipped: no example is kept")
    plain = dataclasses.replace(BROKEN, property="linear.f", verdict=Verdict.FAILED)
    campaign._take(Outcome(unit, document(tmp_path, FAILED, skipped, plain), {}))
    campaign._take(Outcome(unit, None, {}, lost="its worker died"))
    made = described(campaign.merge)
    assert [each["seed"] for each in made["lost"]] == [None]
    print_summary(console, made, tmp_path)
    said = console.file.getvalue()
    assert "done    linear once more: 2 properties have failing examples\n" in said
    assert "unknown: linear once more: its worker died\n" in said
    assert "<code>linear</code>, once more" in page(made, tmp_path)
    journal.close()


def test_false_alarms_are_made_again_from_each_seed_without_a_gap():
    counts = {2: 20, 1: 10, 7: 40, 3: 30}
    runs = [{"seed": seed, "options": [], "examples": count} for seed, count in counts.items()]
    one = {"seed": 1, "options": ["--suite", "norm"], "examples": 5}
    assert [line.strip() for line in alarms._commands(alarms._runs([*runs, one]))] == [
        "ci/false-alarms --examples 60 --first-seed 1",
        "ci/false-alarms --examples 100 --first-seed 7",
        "ci/false-alarms --examples 105 --first-seed 1 --suite norm",
    ]


def test_what_is_lost_or_not_finished_is_unknown_and_what_is_known_is_not(tmp_path):
    merge = Merge(plan(tmp_path), tmp_path)
    merge.add(Unit("linear", 0), document(tmp_path, PASSED, LISTED))
    assert (described(merge)["verdict"], described(merge)["opens_gate"]) == ("failed (known)", True)
    states = [each["state"] for each in described(merge)["properties"][1]["known"]]
    assert states == ["fails", "not seen"]
    assert not merge.describe(seconds=1, finished=False, workers=1)["opens_gate"]
    merge.lost[Unit("mlp", 0)] = "its worker was lost"
    assert (described(merge)["verdict"], described(merge)["opens_gate"]) == ("unknown", False)


@needs_ray
def test_a_campaign_loses_a_worker_and_tells_each_failure_once(tmp_path):
    target = "campaign_targets:Unlucky"
    done = shardproof(
        "campaign", "--target", target, *LEAST, "--seeds", "0:3", "--report", "out",
        cwd=tmp_path, UNLUCKY=tmp_path / "flag",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("WorkerCrashedError") == 1
    assert "; tried again" in done.stdout
    found = json.loads((tmp_path / "out/campaign.json").read_text())
    validate(found)
    assert found["finished"]
    assert found["totals"]["done"] == 3
    assert found["totals"]["lost_attempts"] == 1
    assert found["lost"] == []
    shown = [(f["property"], json.dumps(f["finding"]["case"])) for f in found["failures"]]
    assert len(set(shown)) == len(shown) == found["totals"]["failures"] > 0
    first = found["failures"][0]
    again = shardproof("repro", f"out/{first['file']}", "--target", DEFECT, cwd=tmp_path)
    assert f"{first['property']} fails again" in again.stdout


@needs_ray
def test_a_unit_without_a_worker_is_unknown_in_the_end(tmp_path):
    done = shardproof(
        "campaign", "--target", "campaign_targets:Doomed", *LEAST, "--seeds", "1", cwd=tmp_path
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("; tried again") == 2
    assert done.stdout.count("; given up") == 1
    found = json.loads((tmp_path / "shardproof-campaign/campaign.json").read_text())
    assert found["verdict"] == "unknown"
    assert [each["suite"] for each in found["lost"]] == ["groups"]


@needs_ray
def test_a_killed_driver_loses_nothing(tmp_path):
    arguments = ["campaign", "--target", DEFECT, *LEAST, "--seeds", "0:4", "--report", "out"]
    journal = tmp_path / "out/journal.jsonl"
    command = [sys.executable, "-m", "verify", *arguments]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as driver:  # fmt: skip
        while not list((tmp_path / "out/failures").glob("*.json")):
            assert driver.poll() is None
            time.sleep(0.05)
        os.kill(driver.pid, signal.SIGKILL)
    before = journal.read_text()
    done = shardproof(*arguments, "--resume", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "1 suites with failures once more" in done.stdout
    assert journal.read_text().startswith(before)
    units = [json.loads(line)["unit"]["seed"] for line in journal.read_text().splitlines()[1:]]
    assert sorted(units) == [0, 1, 2, 3]
    found = json.loads((tmp_path / "out/campaign.json").read_text())
    assert found["finished"]
    done_before = {json.loads(line)["unit"]["seed"] for line in before.splitlines()[1:]}
    tried = [f["again"] for f in found["failures"] if done_before & {*f["seeds"]}]
    assert True in tried
    assert False not in tried
    assert list((tmp_path / "out/examples").rglob("*"))
