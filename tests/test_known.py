"""Known findings: the file, and what a run makes of it."""

import dataclasses
import json

import pytest
from test_cli import in_process
from test_pytest_plugin import EQUIVALENCE, properties, report, row, text  # noqa: F401
from test_report import CASE, FAILED, FINDING, PASSED

from verify.errors import BadArgument, HarnessError
from verify.known import KnownFinding, KnownFindings
from verify.report import read
from verify.runner.record import Record
from verify.runner.recorder import Recorder, Undecided
from verify.verdict import Judgement, Verdict

pytest_plugins = ["pytester"]

HEAD = 'target = "impl"\nversion = "1"\n'
ENTRY = '[[finding]]\nproperty = "linear.b"\nreason = "it does"\nreference = "there"\n'
KNOWN = KnownFinding(property="linear.b", reason="it does", reference="there")
# fake_row over two ranks, which shows that their sum is missing.
SHOWS = dataclasses.replace(
    CASE,
    concept="fake_row",
    layout=dataclasses.replace(CASE.layout, tp=2, dp=1),
    shape={"sequence": 1, "batch": 2, "in_features": 4, "out_features": 2},
)


def read_text(tmp_path, content):
    path = tmp_path / "known.toml"
    path.write_text(content)
    return KnownFindings.read(path, target="impl", version="1")


def apply(record, *findings, now=None):
    return KnownFindings(findings).applied(record, lambda check, case: now)


def states(record):
    return [each.state for each in record.known]


def test_a_file_reads_as_written(tmp_path):
    case = json.dumps(CASE.to_json())
    more = f"words = [\"sum\"]\npattern = \"tp.\"\ncheck = \"equivalence\"\ncase = '''{case}'''\n"
    expected = dataclasses.replace(
        KNOWN, words=("sum",), pattern="tp.", check="equivalence", case=CASE
    )
    assert read_text(tmp_path, HEAD + ENTRY + ENTRY + more).findings == (KNOWN, expected)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("target = ", "is no TOML"),
        (HEAD, "lacks finding; its fields are target, version, finding"),
        (HEAD + "finding = 3", "write each finding under"),
        (HEAD + "finding = [3]", "finding 1: it is no table"),
        (HEAD.replace("impl", "fork") + ENTRY, "is of target 'fork', this run of 'impl'"),
        (HEAD.replace("1", "2") + ENTRY, "is of version '2', this run of '1'"),
        (HEAD + ENTRY + "words = 'sum'", "finding 1: words: 'sum' is no list of texts"),
        (HEAD + ENTRY + "words = ['']", "is no list of texts"),
        (HEAD + ENTRY + "pattern = 'ep('", "finding 1: pattern: 'ep(' is no regular expression"),
        (HEAD + ENTRY + "colour = 1", "finding 1 has colour; its fields are property, reason"),
        (HEAD + ENTRY.replace('"there"', "3"), "reference: 3 is no text"),
        (HEAD + ENTRY + "check = 'equivalence'", "give check and case together"),
        (HEAD + ENTRY + "check = 'equal'\ncase = '{}'", "finding 1: check: 'equal' is not one of"),
        (HEAD + ENTRY + "check = 'equivalence'\ncase = '{}'", "as JSON: case: missing fields"),
        (HEAD + ENTRY + "check = 'equivalence'\ncase = '{'", "as JSON: Expecting property name"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, content, words):
    with pytest.raises(BadArgument) as caught:
        read_text(tmp_path, content)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"--known: {tmp_path}/known.toml")
    assert "\n" not in str(caught.value)


def test_a_failure_is_known_where_all_of_it_is_explained():
    whole = apply(FAILED, KNOWN)
    assert (whole.verdict, states(whole)) == (Verdict.KNOWN, ["fails"])
    assert whole.findings == FAILED.findings
    worded = dataclasses.replace(KNOWN, words=("row_linear on tp2-dp2", "the sum over tp"))
    assert apply(FAILED, worded).verdict is Verdict.KNOWN
    for pattern, verdict in ((r"on tp\d-dp", Verdict.KNOWN), (r"on \S*-tp", Verdict.FAILED)):
        ordered = dataclasses.replace(worded, pattern=pattern)
        assert apply(FAILED, ordered).verdict is verdict
    other = dataclasses.replace(KNOWN, words=("the sum over cp",))
    assert apply(FAILED, other).verdict is Verdict.FAILED
    assert states(apply(FAILED, other)) == ["not seen"]
    assert apply(FAILED, dataclasses.replace(KNOWN, property="linear.c")) == FAILED


