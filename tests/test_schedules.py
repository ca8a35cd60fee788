"""The laws of pipeline schedules, tables as plain data, and the command that shows them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from click.testing import CliRunner

from verify.cli import cli
from verify.errors import BadArgument, Mismatch
from verify.schedules.laws import Plan, complaints
from verify.schedules.picture import WIDTH, picture
from verify.schedules.svg import svg
from verify.schedules.table import table_of
from verify.schedules.times import Times

# One microbatch over two stages.
ONE = [
    [
        ["forward", 0, 0],
        ["exchange", [["send", "activation", 0, 0, 1]]],
        ["exchange", [["recv", "gradient", 0, 0, 1]]],
        ["backward", 0, 0],
    ],
    [
        ["exchange", [["recv", "activation", 0, 0, 0]]],
        ["forward", 0, 0],
        ["backward", 0, 0],
        ["exchange", [["send", "gradient", 0, 0, 0]]],
    ],
]
PLAN = Plan(kind="1f1b", pp=2, vpp=1, microbatches=1)


def changed(stage: int, *steps) -> list:
    """The table with other steps of one stage, by their present numbers or new."""
    return [
        [old[step] if isinstance(step, int) else step for step in steps] if i == stage else old
        for i, old in enumerate(ONE)
    ]


def test_a_table_without_fault():
    assert complaints(table_of(ONE), PLAN) == ()
    times = Times(table_of(ONE), 1)
    assert (times.span, times.bubble) == (6, 3)
    assert times.peaks(until=("backward",)) == (1, 1)


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        (ONE[:1], "law 1: the table has 1 stages and should have 2"),
        (changed(0, 0, 1, 2), "law 1: stage 0 does, 0 times and not 1, the backward of microb"),
        (changed(0, 0, 0, 1, 2, 3), "law 1: stage 0 does, 2 times and not 1, the forward"),
        (changed(0, 1, 0, 2, 3), "law 2: stage 0 has the send of the activation of microbatch 0"),
        (changed(0, 0, 1, 3, 2), "before the recv of the gradient of microbatch 0 for chunk 0"),
        (changed(0, 0, 2, 3), "law 2: stage 0 has, 0 times and not 1, the send of the activation"),
        (changed(0, 0, 2, 1, 3), "law 3: stage 0 waits for ever in the recv of the gradient"),
        (changed(1, 0, 1, 3, 2), "law 2: stage 1 has the send of the gradient of microbatch 0"),
    ],
)
def test_each_fault_is_told(plain, words):
    found = complaints(table_of(plain), PLAN)
    assert any(words in each for each in found), found


def test_bubble_and_peaks_are_held_against_what_is_published():
    """The right table of one kind is none of another."""
    plain = [
        [["forward", 0, 0], ["forward", 1, 0], ["backward", 0, 0], ["backward", 1, 0]],
    ]
    assert complaints(table_of(plain), Plan(kind="gpipe", pp=1, vpp=1, microbatches=2)) == ()
    (found,) = complaints(table_of(plain), Plan(kind="1f1b", pp=1, vpp=1, microbatches=2))
    assert "law 5: stage 0 keeps activations of 2 microbatches" in found


def test_a_message_for_another_is_told():
    """Both transfers of a batch go to one stage, which receives them in the other order."""
    first = [
        ["forward", 0, 0],
        ["forward", 1, 0],
        ["exchange", [["send", "activation", 1, 0, 1], ["send", "activation", 0, 0, 1]]],
        ["exchange", [["recv", "gradient", 0, 0, 1]]],
        ["backward", 0, 0],
        ["exchange", [["recv", "gradient", 1, 0, 1]]],
        ["backward", 1, 0],
    ]
    second = [
        ["exchange", [["recv", "activation", 0, 0, 0], ["recv", "activation", 1, 0, 0]]],
        ["forward", 0, 0],
        ["forward", 1, 0],
        ["backward", 0, 0],
        ["exchange", [["send", "gradient", 0, 0, 0]]],
        ["backward", 1, 0],
        ["exchange", [["send", "gradient", 1, 0, 0]]],
    ]
    plan = Plan(kind="gpipe", pp=2, vpp=1, microbatches=2)
    (found,) = complaints(table_of([first, second]), plan)
    assert "law 3: the send of the activation of microbatch 1" in found
    assert "meets the recv of the activation of microbatch 0" in found


@pytest.mark.parametrize(
    "plain",
    [
        None,
        [None],
        [[["forward", 0]]],
        [[["fly", 0, 0]]],
        [[["forward", -1, 0]]],
        [[["forward", True, 0]]],
        [[["exchange", [["send", "activation", 0, 0]]]]],
        [[["exchange", [["send", "parcel", 0, 0, 1]]]]],
    ],
)
def test_what_is_no_table_is_refused(plain):
    with pytest.raises(Mismatch, match="schedule: "):
        table_of(plain)


def test_an_unknown_kind_is_refused():
    with pytest.raises(BadArgument, match="'dualpipe' is not one of gpipe"):
        Plan(kind="dualpipe", pp=1, vpp=1, microbatches=1)


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ["schedule", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_the_picture():
    lines = [line.plain for line in picture(table_of(ONE), PLAN)]
    assert lines[0] == "1f1b: 2 stages, 1 microbatch"
    assert "stage 0 F0······B0" in lines
    assert "stage 1 ··F0B0  ····" in lines
    assert "bubble  3 of 6 units of time: 50.0%, or 100.0% of the work" in lines


@pytest.mark.parametrize(
    "arguments",
    [
        "--pp 4 --microbatches 8",
        "--pp 4 --vpp 2 --microbatches 8",
        "--pp 4 --microbatches 8 --kind zb-h1",
        "--pp 3 --microbatches 120 --kind gpipe",
        "--pp 20 --microbatches 40",
    ],
)
def test_the_command_fits(arguments):
    lines = shown(*arguments.split()).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert len(lines) <= 100
    assert not any("\x1b" in line for line in lines)
    counts = dict(re.findall(r"--(pp|microbatches) (\d+)", arguments))
    assert f"{counts['pp']} stages" in lines[0]
    assert f"{counts['microbatches']} microbatches" in lines[0]


def test_what_is_left_out_is_said():
    assert "left out: 4 of 20 stages" in shown("--pp", "20", "--microbatches", "40")
    assert " of 366 units of time" in shown("--pp", "3", "--microbatches", "120")


def test_the_svg(tmp_path):
    path = tmp_path / "schedule.svg"
    shown(*f"--pp 2 --vpp 2 --microbatches 2 --svg {path}".split())
    root = ET.fromstring(path.read_text())
    works = root.findall(".//{*}g[@class='work']")
    assert len(works) == 2 * 2 * 2 * 2
    assert "interleaved: 2 stages of 2 chunks" in path.read_text()
    assert ET.fromstring(svg(table_of(ONE), PLAN)) is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--pp 3 --vpp 2 --microbatches 4", "4 is no multiple of pp=3"),
        ("--vpp 2 --kind gpipe", "runs one chunk a stage, got 2"),
        ("--kind dualpipe", "'dualpipe' is not one of"),
        ("--microbatches 0", "0 is no size"),
        ("--svg /nowhere/x.svg", "--svg: cannot write /nowhere/x.svg"),
    ],
)
def test_a_wrong_command_is_one_line(arguments, words):
    with pytest.raises(BadArgument) as caught:
        shown(*arguments.split())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
