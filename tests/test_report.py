"""The files of a report: their schema, their integrity, and the page."""

import dataclasses
import json
import os
import subprocess
import sys

import jsonschema
import pytest

from verify.case import Case
from verify.errors import BadArgument
from verify.finding import Divergence, Explanation, Finding
from verify.layout import Layout
from verify.report import RunFacts, describe_failure, describe_run, read, write
from verify.report.files import validate
from verify.report.page import grids, page
from verify.report.table import summary
from verify.runner.options import RunOptions
from verify.runner.record import (
    NOT_RUN,
    KnownOutcome,
    Record,
    Unsupported,
    file_name,
    layout_key,
    property_name,
)
from verify.verdict import Verdict

CASE = Case(concept="row_linear", layout=Layout(tp=2, dp=2), shape={"sequence": 1}, seed=3)
FINDING = Finding(
    check="equivalence",
    kind="value",
    target="impl",
    case=CASE,
    divergences=(
        Divergence(
            tensor="y",
            kind="value",
            rank=1,
            coordinates={"tp": 1},
            ranks=(1, 3),
            index=(0, 0),
            reference=1.0,
            candidate=float("nan"),
            error=float("inf"),
            bound=1e-12,
        ),
        Divergence(
            tensor="grad x", kind="shape", rank=0, coordinates={}, ranks=(0,), detail="is [3]"
        ),
    ),
    explanations=(Explanation("the sum over tp (size 2) is missing", 1.0), Explanation("row 0", 0)),
)
COUNTS = {"layouts": {layout_key(CASE.layout.to_json()): 7}, "arithmetic": {"fp64 float64": 7}}
PASSED = Record(property="linear.a", verdict=Verdict.PASSED, examples=7, seconds=0.5, **COUNTS)
FAILED = Record(
    property="linear.b",
    verdict=Verdict.FAILED,
    examples=3,
    findings=(FINDING,),
    options={"row_linear bias=False": 2},
)
LACKS = Record(
    property="linear.c",
    verdict=Verdict.NOT_SUPPORTED,
    examples=2,
    not_supported=(Unsupported("no adapter", 2, str(CASE)),),
    left_out={"it needs more ranks": 4},
)
BROKEN = Record(
    property="linear.d", verdict=Verdict.UNKNOWN, reason="HarnessError: <b>", traceback="Traceback"
)
LISTED = dataclasses.replace(
    FAILED,
    property="linear.e",
    verdict=Verdict.KNOWN,
    known=(KnownOutcome("it is so", "there", "fails"), KnownOutcome("or so", "here", "not seen")),
)
EVERY = [PASSED, FAILED, LACKS, BROKEN]


def facts(**changes):
    given = {
        "options": RunOptions(),
        "max_world_size": 16,
        "workers": 0,
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 1.5,
        "finished": True,
        "rank_state": {"swapped": ["module.global"], "shared": []},
    }
    return RunFacts(**{**given, **changes})


@pytest.mark.parametrize("records", [[], [PASSED], EVERY, [LISTED]])
def test_what_is_written_is_as_the_schema_says_and_reads_back(tmp_path, records):
    path = tmp_path / "new" / "report.json"
    document = describe_run(facts(), records)
    write(path, document)
    found = read(path)
    validate(found)
    assert {name: found[name] for name in document} == json.loads(json.dumps(document))
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_a_failure_file_has_the_same_head(tmp_path):
    path = tmp_path / "failure.json"
    write(path, describe_failure(facts(), FAILED))
    found, run = read(path), describe_run(facts(), EVERY)
    assert found["failures"] == [run["failures"][0]]
    assert Finding.from_json(found["failures"][0]["findings"][0]).message() == FINDING.message()
    same = set(found) - {"failures", "format", "digest"}
    assert {name: found[name] for name in same} == {name: run[name] for name in same}


@pytest.mark.parametrize("record", [*EVERY, LISTED])
def test_records_survive_their_journey(record):
    assert Record.from_json(json.loads(json.dumps(record.to_json()))).to_json() == record.to_json()


@pytest.mark.parametrize(
    ("records", "finished", "verdict", "opens"),
    [
        ([], True, "unknown", False),
        ([PASSED], True, "passed", True),
        ([PASSED], False, "unknown", False),
        ([PASSED, LACKS], True, "passed", True),
        ([LACKS], True, "not supported", False),
        ([PASSED, BROKEN], True, "unknown", False),
        ([PASSED, LISTED, LACKS], True, "failed (known)", True),
        ([LISTED], True, "failed (known)", True),
        ([LISTED, BROKEN], True, "unknown", False),
        ([LISTED, FAILED], True, "failed", False),
        (EVERY, False, "failed", False),
    ],
)
def test_the_verdict_of_a_run(records, finished, verdict, opens):
    document = describe_run(facts(finished=finished), records)
    assert (document["verdict"], document["opens_gate"]) == (verdict, opens)


