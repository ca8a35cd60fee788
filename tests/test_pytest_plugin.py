"""The pytest plugin, in pytest runs of its own over properties of the targets in `fake_targets`."""

import json
import subprocess
import sys

import fake_targets
import pytest
from hypothesis import settings

# Loaded once: pytester would import it afresh for each run in this process, but torch keeps what
# the simulator registered with it.
import verify.cluster.sim.backend
import verify.runner.pytest_run  # noqa: F401
from verify.errors import BeyondRange
from verify.property import CHECKS
from verify.report import read
from verify.runner.limits import limits

pytest_plugins = ["pytester"]

PROPERTIES = """
from hypothesis import given, strategies as st
from verify.case import Case
from verify.errors import HarnessError
from verify.layout import Layout

@st.composite
def cases(draw, concept="fake_row", width=None):
    tp = draw(st.integers(1, 4))
    shape = {"sequence": draw(st.integers(1, 3)), "batch": 2, "in_features": width or 2 * tp,
             "out_features": draw(st.integers(2, 4))}
    shape |= {"hidden": 3} if concept == "fake_zero" else {}
    lens = draw(st.sampled_from(["fp64", "exact"]))
    return Case(concept=concept, layout=Layout(tp=tp), shape=shape, lens=lens,
                seed=draw(st.integers(0, 99)))
"""
EQUIVALENCE = """
@given(case=cases())
def test_equivalence(check, case):
    check("equivalence", case)
"""
MORE = """
@given(case=cases())
def test_determinism(check, case):
    check("determinism", case)

@given(case=cases())
def test_invariance(check, case):
    check("invariance", case)
"""
ALL_TOO_WIDE = """
@given(case=cases(width=1001).filter(lambda case: case.layout.tp == 1))
def test_too_wide(check, case):
    check("equivalence", case)
"""


