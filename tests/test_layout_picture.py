"""The text that shows a layout."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings

from verify.errors import BadArgument
from verify.layout import Layout
from verify.layout_picture import RANK_LIMIT, WIDTH, describe
from verify.strategies.layouts import layouts_of_every_kind


def test_four_ranks_of_two_by_two() -> None:
    assert (
        describe(Layout(tp=2, cp=2), kinds=["tp", "cp", "dp"])
        == """\
tp2-cp2: 4 ranks
order tp-cp-ep-dp-pp, leftmost fastest

      dp0
     ┌─────────────┐
pp0  │     tp0 tp1 │
     │ cp0   0   1 │
     │ cp1   2   3 │
     └─────────────┘

groups
  tp  2 of 2      [0,1] [2,3]
  cp  2 of 2      [0,2] [1,3]
  dp  4 of 1      each rank alone"""
    )


def test_experts_that_lie_otherwise_have_a_picture() -> None:
    assert "experts" not in describe(Layout(tp=2, dp=2))
    text = describe(Layout(tp=2, dp=2, ep=2, etp=1), kinds=["ep"])
    assert "│ ep0    0 │ │ ep0    2 │" in text
    assert "ep  2 of 2      [0,1] [2,3]" in text


@settings(max_examples=60, deadline=None)
@given(layouts_of_every_kind(max_world_size=RANK_LIMIT))
def test_every_group_of_a_small_world_is_shown_in_full(layout) -> None:
    text = describe(layout)
    assert max(map(len, text.splitlines())) <= WIDTH
    for kind in layout.kinds:
        shown = re.search(rf"^  {kind} +\d+ of \d+ +(.*(?:\n {{16,}}.*)*)$", text, re.MULTILINE)
        assert shown is not None, kind
        groups = "".join(f"[{','.join(map(str, group))}]" for group in layout.groups(kind))
        if shown[1] == "each rank alone":
            groups = shown[1].replace(" ", "")
            assert layout.groups(kind) == tuple((rank,) for rank in range(layout.world_size))
        assert re.sub(r"\s", "", shown[1]) == groups, kind


@settings(max_examples=30, deadline=None)
@given(layouts_of_every_kind(max_world_size=3000))
def test_a_large_world_fits_and_says_what_it_leaves_out(layout) -> None:
    lines = describe(layout).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert len(lines) < 250
    cells = [
        int(word) for line in lines if "│ cp" in line for word in re.findall(r" (\d+)\b", line)
    ]
    assert set(cells) <= set(range(layout.world_size))
    dense = lines[: lines.index("experts")] if "experts" in lines else lines
    told = any(line.startswith("left out of the picture") for line in dense)
    shown = {int(n) for line in dense if "│ cp" in line for n in re.findall(r" (\d+)\b", line)}
    assert told == (shown != set(range(layout.world_size)))


def test_16384_ranks() -> None:
    text = describe(Layout.for_world(16384, tp=8, cp=4, pp=16))
    assert "left out of the picture: 31 of 32 dp, 12 of 16 pp" in text
    assert "groups (shortened: more than 64 ranks)" in text
    assert "... and more: 2048 groups in all" in text
    assert "[0,1024,2048,...,15360]" in text


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(BadArgument, match="'colour' is not one of tp, cp"):
        describe(Layout(), kinds=["colour"])