def test_the_schema_refuses_what_is_not_in_it():
    document = {**describe_run(facts(), EVERY), "digest": "sha256:" + "0" * 64}
    validate(document)
    for name in document:
        with pytest.raises(jsonschema.ValidationError):
            validate({key: value for key, value in document.items() if key != name})
    for change in ({"extra": 1}, {"seed": -1}, {"verdict": "fine"}, {"failures": [{}]}):
        with pytest.raises(jsonschema.ValidationError):
            validate({**document, **change})


def damaged(text):
    document = json.loads(text)
    case = document["failures"][0]["findings"][0]["case"]
    yield "truncated", text[: len(text) // 2], "is truncated or no JSON"
    yield "empty", "", "is truncated or no JSON"
    yield "foreign", json.dumps({"a": 1}), "is not of shardproof"
    yield "list", "[1]", "is not of shardproof"
    case["seed"] += 1
    yield "tampered", json.dumps(document), "was changed after it was written"
    yield "later", json.dumps({**document, "format_version": 2}), "has format version 2"


@pytest.mark.parametrize("kind", ["truncated", "empty", "foreign", "list", "tampered", "later"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "report.json"
    write(path, describe_run(facts(), EVERY))
    (text, words), *_ = [(t, w) for name, t, w in damaged(path.read_text()) if name == kind]
    path.write_text(text)
    with pytest.raises(BadArgument, match=words) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_text_or_is_missing_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, words in (("binary", "is no text"), ("nothing", "No such file")):
        with pytest.raises(BadArgument, match=words):
            read(tmp_path / name)


def test_a_sealed_file_of_the_wrong_shape_is_refused(tmp_path):
    document = describe_run(facts(), EVERY)
    document["properties"][0]["examples"] = "many"
    write(tmp_path / "report.json", document)
    with pytest.raises(BadArgument, match="at properties/0/examples: 'many' is not of type"):
        read(tmp_path / "report.json")


def test_a_reader_never_sees_half_a_file(tmp_path):
    """A writer that is killed again and again leaves the old report or a new one."""
    path = tmp_path / "report.json"
    write(path, describe_run(facts(), EVERY))
    program = (
        "import sys; from pathlib import Path; from verify.report import read, write\n"
        "path = Path(sys.argv[1]); document = read(path); print('ready', flush=True)\n"
        "while True: write(path, {**document, 'seed': document['seed'] + 1})"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "ready\n"
        for _ in range(100):
            assert read(path)["format"] == "shardproof report"
        writer.kill()
    assert read(path)["failures"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "report.json"
    write(path, describe_run(facts(), EVERY))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(path, {"number": float("nan")})
    assert read(path)["verdict"] == "failed"
    assert os.listdir(tmp_path) == ["report.json"]


def test_the_page_needs_nothing_else_and_says_it_all(tmp_path):
    text = page(describe_run(facts(), EVERY), tmp_path)
    for foreign in ("http:", "https:", "<script", "<link", "src=", "@import"):
        assert foreign not in text
    for said in (
        '<p class="word">failed</p>',
        "grad x",
        "the sum over tp (size 2) is missing",
        f"shardproof repro {tmp_path}/failures/linear.b.json",
        "&#34;concept&#34;: &#34;row_linear&#34;",
        "HarnessError: &lt;b&gt;",
        "no adapter",
        "it needs more ranks",
        "module.global",
        "prefers-color-scheme: dark",
    ):
        assert said in text, said
    assert "<b>" not in text.partition("HarnessError")[2].partition("</pre>")[0]


def test_the_page_of_a_run_that_did_not_finish():
    waiting = Record(property="linear.e", verdict=Verdict.UNKNOWN, reason=NOT_RUN)
    document = describe_run(facts(finished=False), [PASSED, waiting])
    text = page(document, RunOptions().report)
    assert "The run did not finish." in text
    assert "Did not run to the end" in text


def test_grids_count_examples_by_two_sizes():
    layouts = [
        {"layout": Layout(tp=tp, dp=dp).to_json(), "count": count, "text": ""}
        for tp, dp, count in ((1, 1, 40), (2, 1, 5), (2, 3, 1))
    ]
    (grid,) = grids(layouts)
    assert (grid.axis, grid.across, grid.down) == ("dp", [1, 2], [1, 3])
    assert [[cell.count for cell in row] for row in grid.rows] == [[40, 5], [0, 1]]
    assert [[cell.shade for cell in row] for row in grid.rows] == [[5, 3], [0, 1]]


def test_the_table_fits_its_width_and_shows_each_verdict():
    wide = Record(property="linear." + "long_" * 30, verdict=Verdict.PASSED, examples=1)
    text = summary(
        describe_run(facts(), [*EVERY, wide, LISTED]), RunOptions().report, width=100, colour=False
    )
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    for verdict in Verdict:
        assert verdict.value in text
    coloured = summary(describe_run(facts(), EVERY), RunOptions().report, width=100, colour=True)
    assert "\x1b[" in coloured


def test_names_of_properties_and_files():
    assert property_name("a/test_linear.py::test_row[tp=2 x/y]") == "linear.row[tp=2 x/y]"
    assert property_name("../p/test_linear.py::TestIt::test_row") == "linear.TestIt.row"
    assert file_name("linear.row[tp=2 x/y]") == "linear.row_tp=2_x_y.json"
