"""`index.html`: the report of a run as one page that needs nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from verify.case import LENSES
from verify.finding import LIKELY, Finding
from verify.layout import Layout
from verify.report.files import write_text
from verify.report.pairs import triangle
from verify.report.table import known_state, pairs_text
from verify.runner.record import NOT_RUN

_AXES = ("cp", "dp", "pp", "ep")
_AXIS_NAMES = {
    "cp": "context",
    "dp": "data",
    "pp": "pipeline",
    "ep": "expert",
}
_SHADES = 5


@dataclass(frozen=True)
class Cell:
    """Examples with one pair of sizes; `shade` is from 0 (none) to 5 (most)."""

    count: int
    shade: int


@dataclass(frozen=True)
class Grid:
    """Examples by the size of tp (across) and of another axis (down)."""

    axis: str
    name: str
    across: list[int]
    down: list[int]
    rows: list[list[Cell]]


def write_page(path: Path, document: Mapping[str, Any]) -> None:
    """Write the page of a run's document, in one step."""
    write_text(path, page(document, path.parent))


def page(document: Mapping[str, Any], report: Path) -> str:
    """The page as text; `report` is the directory that replay commands name."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"seconds": seconds_text, "lenses": _lenses, "css": css_class}
    return environment.get_template("page.html.j2").render(
        run=document,
        grids=grids(document["coverage"]["layouts"]),
        triangles=[triangle(space) for space in document["coverage"]["concepts"]],
        pairs=pairs_text(document["coverage"]["pairs"]),
        failures=[_failure(each, report) for each in document["failures"] if _has_run(each)],
        unfinished=[each["property"] for each in document["failures"] if not _has_run(each)],
        counts=_counts(document),
        not_supported=[
            (row["property"], each)
            for row in document["properties"]
            for each in row["not_supported"]
        ],
        known=[
            (row["property"], known_state(each, row["examples"]), each)
            for row in document["properties"]
            for each in row["known"]
        ],
        left_out=[
            (row["property"], reason, count)
            for row in document["properties"]
            for reason, count in row["left_out"].items()
        ],
    )


def grids(layouts: list[Mapping[str, Any]]) -> list[Grid]:
    """A grid for each axis that is above one somewhere."""
    found = []
    for axis in _AXES:
        counts: dict[tuple[int, int], int] = {}
        for each in layouts:
            sizes = Layout.from_json(each["layout"]).sizes | {"ep": each["layout"]["ep"]}
            pair = sizes[axis], sizes["tp"]
            counts[pair] = counts.get(pair, 0) + each["count"]
        down = sorted({size for size, _ in counts})
        across = sorted({tp for _, tp in counts})
        if len(down) < 2 and axis != "dp":
            continue
        most = max(counts.values(), default=1)
        rows = [[_cell(counts.get((size, tp), 0), most) for tp in across] for size in down]
        found.append(Grid(axis, _AXIS_NAMES[axis], across, down, rows))
    return found


def _cell(count: int, most: int) -> Cell:
    """Shades by the logarithm: most cells are few beside the one of one rank."""
    if not count:
        return Cell(0, 0)
    scale = (count.bit_length() - 1) / max(1, most.bit_length() - 1)
    return Cell(count, 1 + round(scale * (_SHADES - 1)))


def _has_run(failure: Mapping[str, Any]) -> bool:
    return failure["reason"] != NOT_RUN


def _failure(failure: Mapping[str, Any], report: Path) -> dict[str, Any]:
    path = str(report / failure["file"]) if failure["file"] else ""
    findings = []
    for data in failure["findings"]:
        finding = Finding.from_json(data)
        *lines, replay = finding.message(path).split("\n")
        findings.append(
            {
                "message": "\n".join(lines),
                "replay": replay.removeprefix("Replay: "),
                "divergences": finding.divergences,
                "explanations": finding.explanations,
                "case": json.dumps(data["case"], indent=2),
            }
        )
    return {**failure, "findings": findings, "likely": LIKELY}


def _counts(document: Mapping[str, Any]) -> list[tuple[str, int]]:
    verdicts = [row["verdict"] for row in document["properties"]]
    order = ("failed", "unknown", "failed (known)", "not supported", "passed")
    return [(name, verdicts.count(name)) for name in order if name in verdicts]


def css_class(verdict: str) -> str:
    """A verdict as the name of a class: `failed (known)` is `failed-known`."""
    return re.sub(r"\W+", "-", verdict).strip("-")


def _lenses(arithmetic: list[str]) -> str:
    """`exact, fp64, native bfloat16 float32`: only the lens `native` has a choice of dtypes."""
    found: dict[str, set[str]] = {}
    for lens, dtype in (each.split() for each in arithmetic):
        found.setdefault(lens, set()).update({dtype} if lens == "native" else ())
    return ", ".join(" ".join([lens, *sorted(found[lens])]) for lens in LENSES if lens in found)


def seconds_text(value: float) -> str:
    """`12.3 s` or `4 min 5 s`."""
    if value < 60:
        return f"{value:.1f} s"
    return f"{int(value) // 60} min {int(value) % 60} s"
