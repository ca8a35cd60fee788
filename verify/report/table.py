"""The verdict of a run as text: a table of properties, what was not supported, and where the report
is."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from verify.console import WIDTH
from verify.runner.record import total

_SHOWN = 5
STYLES = {
    "passed": "green",
    "not supported": "dim",
    "failed (known)": "magenta",
    "unknown": "bold yellow",
    "failed": "bold red",
}


def summary(document: Mapping[str, Any], report: Path, *, width: int, colour: bool) -> str:
    """The table, notes and the last line with the verdict, in at most `width` columns."""
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=min(width, WIDTH),
        force_terminal=colour,
        no_color=not colour,
        highlight=False,
    )
    print_summary(console, document, report)
    return stream.getvalue()


def print_summary(console: Console, document: Mapping[str, Any], report: Path) -> None:
    """Print the same."""
    console.print(_table(document))
    for line in _notes(document):
        console.print(Text(line), soft_wrap=False)
    covered = document["coverage"]
    examples, layouts = covered["examples"], len(covered["layouts"])
    verdict = document["verdict"]
    unfinished = "" if document["finished"] else " (the run did not finish)"
    console.print(
        Text.assemble(
            (verdict, STYLES[verdict]),
            f"{unfinished}: {document['target']['name']} {document['target']['version']},"
            f" {examples} examples over {layouts} layouts in {document['seconds']:.1f} s",
        )
    )
    console.print(Text(pairs_text(covered["pairs"])))
    if document["options"]["require_pairs"] and covered["pairs"]["missed"]:
        for line in _missed(covered["concepts"]):
            console.print(Text(line, STYLES["failed"]), soft_wrap=False)
    console.print(Text(f"report: {report}/index.html"))


def pairs_text(pairs: Mapping[str, int]) -> str:
    """How many pairs of values were exercised, in one line."""
    undecided = f", {pairs['undecided']} undecided" if pairs["undecided"] else ""
    return f"pairs of values: {pairs['exercised']} exercised, {pairs['missed']} missed{undecided}"


def _missed(concepts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What `--require-pairs` requires and no example had, a few of each concept."""
    lines = []
    for space in concepts:
        shown, more = space["missed"][:_SHOWN], len(space["missed"]) - _SHOWN
        lines += [f"pair missed: {space['concept']}: {pair}" for pair in shown]
        lines += [f"pairs missed: {space['concept']}: {more} more, in report.json"] * (more > 0)
    return lines


def _table(document: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("property", overflow="fold")
    for name in ("examples", "layouts"):
        table.add_column(name, justify="right")
    table.add_column("verdict", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    for row in document["properties"]:
        table.add_row(
            Text(row["property"]),
            str(row["examples"]),
            str(row["layouts"]),
            Text(row["verdict"], STYLES[row["verdict"]]),
            f"{row['seconds']:.1f} s",
        )
    return table


def _notes(document: Mapping[str, Any]) -> list[str]:
    """What was not supported or left out, one line a reason; the report has it by property. And
    what was expected and did not show."""
    rows = document["properties"]
    lacking = [{each["reason"]: each["count"]} for row in rows for each in row["not_supported"]]
    left_out = [row["left_out"] for row in rows]
    counted = [
        f"{what}: {reason} ({count} example{'s' * (count > 1)})"
        for what, counts in (("not supported", lacking), ("left out", left_out))
        for reason, count in total(counts).items()
    ]
    unseen = [
        f"known: {row['property']}: {known_state(each, row['examples'])}: {each['reason']}"
        for row in rows
        for each in row["known"]
        if each["state"] != "fails"
    ]
    return counted + unseen


def known_state(known: Mapping[str, Any], examples: int) -> str:
    """What came of a known finding, in words; `examples` are those of its property."""
    if known["state"] == "not seen":
        return f"not seen in {examples} example{'s' * (examples != 1)}"
    return str(known["state"])
