"""The mutation score: workers, claims, what is said of a mutant, and the command as it is run."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
from test_cli import in_process, shardproof
from test_report import FAILED

from impl.buckets import lay_out
from impl.pipeline.schedules import build_schedule
from verify.errors import BadArgument
from verify.mutants import CATALOGUE
from verify.mutants.generated import generate
from verify.mutants.history import mutants_of
from verify.mutants.packages import modules_of
from verify.mutation.claims import Claim, claims
from verify.mutation.document import complaints, describe, validate
from verify.mutation.lines import Lines
from verify.mutation.outcome import Fate, Outcome, _Present, examine
from verify.mutation.pool import Lost, Pool, number_of_workers
from verify.mutation.trials import Surveyed, Trial, Trials
from verify.runner.options import RunOptions
from verify.verdict import Verdict

MUTANT = CATALOGUE["impl"]["gradients-averaged"]
GENERATED = generate("impl", ("gradients",))[0]
CAUGHT = Outcome(
    fate=Fate.CAUGHT, properties=("a.b", FAILED.property), examples=3, seconds=1.5, record=FAILED
)
SURVIVED = Outcome(fate=Fate.SURVIVED, properties=("a.b",), examples=100, seconds=9.0)
UNKNOWN = Outcome(fate=Fate.UNKNOWN, reason="no property is about it")


def test_workers_do_every_task_and_keep_what_they_have():
    tasks = dict.fromkeys(range(4), os.getpid)
    with Pool(1, timeout=120) as pool:
        started = []
        found = dict(pool.run(tasks, started=started.append))
    assert started == list(tasks)
    assert len(set(found.values())) == 1
    assert os.getpid() not in found.values()


def test_a_worker_that_has_needed_much_memory_is_replaced():
    tasks = dict.fromkeys(range(3), os.getpid)
    with Pool(1, timeout=120, memory=1) as pool:
        assert len(set(dict(pool.run(tasks)).values())) == 3


def test_a_lost_task_does_not_take_the_others_along():
    tasks = {
        "dies": functools.partial(os._exit, 3),
        "raises": functools.partial(int, "x"),
        "works": os.getpid,
    }
    with Pool(1, timeout=120) as pool:
        found = dict(pool.run(tasks))
        assert found["dies"] == Lost("its process ended with code 3")
        assert "ValueError" in found["raises"].reason
        assert isinstance(found["works"], int)
        pool.timeout = 1.0
        slow = dict(pool.run({"sleeps": functools.partial(time.sleep, 60)}))
    assert slow == {"sleeps": Lost("it did not end within 1 s")}


ASKS = """
import functools
from verify.mutation.pool import Pool

if __name__ == "__main__":
    with Pool(1, timeout=120) as pool:
        told = "import os, time; print(os.getpid(), flush=True); time.sleep(120)"
        dict(pool.run({"": functools.partial(exec, told)}))