def test_one_unknown_failure_beside_a_known_one_fails():
    second = dataclasses.replace(
        FINDING, kind="crash", divergences=(), explanations=(), details=("no",)
    )
    both = dataclasses.replace(FAILED, findings=(FINDING, second))
    missing_sum = dataclasses.replace(KNOWN, words=("the sum over tp",))
    assert apply(both, missing_sum).verdict is Verdict.FAILED
    crash = dataclasses.replace(KNOWN, words=("crash", "the target raised"))
    assert apply(both, missing_sum, crash).verdict is Verdict.KNOWN
    assert states(apply(FAILED, crash, missing_sum)) == ["not seen", "fails"]
    flaky = dataclasses.replace(FAILED, reason="it does not fail every time that it is run")
    assert apply(flaky, missing_sum).verdict is Verdict.FAILED


def test_only_a_case_tells_that_a_finding_is_gone():
    passed = dataclasses.replace(PASSED, property="linear.b[x]")
    recorded = dataclasses.replace(KNOWN, words=("sum",), check="equivalence", case=CASE)
    for known, now, state in (
        (KNOWN, Judgement(Verdict.PASSED), "not seen"),
        (recorded, None, "not seen"),
        (recorded, Judgement(Verdict.NOT_SUPPORTED), "not seen"),
        (recorded, Judgement(Verdict.PASSED), "no longer fails"),
        (recorded, Judgement(Verdict.FAILED, "", FINDING), "fails when its case is run"),
    ):
        found = apply(passed, known, now=now)
        assert (found.verdict, states(found)) == (Verdict.PASSED, [state])
    worse = apply(passed, dataclasses.replace(recorded, words=("deadlock",)),
                  now=Judgement(Verdict.FAILED, "", FINDING))  # fmt: skip
    assert (worse.verdict, worse.findings) == (Verdict.FAILED, (FINDING,))
    broken = apply(passed, recorded, now=Judgement(Verdict.UNKNOWN, "HarnessError"))
    assert broken.verdict is Verdict.UNKNOWN


def test_each_of_two_known_findings_of_one_reason_shows():
    entries = [dataclasses.replace(KNOWN, words=(word,)) for word in ("sum over tp", "deadlock")]
    second = dataclasses.replace(FINDING, kind="deadlock", divergences=(), explanations=())
    known, recorder = KnownFindings(tuple(entries)), recorder_of_an_example()
    for each in (FINDING, FINDING, second):
        recorder.failed_as_known(known.number("linear.b", each), each)
    record = apply(recorder.conclude(), *entries)
    assert (record.findings, states(record)) == ((FINDING, second), ["fails", "fails"])


def recorder_of_an_example():
    recorder = Recorder("linear.b", must_check=True, on_example=lambda *told: None)
    with recorder.example({}):
        recorder.checked("equivalence", CASE, 1)
    return recorder


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (None, Verdict.KNOWN),
        (AssertionError("something else"), Verdict.FAILED),
        (Undecided(HarnessError("it broke")), Verdict.UNKNOWN),
    ],
    ids=lambda each: type(each).__name__,
)
def test_what_is_known_is_told_whatever_comes_after_it(error, verdict):
    recorder = recorder_of_an_example()
    with recorder.example({}):
        recorder.failed_as_known(0, FINDING)
    entry = dataclasses.replace(KNOWN, words=("the sum over tp",))
    record = apply(recorder.conclude(error), entry)
    assert (record.verdict, record.findings, states(record)) == (verdict, (FINDING,), ["fails"])
    assert (str(error) in record.traceback) is (error is not None)
    cut = apply(recorder.interrupted(), entry)
    assert (cut.verdict, cut.reason, states(cut)) == (Verdict.UNKNOWN, "interrupted", ["fails"])