@pytest.fixture
def properties(pytester, monkeypatch):
    """Run pytest with the plugin over a suite `fake`: `properties(source, *arguments)`."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(pytester.path / "..") + ":" + fake_targets_folder())

    def run(source, *arguments, defect=None, subprocess=False):
        pytester.makepyfile(test_fake=PROPERTIES + source)
        how = pytester.runpytest_subprocess if subprocess else pytester.runpytest_inprocess
        target = fake_targets.target_of(defect)
        given = ["--target", target, "--max-world-size", "4", "--report", "out"]
        return how("-p", "shardproof", *given, *arguments)

    return run


def fake_targets_folder():
    return fake_targets.__file__.rpartition("/")[0]


def report(pytester):
    return read(pytester.path / "out" / "report.json")


def row(pytester, name):
    (found,) = [each for each in report(pytester)["properties"] if each["property"] == name]
    return found


def text(result):
    return "\n".join(result.outlines + result.errlines)


def test_a_run_that_does_not_use_it_keeps_all_names_for_itself(pytester):
    pytester.makeconftest(
        """
        import pytest
        def pytest_addoption(parser):
            for name in ("--target", "--seed", "--profile", "--report", "--suite", "--lens"):
                parser.addoption(name, default="mine")
        @pytest.fixture
        def check(request):
            return request.config.getoption("--seed")
        """
    )
    pytester.makepyfile("def test_it(check): assert check == 'mine'")
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(passed=1)
    assert "verdict" not in text(result)
    assert not (pytester.path / "shardproof-report").exists()


def test_it_imports_nothing_heavy_before_it_is_used():
    program = "import sys, verify.pytest_plugin; print([m for m in ('torch', 'hypothesis') if m in sys.modules])"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_a_right_target_passes(properties, pytester):
    before = settings.default, limits()
    result = properties(EQUIVALENCE, "--max-examples", "7")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*fake.equivalence*7*passed*"])
    document = report(pytester)
    assert (document["verdict"], document["opens_gate"]) == ("passed", True)
    assert document["finished"]
    assert document["cluster"] == {"name": "sim", "device": None, "max_world_size": 4}
    found = row(pytester, "fake.equivalence")
    assert found["examples"] == document["coverage"]["examples"] == 7
    assert found["layouts"] == len(document["coverage"]["layouts"]) >= 2
    assert sum(document["coverage"]["arithmetic"].values()) == 7
    assert document["failures"] == []
    assert (settings.default, limits()) == before


def test_a_failure_is_told_in_its_own_words(properties, pytester):
    result = properties(EQUIVALENCE, defect="no sum")
    assert result.ret == 1
    said = text(result)
    result.stdout.fnmatch_lines(
        [
            "fake_targets:NoSum, fake_row: y on rank * and should be*",
            "Replay: shardproof repro out/failures/fake.equivalence.json",
            "tensor *rank *index *",
        ]
    )
    for internal in ("Traceback", "Falsifying", "_pytest", "hypothesis/core.py", "verify/property"):
        assert internal not in said.partition("= FAILURES")[2]
    failure = read(pytester.path / "out/failures/fake.equivalence.json")
    assert failure["failures"] == report(pytester)["failures"]
    ((finding,),) = [each["findings"] for each in failure["failures"]]
    # The smallest case in which a missing sum can show.
    assert finding["case"]["layout"]["tp"] == 2
    assert finding["case"]["shape"]["sequence"] == 1
    assert finding["explanations"][0]["sentence"].startswith("the sum over tp")


def test_tracebacks_are_shown_on_demand(properties):
    assert "def test_equivalence" in text(properties(EQUIVALENCE, "-vv", defect="no sum"))


def test_what_the_target_does_not_support_alone_opens_no_gate(properties, pytester):
    result = properties(ALL_TOO_WIDE, "--max-examples", "5")
    assert result.ret == 1
    found = row(pytester, "fake.too_wide")
    assert found["verdict"] == "not supported"
    (unsupported,) = found["not_supported"]
    assert (unsupported["reason"], unsupported["count"]) == ("it is too wide", 5)
    result.stdout.fnmatch_lines(["not supported: it is too wide (5 examples)"])


def test_what_is_not_supported_beside_what_passes_does(properties, pytester):
    assert properties(EQUIVALENCE + ALL_TOO_WIDE, "--max-examples", "5").ret == 0
    assert report(pytester)["verdict"] == "passed"


@pytest.mark.parametrize(
    ("source", "verdict", "reason"),
    [
        ('@given(case=cases("fake_zero"))\ndef test_it(check, case):\n  check("equivalence", case)',
         "unknown", "HarnessError: "),
        ('@given(case=cases())\ndef test_it(check, case):\n  check("equivalenze", case)',
         "unknown", "BadArgument: check: 'equivalenze' is not one of equivalence"),
        ("@given(case=cases())\ndef test_it(check, case):\n  pass",
         "unknown", "no example was checked"),
        ("@given(n=st.integers())\ndef test_it(n):\n  assert n < 5", "failed", "assert 5 < 5"),
        ("@given(n=st.integers())\ndef test_it(n):\n  [][n]", "unknown", "IndexError: "),
        ("@given(n=st.integers().filter(lambda n: False))\ndef test_it(n):\n  pass",
         "unknown", "filter"),
        ("import pytest\n@pytest.mark.skip('later')\ndef test_it():\n  pass", "unknown", "later"),
    ],
)  # fmt: skip
def test_a_verdict_is_never_lost(properties, pytester, source, verdict, reason):
    result = properties(source)
    assert result.ret == 1
    found = row(pytester, "fake.it")
    assert found["verdict"] == verdict
    assert reason in found["reason"]
    assert "Again: shardproof run" in text(result)
    assert "_pytest" not in text(result)


def test_a_file_that_cannot_be_imported_is_unknown(properties, pytester):
    assert properties("import nothing_of_that_name").ret != 0
    assert row(pytester, "fake")["verdict"] == "unknown"
    assert "nothing_of_that_name" in row(pytester, "fake")["reason"]


def test_several_distinct_failures_are_all_kept(properties, pytester):
    source = """
@given(case=cases())
def test_both(check, case):
    found = []
    for name in ("determinism", "equivalence"):
        try:
            check(name, case)
        except AssertionError as error:
            found.append(error)
    if found:
        raise ExceptionGroup("as Hypothesis raises them", found)