"""


def test_a_worker_ends_with_the_process_that_asked(tmp_path):
    (tmp_path / "asks.py").write_text(ASKS)
    driver = subprocess.Popen([sys.executable, tmp_path / "asks.py"], stdout=subprocess.PIPE)
    with driver:
        worker = int(driver.stdout.readline())
        driver.kill()
    until = time.monotonic() + 20
    while (alive := Path(f"/proc/{worker}").exists()) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive


def test_the_number_of_workers():
    assert (number_of_workers(None), number_of_workers("3")) == (1, 3)
    assert number_of_workers("auto") >= 1
    for wrong in ("0", "-1", "two", ""):
        with pytest.raises(BadArgument, match="-n"):
            number_of_workers(wrong)


HISTORIC = mutants_of("impl", [((("collectives", 46), ("linear", 70)), "drop")])[0]


def named(mutant, surveyed):
    """The properties about a mutant, in their order."""
    return [each.property for each in claims(mutant, surveyed)]


def some(number):
    """The first examples of a property."""
    return frozenset(range(number))


def test_properties_about_a_mutant_come_before_costly_and_rare_ones():
    rare = Surveyed("rare", 10, 1.0, Counter(row_linear=1, copy_to_tp=9))
    often = Surveyed("often", 10, 1.0, Counter(row_linear=10))
    costly = Surveyed("costly", 10, 3.0, Counter(tp_mlp=10))
    other = Surveyed("other", 10, 1.0, Counter(copy_to_tp=10))
    empty = Surveyed("empty")
    assert named(MUTANT, [rare, other, empty, costly, often]) == ["often", "costly", "rare"]
    # What one check cannot see, another may.
    again = dataclasses.replace(often, property="again", seconds=2.0)
    kept = dataclasses.replace(costly, property="kept", check="memory")
    assert named(MUTANT, [again, kept, often]) == ["often", "kept", "again"]
    line = (GENERATED.module, GENERATED.lines[0])
    reached = [Surveyed("a", 2, 1.0, Counter(), {line: some(1)}), Surveyed("b", 2, 1.0)]
    assert named(GENERATED, reached) == ["a"]


def test_those_come_first_that_reach_what_a_mutant_changes():
    source = modules_of("impl")[MUTANT.module].read_text()
    (line,) = MUTANT.lines(source)
    assert source.splitlines()[line - 1].strip() == MUTANT.snippet
    concepts = Counter(row_linear=10)
    never = Surveyed("never", 10, 0.1, concepts)
    seldom, often = (
        Surveyed(name, 10, 1.0, concepts, {(MUTANT.module, line): some(count)})
        for name, count in (("seldom", 1), ("often", 9))
    )
    other = Surveyed("other", 10, 0.1, Counter(copy_to_tp=10), often.lines)
    assert named(MUTANT, [never, seldom, other, often]) == ["often", "seldom", "never"]
    always = Surveyed("always", 10, 2.0, concepts, {(MUTANT.module, line): some(10)})
    assert claims(MUTANT, [never, seldom, often, always]) == [
        Claim("often", telling=some(9)),
        Claim("always"),
        Claim("seldom", telling=some(1)),
        Claim("never", near=False),
    ]


def test_the_lines_of_every_mutant_are_found():
    for mutant in CATALOGUE["impl"].values():
        assert named(mutant, [Surveyed("any", 1, 1.0, Counter(mutant.caught_by))]) == ["any"]


def test_of_a_condition_for_a_refusal_those_come_first_that_are_refused():
    mutant = CATALOGUE["impl"]["kv-heads-not-checked"]
    source = modules_of("impl")[mutant.module].read_text()
    (line,) = mutant.lines(source)
    assert source.splitlines()[line].strip().startswith("raise ")
    concepts = Counter(dict.fromkeys(mutant.caught_by, 10))
    fits, refused = (
        Surveyed(name, 10, 1.0, concepts, {(mutant.module, line + n): some(10) for n in reached})
        for name, reached in (("fits", (0,)), ("refused", (0, 1)))
    )
    assert named(mutant, [fits, refused]) == ["refused", "fits"]


def test_only_examples_that_are_refused_tell_whether_a_refusal_is_left_out():
    mutant = next(m for m in generate("impl", ("dropout",)) if m.family == "accept")
    raising = {(mutant.module, mutant.lines[0] + 1): some(1)}
    fits = Surveyed("fits", 10, 1.0, Counter(), {(mutant.module, mutant.lines[0]): some(10)})
    refuses = dataclasses.replace(fits, property="refuses", refusals=1)
    raises = dataclasses.replace(fits, property="raises", lines={**fits.lines, **raising})
    assert named(mutant, [fits, refuses, raises]) == ["raises", "refuses"]
    assert named(dataclasses.replace(mutant, family="flip"), [fits]) == ["fits"]


def test_the_lines_of_a_mutant_are_those_it_changes():
    def lines(snippet, replacement):
        made = dataclasses.replace(MUTANT, snippet=snippet, replacement=replacement)
        return made.lines("a\nb\nc\nd\n")

    assert lines("b\nc\n", "b\nx\n") == [3]
    assert lines("b\nc\n", "b\n") == [3]
    assert lines("b\n", "b\nx\n") == [2, 3]
    assert lines("d\n", "d\nx\n") == [4]
    assert lines("b\nc\n", "x\ny\n") == [2, 3]


def test_an_example_that_ran_is_drawn_and_does_not_run_again():
    name = "linear.row_parallel_frozen"
    with Trials(RunOptions.parse({"max_examples": "6"})) as trials:
        whole = trials.run(name, target="impl")
        first = trials.run(name, target="impl", within=0.0)
        rest = trials.run(name, target="impl", after=1)
        two = trials.run(name, target="impl", only={1, 3})
        one = trials.run(name, target="impl", only={1, 3}, within=0.0)
    assert (whole.ended, first.ended, rest.ended) == (True, False, True)
    assert (first.record.examples, rest.record.examples) == (1, 6)
    assert (whole.ran, first.ran, rest.ran, two.ran) == (6, 1, 5, 2)
    assert (two.ended, two.record.examples) == (False, 4)
    assert (one.ran, one.record.examples) == (1, 3)
    assert 0 < two.record.compared < whole.record.compared
    assert rest.record.digest == whole.record.digest
    assert 0 < rest.record.compared == whole.record.compared - first.record.compared


class _Told:
    """Trials that say what they are told to: of each property the trials one after the other."""

    def __init__(self, **trials):
        self.trials, self.asked = {name: list(each) for name, each in trials.items()}, []

    def run(self, name, *, target, after, within, only):
        self.asked.append((name, after, only or within))
        return self.trials[name].pop(0)


def _trial(verdict, examples, *, ran=1, ended=False, reason="", broke=False):
    record = dataclasses.replace(
        FAILED, verdict=verdict, examples=examples, reason=reason, findings=()
    )
    return Trial(record, 0.5, ended, ran, broke)


def test_properties_take_turns_until_one_fails(monkeypatch):
    passed, failed, unknown = Verdict.PASSED, Verdict.FAILED, Verdict.UNKNOWN

    def examined(claim=None, every=False, **trials):
        told = _Told(**trials)
        monkeypatch.setattr(_Present, "trials", lambda *options, **more: told)
        claimed = [claim if claim and claim.property == n else Claim(n) for n in trials]
        return examine("impl", claimed, RunOptions(), shrink=False, every=every), told.asked

    found, asked = examined(
        a=[_trial(passed, 9, ran=9, ended=True)], b=[_trial(passed, 1), _trial(failed, 4, ran=3)]
    )
    assert asked == [("a", 0, 0.25), ("b", 0, 0.25), ("b", 1, 0.25)]
    assert (found.fate, found.properties, found.examples) == (Fate.CAUGHT, ("a", "b"), 13)
    found, _ = examined(a=[_trial(passed, 1), _trial(passed, 2, ended=True)])
    assert (found.fate, found.examples) == (Fate.SURVIVED, 2)
    nothing, last = _trial(unknown, 1), _trial(passed, 2, ended=True)
    assert examined(a=[nothing, last])[0].fate is Fate.SURVIVED
    assert examined(a=[nothing, _trial(unknown, 2, ended=True)])[0].fate is Fate.UNKNOWN
    ended = _trial(unknown, 2, ended=True, broke=True)
    assert examined(a=[_trial(passed, 1), ended])[0].fate is Fate.UNKNOWN
    # What fails first has caught it, and others run on where every one is to.
    trials = {
        "a": [_trial(passed, 1), _trial(failed, 2)],
        "b": [_trial(failed, 1)],
        "c": [_trial(passed, 4, ended=True)],
    }
    found, _ = examined(**trials, every=True)
    assert (found.caught_by, found.failing, found.examples) == ("b", ("b", "a"), 2)
    assert (found.properties, found.undecided) == (("a", "c", "b"), ())
    monkeypatch.setattr("verify.mutation.outcome._SECONDS_OF_EVERY", -1.0)
    trials["d"] = [_trial(unknown, 1, ended=True, broke=True)]
    found, _ = examined(**trials, every=True)
    assert (found.failing, found.undecided) == (("b",), ("a", "c", "d"))
    monkeypatch.undo()
    # What few examples reach is looked at with these, which may take several turns.
    telling = Claim("b", telling=some(2))
    seen = [_trial(passed, 1), _trial(passed, 2), _trial(passed, 3, ran=3, ended=True)]
    found, asked = examined(telling, b=seen)
    assert (found.fate, found.examples) == (Fate.SURVIVED, 5)
    assert asked == [("b", 0, some(2)), ("b", 0, {1}), ("b", 0, 0.5)]
    # What is not known to reach it waits for some rounds.
    found, asked = examined(
        Claim("a", near=False),
        a=[_trial(failed, 1)],
        b=[_trial(passed, number) for number in range(1, 5)],
    )
    assert (found.properties, found.examples) == (("b", "a"), 5)
    assert asked[2:] == [("b", 2, 0.5), ("b", 3, 1.0), ("a", 0, 2.0)]
    found, asked = examined(Claim("a", near=False), a=[_trial(failed, 1)])
    assert asked == [("a", 0, 0.25)]
    broken = _trial(unknown, 3, ended=True, reason="it broke")
    found, asked = examined(a=[broken], b=[_trial(passed, 5, ended=True)])
    assert (found.fate, found.reason, len(asked)) == (Fate.UNKNOWN, "a: it broke", 2)


def test_a_mutant_that_is_not_caught_in_time_is_unknown(monkeypatch):
    names = ["mlp.output_and_gradients", "linear.row_parallel"]
    claimed = list(map(Claim, names))
    found = examine("impl", claimed, RunOptions(), shrink=False, within=0.01)
    assert (found.fate, found.reason) == (Fate.UNKNOWN, "not caught within 0.01 s")
    told = _Told(a=[_trial(Verdict.PASSED, number) for number in range(1, 10)])
    monkeypatch.setattr(_Present, "trials", lambda *options, **more: told)
    found = examine("impl", [Claim("a")], RunOptions(), shrink=False, within=60.0)
    assert (found.fate, found.reason) == (Fate.UNKNOWN, "not caught within 60 s")
    monkeypatch.undo()
    soon = examine("impl@row-bias-before-sum", claimed[1:], RunOptions(), shrink=False, within=60.0)
    assert soon.fate is Fate.CAUGHT


def described(*examined):
    document = describe(
        examined,
        RunOptions(),
        target="impl",
        started="2026-01-01T00:00:00+00:00",
        seconds=3.0,
        workers=2,
        shrink=True,
        every=False,
        within=None,
    )
    validate(document)
    return document


def test_the_document_counts_and_scores():
    document = described((MUTANT, CAUGHT, ""), (GENERATED, SURVIVED, "It is."))
    assert document["total"] == {
        "mutants": 2,
        "caught": 1,
        "survived": 1,
        "unknown": 0,
        "equivalent": 1,
        "score": 0.5,
        "score_without_equivalent": 1.0,
        "median_seconds": 1.5,
        "worst_seconds": 1.5,
    }
    assert set(document["classes"]) == {MUTANT.family, GENERATED.family}
    row = document["mutants"][0]
    assert (row["caught_by"], row["case"]) == (FAILED.property, FAILED.findings[0].case.to_json())
    with pytest.raises(jsonschema.ValidationError):
        validate({**document, "mutants": [{**row, "caught_by": None}]})


def test_what_is_not_as_it_should_be():
    assert complaints(described((MUTANT, CAUGHT, ""), (GENERATED, SURVIVED, "It is."))) == []
    assert complaints(described((MUTANT, SURVIVED, ""))) == [f"{MUTANT.name} survived"]
    assert complaints(described((MUTANT, UNKNOWN, ""))) == [f"{MUTANT.name} is unknown"]
    assert complaints(described((GENERATED, UNKNOWN, "It is."))) == [f"{GENERATED.name} is unknown"]
    (said,) = complaints(described((GENERATED, CAUGHT, "It is.")))
    assert said == f"{GENERATED.name} is listed as equivalent, and {FAILED.property} fails"


def test_the_command_catches_a_mutant_and_writes_the_case_that_shows_it(tmp_path, capsys):
    names = "row-bias-before-sum,gradients-not-summed"
    given = ("--suite", "linear", "--max-examples", 30, "--report", "out")
    done = shardproof("mutants", "--name", names, *given, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 100
    said = " ".join(done.stdout.split())
    assert "2 of 2 mutants of impl caught, score 100.0%" in said
    document = json.loads((tmp_path / "out" / "mutants.json").read_text())
    validate(document)
    rows = {row["name"]: row for row in document["mutants"]}
    assert set(rows) == set(names.split(","))
    for name, row in rows.items():
        assert row["caught_by"].startswith("linear.")
        assert row["case"]["layout"]["tp"] > 1
        path = tmp_path / "out" / "failures" / f"{name}.json"
        code, said, _ = in_process(capsys, "repro", path)
        assert code == 1
        assert "fails again, in the same way" in said


def test_the_command_tells_which_properties_catch_what(tmp_path, capsys):
    names = "row-bias-before-sum,gradients-not-summed"
    given = ("--suite", "linear", "--max-examples", 10, "--no-shrink", "--every")
    written = tmp_path / "all.json"
    code, said, _ = in_process(capsys, "mutants", "--name", names, *given, "--json", written)
    assert code == 0
    assert max(map(len, said.splitlines())) <= 100
    document = json.loads(written.read_text())
    validate(document)
    for row in document["mutants"]:
        assert row["failing"][0] == row["caught_by"] == row["properties"][-1]
        assert set(row["failing"]) <= set(row["properties"])
    (bias,) = (row for row in document["mutants"] if row["name"] == "row-bias-before-sum")
    assert len(bias["properties"]) > len(bias["failing"]) > 1
    lines = [line.split() for line in said.splitlines()]
    failing = sum("linear.row_parallel" in row["failing"] for row in document["mutants"])
    assert ["linear.row_parallel", "2", str(failing)] in [line[:3] for line in lines]


def test_a_mutant_that_no_property_catches_closes_the_gate(tmp_path, capsys):
    given = ("--name", "row-bias-before-sum", "--suite", "linear", "--max-examples", 1)
    written = tmp_path / "all.json"
    code, said, _ = in_process(capsys, "mutants", *given, "--no-shrink", "--json", written)
    assert code == 1
    assert "row-bias-before-sum survived" in said
    (row,) = json.loads(written.read_text())["mutants"]
    assert (row["fate"], row["caught_by"], row["case"]) == ("survived", None, None)


def test_a_mutant_that_no_property_is_about_closes_the_gate(tmp_path):
    least = ("--max-examples", 2, "--no-shrink", "--json", "all.json")
    names = "row-bias-before-sum,groups-descending"
    done = shardproof("mutants", "--name", names, "--suite", "embedding", *least, cwd=tmp_path)
    assert done.returncode == 1
    document = json.loads((tmp_path / "all.json").read_text())
    assert [row["fate"] for row in document["mutants"]] == ["unknown", "unknown"]
    assert "row-bias-before-sum is unknown" in done.stdout


def test_properties_about_what_is_communicated_reach_its_lines():
    key = HISTORIC.place, HISTORIC.family
    rare = Surveyed("rare", 10, 1.0, communicated={key: frozenset({7})})
    often = Surveyed("often", 10, 1.0, communicated={key: some(10)})
    other = Surveyed("other", 10, 1.0, communicated={(HISTORIC.place, "repeat"): some(10)})
    # That some of its lines run says nothing of the place; all of them may do so by another path.
    inner, outer = ("impl.collectives", 46), ("impl.linear", 70)
    lines = Surveyed("lines", 10, 1.0, lines={inner: some(10)})
    apart = Surveyed("apart", 10, 1.0, lines={inner: some(1), outer: frozenset({7})})
    passing = Surveyed("passing", 10, 1.0, lines={inner: some(10), outer: frozenset({7})})
    found = claims(HISTORIC, [passing, rare, often, other, lines, apart])
    near = [Claim("often"), Claim("rare", telling=frozenset({7}))]
    assert found == [*near, Claim("passing", near=False)]


def test_what_does_not_fail_every_time_is_told(monkeypatch):
    reason = "it failed, and passed when it was run again"
    flaky = dataclasses.replace(FAILED, reason=reason)
    trials = SimpleNamespace(run=lambda *given, **named: Trial(flaky, 1.0, True, 1))
    monkeypatch.setattr(_Present, "trials", lambda *given, **named: trials)
    outcome = examine("impl", [Claim("a.b")], RunOptions(), shrink=False)
    assert (outcome.fate, outcome.reason) == (Fate.CAUGHT, reason)
    (row,) = described((MUTANT, outcome, ""))["mutants"]
    assert row["reason"] == reason


def test_generated_mutants_are_caught_by_properties_that_reach_them(tmp_path):
    chosen = ("--class", "drop-mask", "--module", "embedding,attention")
    given = ("--suite", "embedding", "--max-examples", 20, "--no-shrink", "--json", "all.json")
    done = shardproof("mutants", "--generated", *chosen, *given, cwd=tmp_path)
    document = json.loads((tmp_path / "all.json").read_text())
    fates = {row["module"]: set() for row in document["mutants"]}
    for row in document["mutants"]:
        fates[row["module"]].add((row["fate"], bool(row["properties"])))
    assert fates == {"impl.embedding": {("caught", True)}, "impl.attention": {("unknown", False)}}
    assert done.returncode == 1


def test_wrong_options_are_one_line(capsys):
    for arguments, words in (
        (("--name", "none"), "--name: 'none'"),
        (("--name", "a,,b"), "has an empty name"),
        (("--suite", "none"), "--suite: 'none'"),
        (("-n", "0"), "-n: '0'"),
        (("--sample", "0"), "Invalid value for '--sample'"),
        (("--within", "0"), "Invalid value for '--within'"),
        (("--profile", "none"), "--profile: 'none'"),
        (("--unlisted",), "give --generated or --history"),
        (("--history", "--name", "linear:1:drop"), "'linear:1' is no MODULE:LINE of a function"),
        (("--history", "--class", "lose"), "--class: 'lose'"),
        (("--json", "."), "File '.' is a directory"),
        (("--report", __file__), "is a file"),
    ):
        code, out, error = in_process(capsys, "mutants", *arguments)
        assert (code, out, error.count("\n")) == (2, "", 1)
        assert words in error


def test_a_mutant_that_does_not_fit_is_told_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr("verify.mutation.score._surveyed", lambda *given: pytest.fail("it surveys"))
    stale = dataclasses.replace(MUTANT, snippet="there is no such line")
    monkeypatch.setitem(CATALOGUE["impl"], MUTANT.name, stale)
    code, _, error = in_process(capsys, "mutants", "--name", MUTANT.name)
    assert code != 0
    assert f"mutant {MUTANT.name}: its snippet occurs 0 times" in error


def test_lines_are_seen_of_ranks_and_of_what_runs_here():
    with Lines("impl") as lines:
        build_schedule("1f1b", pp=2, vpp=1, microbatches=2).to_plain()
        here = {module for module, _ in lines.reached}
        lines.clear()
        sizes = {"bucket_size": 2, "parts": 2}
        rank = threading.Thread(target=lay_out, args=([3, 4],), kwargs=sizes)
        rank.start()
        rank.join()
    assert "impl.pipeline.schedules" in here
    assert {module for module, _ in lines.reached} == {"impl.buckets"}
    lines.clear()
    build_schedule("1f1b", pp=2, vpp=1, microbatches=2)
    assert not lines.reached


def test_an_idle_worker_that_died_is_replaced():
    with Pool(1, timeout=120) as pool:
        ((_, first),) = pool.run({"one": os.getpid})
        (idle,) = pool._idle
        os.kill(first, signal.SIGKILL)
        idle.process.join()
        ((_, second),) = pool.run({"two": os.getpid})
    assert isinstance(second, int)
    assert second != first