@pytest.mark.parametrize(
    ("error", "verdict", "said"),
    [
        (AssertionError("something else"), Verdict.FAILED, "something else"),
        (TypeError("no number"), Verdict.UNKNOWN, "TypeError: no number"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_property_that_is_interrupted_while_it_shrinks_says_how_it_failed(error, verdict, said):
    recorder = recorder_of_an_example()
    with pytest.raises(type(error)), recorder.example({}):
        raise error
    with recorder.example({}):
        pass
    cut = recorder.interrupted()
    assert (cut.verdict, cut.reason) == (verdict, f"{said}\ninterrupted")
    assert said in cut.traceback


def test_what_is_unknown_stays_so():
    record = Record(property="linear.b", verdict=Verdict.UNKNOWN, reason="it broke")
    assert apply(record, KNOWN) == record


@pytest.fixture
def listed(properties, pytester):  # noqa: F811
    """Run a suite of which a finding is listed: `listed(defect, *arguments, **entry)`."""

    def run(defect, *arguments, source=EQUIVALENCE, **entry):
        import fake_targets

        target = fake_targets.target_of(defect)
        from verify.targets import load_target

        head = f'target = "{target}"\nversion = "{load_target(target).version()}"\n[[finding]]\n'
        given = {"property": "fake.equivalence", "reason": "no sum", "reference": "here", **entry}
        lines = [f"{name} = {json.dumps(value)}" for name, value in given.items()]
        (pytester.path / "known.toml").write_text(head + "\n".join(lines))
        return properties(source, "--known", "known.toml", *arguments, defect=defect)

    return run


def test_a_known_failure_does_not_fail_a_run_and_stays_in_its_report(listed, pytester):
    result = listed("no sum", words=["the sum over tp"])
    assert result.ret == 0
    result.assert_outcomes(xfailed=1)
    document = report(pytester)
    assert (document["verdict"], document["opens_gate"]) == ("failed (known)", True)
    assert row(pytester, "fake.equivalence")["known"] == [
        {"reason": "no sum", "reference": "here", "state": "fails"}
    ]
    assert document["failures"][0]["verdict"] == "failed (known)"
    assert failure(pytester)["findings"]
    assert "failed (known)" in (pytester.path / "out/index.html").read_text()
    result.stdout.fnmatch_lines(["*fake.equivalence*failed (known)*"])


def test_a_known_failure_hides_none_that_comes_after_it(listed, pytester):
    result = listed("no sum", "--max-examples", "30", words=["the sum over tp"])
    assert result.ret == 0
    assert row(pytester, "fake.equivalence")["examples"] == 30
    (known,) = failure(pytester)["findings"]
    assert known["case"]["layout"]["tp"] > 1
    # Of examples that do not fail as known, some fail in another way.
    wrong = '    assert case.layout.tp > 1 or case.shape["sequence"] < 3, "something else"\n'
    result = listed(
        "no sum", "--max-examples", "30", source=EQUIVALENCE + wrong, words=["the sum over tp"]
    )
    assert result.ret == 1
    assert row(pytester, "fake.equivalence")["known"][0]["state"] == "fails"
    assert "something else" in failure(pytester)["reason"]
    assert failure(pytester)["findings"] == [known]
    result.stdout.fnmatch_lines(["*something else*", "Again: shardproof run*", "*known: no sum*"])
    assert "the sum over tp" not in text(result)


def failure(pytester):
    return read(pytester.path / "out/failures/fake.equivalence.json")["failures"][0]


def test_another_failure_of_the_same_property_fails(listed, pytester):
    assert listed("no sum", words=["the sum over cp"]).ret == 1
    assert row(pytester, "fake.equivalence")["verdict"] == "failed"


def test_a_known_case_that_is_none_takes_nothing_that_was_found(listed, pytester):
    none = json.dumps({**SHOWS.to_json(), "shape": {**SHOWS.shape, "in_features": 3}})
    assert listed("no sum", words=["the sum over cp"], check="equivalence", case=none).ret == 1
    found = row(pytester, "fake.equivalence")
    assert (found["verdict"], found["known"][0]["state"]) == ("failed", "not seen")
    assert "the case of a known finding (no sum): case: x of fake_row on tp2" in found["reason"]
    assert failure(pytester)["findings"]
    assert listed(None, "--max-examples", "4", check="equivalence", case=none).ret == 1
    assert row(pytester, "fake.equivalence")["verdict"] == "unknown"


def test_a_finding_that_does_not_show_is_told_and_may_be_an_error(listed, pytester):
    assert listed(None, "--max-examples", "4", "--known-strict").ret == 0
    assert "known: fake.equivalence: not seen in 4 examples: no sum" in summary_of(pytester)
    recorded = {"check": "equivalence", "case": json.dumps(SHOWS.to_json())}
    result = listed(None, "--max-examples", "4", **recorded)
    assert result.ret == 0
    assert "known: fake.equivalence: no longer fails: no sum" in text(result)
    assert listed(None, "--max-examples", "4", "--known-strict", **recorded).ret == 1
    assert not report(pytester)["opens_gate"]
    none_fails = EQUIVALENCE.replace("cases()", "cases().filter(lambda case: case.layout.tp == 1)")
    result = listed("no sum", "--known-strict", source=none_fails, **recorded)
    assert result.ret == 0
    assert "fails when its case is run: no sum" in text(result)


def summary_of(pytester):
    from verify.report.table import summary

    return summary(report(pytester), pytester.path, width=100, colour=False)


def test_the_command_refuses_entries_that_fit_nothing(capsys, tmp_path):
    from verify.targets import load_target

    version = load_target("impl").version()
    path = tmp_path / "known.toml"
    path.write_text(HEAD.replace('"1"', f'"{version}"') + ENTRY)
    for arguments, words in (
        (["--known", path], "finding 1: there is no property 'linear.b'; see `shardproof suites`"),
        (["--known", tmp_path / "none"], "cannot read"),
        (["--known-strict"], "there is nothing to be strict about without --known"),
    ):
        code, out, err = in_process(capsys, "run", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert words in err
