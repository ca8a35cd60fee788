"""The merged report of a campaign as files and as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from verify.finding import Finding
from verify.report.files import write, write_text
from verify.report.page import css_class, seconds_text
from verify.report.table import STYLES, known_state

_REPORT = Path(__file__).parent.parent / "report"
_SHOWN_SEEDS = 8


def write_campaign(folder: Path, document: Mapping[str, Any]) -> None:
    """Write `campaign.json` and `index.html`, each in one step."""
    write(folder / "campaign.json", document)
    write_text(folder / "index.html", page(document, folder))


def validate(document: Mapping[str, Any]) -> None:
    """Raise jsonschema.ValidationError where a document is not as the schema says."""
    _validator().validate(document)


@cache
def _validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))
    return jsonschema.Draft202012Validator(schema)


def page(document: Mapping[str, Any], folder: Path) -> str:
    """The page as text; `folder` is the directory that replay commands name."""
    environment = Environment(
        loader=FileSystemLoader([Path(__file__).parent, _REPORT]),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"seconds": seconds_text, "css": css_class, "seeds": seeds_text}
    environment.filters["lost_seed"] = lost_seed
    failures = [{**each, "message": message(each, folder)} for each in document["failures"]]
    known = [(row, e) for row in document["properties"] for e in row["known"]]
    return environment.get_template("campaign.html.j2").render(
        run=document,
        failures=failures,
        known=[(row["property"], known_state(e, row["examples"]), e) for row, e in known],
    )


def message(failure: Mapping[str, Any], folder: Path) -> str:
    """What a failure says, and the command that replays it."""
    if failure["finding"] is None:
        return f"{failure['property']}: {failure['verdict']}: {failure['reason']}"
    return Finding.from_json(failure["finding"]).message(str(folder / failure["file"]))


def seeds_text(seeds: list[int]) -> str:
    """`seed 3`, or `seeds 1, 2, 5` with at most eight of them."""
    shown = ", ".join(map(str, seeds[:_SHOWN_SEEDS]))
    more = f" and {len(seeds) - _SHOWN_SEEDS} more" if len(seeds) > _SHOWN_SEEDS else ""
    return f"seed{'s' * (len(seeds) != 1)} {shown}{more}"


def lost_seed(lost: Mapping[str, Any]) -> str:
    """`seed 3`, or what a unit is that has none."""
    return "once more" if lost["seed"] is None else f"seed {lost['seed']}"


def print_summary(console: Console, document: Mapping[str, Any], folder: Path) -> None:
    """Print every failure once, the table of properties, and the verdict."""
    for failure in document["failures"]:
        again = {None: "", True: "; fails again", False: "; did not fail again"}[failure["again"]]
        head = (
            f"\n{failure['verdict']}: {failure['property']}, {seeds_text(failure['seeds'])}{again}"
        )
        console.print(Text(f"{head}\n{message(failure, folder)}"), soft_wrap=True)
    console.print()
    console.print(_table(document))
    for row in document["properties"]:
        for each in row["known"]:
            if each["state"] != "fails":
                state = known_state(each, row["examples"])
                console.print(Text(f"known: {row['property']}: {state}: {each['reason']}"))
    for lost in document["lost"]:
        console.print(Text(f"unknown: {lost['suite']} {lost_seed(lost)}: {lost['reason']}"))
    total, verdict = document["totals"], document["verdict"]
    console.print(
        Text.assemble(
            (verdict, STYLES[verdict]),
            f": {document['target']['name']} {document['target']['version']},"
            f" {total['done']} of {total['units']} units, {total['examples']} examples over"
            f" {total['layouts']} layouts, {total['failures']} distinct failures"
            f" in {document['seconds']:.1f} s",
        ),
        soft_wrap=True,
    )
    console.print(Text(f"report: {folder}/index.html"))


def _table(document: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("property", overflow="fold")
    for name in ("seeds", "failed", "examples"):
        table.add_column(name, justify="right")
    table.add_column("verdict", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    for row in document["properties"]:
        table.add_row(
            Text(row["property"]),
            str(row["seeds"]),
            str(len(row["failed_seeds"])),
            str(row["examples"]),
            Text(row["verdict"], STYLES[row["verdict"]]),
            f"{row['seconds']:.1f} s",
        )
    return table