"""
    assert properties(source, defect="random").ret == 1
    (failure,) = report(pytester)["failures"]
    assert {each["check"] for each in failure["findings"]} == {"determinism", "equivalence"}


def test_cases_that_do_not_fit_the_run_are_left_out_and_counted(properties, pytester):
    arguments = ("--max-world-size", "3", "--lens", "fp64", "--max-examples", "20")
    assert properties(EQUIVALENCE, *arguments).ret == 0
    assert set(report(pytester)["coverage"]["arithmetic"]) == {"fp64 float64"}
    left_out = row(pytester, "fake.equivalence")["left_out"]
    assert any("more than the 3 ranks" in reason for reason in left_out)
    assert any("lens exact" in reason for reason in left_out)
    assert all(each["layout"]["tp"] <= 3 for each in report(pytester)["coverage"]["layouts"])


@pytest.mark.parametrize("always", [False, True])
def test_examples_of_which_the_reference_overflows_are_left_out(
    properties, pytester, monkeypatch, always
):
    def beyond(case, **_):
        if always or case.layout.tp == 1:
            raise BeyondRange("reference: y overflows")
        return 1

    monkeypatch.setitem(CHECKS, "beyond", beyond)
    code = properties(EQUIVALENCE.replace('"equivalence"', '"beyond"')).ret
    found = row(pytester, "fake.equivalence")
    assert found["left_out"]["the reference overflows in float64"] > 0
    assert (code, found["verdict"]) == ((1, "unknown") if always else (0, "passed"))
    assert found["examples"] == 20
    assert found["reason"] == ("no example was checked" if always else "")


def test_a_property_without_a_case_in_the_wanted_lenses_is_no_part_of_the_run(properties, pytester):
    only = EQUIVALENCE.replace("cases()", "cases().filter(lambda case: case.lens == 'exact')")
    both = only.replace("test_equivalence", "test_exact") + EQUIVALENCE
    assert properties(both, "--lens", "fp64", "--max-examples", "10").ret == 0
    assert row(pytester, "fake.equivalence")["verdict"] == "passed"
    assert row(pytester, "fake.exact")["verdict"] == "not supported"
    assert "lens exact" in row(pytester, "fake.exact")["reason"]


def test_the_seed_decides_what_is_drawn(properties, pytester):
    drawn = []
    for arguments in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"]):
        properties(EQUIVALENCE, "--max-examples", "12", *arguments)
        drawn.append(report(pytester)["coverage"])
    assert drawn[0] == drawn[1] != drawn[2]


def test_explore_draws_a_fresh_seed_and_records_it(properties, pytester):
    seeds = set()
    for _ in range(2):
        properties(EQUIVALENCE, "--max-examples", "2", "--profile", "explore")
        seeds.add(report(pytester)["seed"])
    assert len(seeds) == 2


def test_workers_report_as_one_process_does(properties, pytester):
    arguments = ("--max-examples", "6", "--profile", "explore", "--seed", "4")
    documents = []
    for workers in ([], ["-n", "2"]):
        properties(EQUIVALENCE + MORE, *arguments, *workers, defect="no sum", subprocess=True)
        documents.append(report(pytester))
    alone, spread = documents
    assert (alone["options"]["workers"], spread["options"]["workers"]) == (0, 2)
    for document in documents:
        for each in document["properties"]:
            del each["seconds"]
    for part in ("properties", "coverage", "failures", "seed", "verdict", "target"):
        assert alone[part] == spread[part]
    assert len(spread["properties"]) == 3


def test_a_worker_that_dies_leaves_unknown(properties, pytester):
    source = "import os\ndef test_dies():\n    os._exit(3)\n"
    assert properties(EQUIVALENCE + source, "-n", "2", subprocess=True).ret == 1
    assert row(pytester, "fake.dies")["verdict"] == "unknown"
    assert row(pytester, "fake.equivalence")["verdict"] == "passed"


def test_an_interrupted_run_writes_what_it_knows(properties, pytester):
    source = """
@given(case=cases())
def test_interrupted(check, case):
    check("equivalence", case)
    if case.layout.tp > 1:
        raise KeyboardInterrupt

def test_never_run():
    pass
"""
    assert properties(EQUIVALENCE + source, subprocess=True).ret == 2
    document = report(pytester)
    assert not document["finished"]
    assert not document["opens_gate"]
    verdicts = {each["property"]: each["verdict"] for each in document["properties"]}
    assert verdicts == {
        "fake.equivalence": "passed",
        "fake.interrupted": "unknown",
        "fake.never_run": "unknown",
    }
    assert row(pytester, "fake.interrupted")["examples"] >= 1
    assert (pytester.path / "out/index.html").read_text().startswith("<!doctype html>")


def test_a_new_run_leaves_nothing_of_the_old_one(properties, pytester):
    properties(EQUIVALENCE, defect="no sum")
    assert list((pytester.path / "out/failures").iterdir())
    properties(EQUIVALENCE, "--max-examples", "2")
    assert not list((pytester.path / "out/failures").iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "nobody"], "target: 'nobody' is not one of impl, megatron-core"),
        (["--profile", "slow"], "--profile: 'slow' is not one of quick, ci, nightly, explore"),
        (["--max-examples", "0"], "--max-examples: '0' is not a whole number from 1 up"),
        (["--seed", "x"], "--seed: 'x' is not a whole number from 0 up"),
        (["--cluster", "moon"], "--cluster: 'moon' is not one of sim, process, torchrun"),
        (["--max-world-size", "-1"], "--max-world-size: '-1' is not a whole number from 1 up"),
        (["--lens", "exact,blurred"], "--lens: 'blurred' is not one of exact, fp64, native"),
        (["--lens", ""], "--lens: name at least one of exact, fp64, native"),
        (["--cluster", "torchrun", "-n", "2"], "-n: the torchrun cluster is one world"),
        (["--report", "test_fake.py"], "--report: test_fake.py is a file; name a directory"),
    ],
)
def test_a_wrong_option_is_one_line(properties, arguments, words):
    result = properties(EQUIVALENCE, *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    said = [line for line in result.outlines + result.errlines if line.strip()]
    assert len(said) == 1
    assert words in said[0]


def test_an_unknown_suite_is_one_line(pytester):
    result = pytester.runpytest_inprocess("--pyargs", "properties", "--suite", "astrology")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if line.strip()]
    assert "--suite: 'astrology' is not one of " in line
    assert "groups" in line


def test_a_suite_is_chosen_by_name(pytester):
    arguments = ("--suite", "groups", "--max-examples", "2", "--report", "out")
    result = pytester.runpytest_inprocess("--pyargs", "properties", *arguments)
    assert result.ret == 0
    assert {each["suite"] for each in report(pytester)["properties"]} == {"groups"}


def test_draws_do_not_depend_on_what_is_imported(properties, pytester, monkeypatch):
    """Hypothesis takes constants out of imported modules; a run must not."""
    coverages = []
    for values in ("0", ", ".join(map(str, range(500, 900)))):
        pytester.makepyfile(constants=f"VALUES = [{values}]")
        source = EQUIVALENCE.replace("cases()", "numbers()") + f"\nimport constants  # {values[:3]}"
        drawn = """
@st.composite
def numbers(draw):
    number = draw(st.integers(0, 10_000))
    return Case(concept="fake_row", layout=Layout(), seed=number, options={"n": number},
                shape={"sequence": 1, "batch": 1, "in_features": 2, "out_features": 2})
"""
        properties(drawn + source, "--max-examples", "60", subprocess=True)
        coverages.append(json.dumps(report(pytester)["coverage"]["options"]))
    assert coverages[0] == coverages[1]


def test_failing_examples_are_kept_by_name_and_run_again_on_demand(properties, pytester):
    keeping = ("--database", "kept", "--max-examples", "12")
    plain = properties(EQUIVALENCE, "--max-examples", "12", defect="no sum")
    before = report(pytester)["failures"]
    assert plain.ret == properties(EQUIVALENCE, *keeping, defect="no sum").ret == 1
    assert report(pytester)["failures"] == before
    assert properties(EQUIVALENCE, *keeping, "--again", defect="no sum").ret == 1
    assert report(pytester)["failures"][0]["findings"] == before[0]["findings"]
    assert properties(EQUIVALENCE, *keeping, "--again", "--seed", "9", defect="no sum").ret == 1
    found = properties(EQUIVALENCE, "--again", defect="no sum")
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    assert "--again: there are no examples to run again without --database" in text(found)
