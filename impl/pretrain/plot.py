"""Losses and gradient norms of runs as an SVG picture: `python -m impl.pretrain.plot --help`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from jinja2 import Environment, StrictUndefined

from impl.pretrain.records import Record, read_log

WIDTH, HEIGHT, LEFT, TOP, BETWEEN = 420, 240, 64, 56, 76
COLOURS = ("#1f6fb4", "#d95f0e", "#31a354", "#756bb1", "#636363")
_TICKS = 5
_LARGEST = 1e300

_TEMPLATE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ width }} {{ height }}" \
width="{{ width }}" height="{{ height }}" role="img" aria-labelledby="title">
<title id="title">Loss and gradient norm of {{ names }}</title>
<style>
text { font: 12px system-ui, sans-serif; fill: #1c1c1c; }
.head { font-weight: 600; font-size: 14px; }
.axis { fill: #5a5a5a; font-size: 10px; }
.grid { stroke: #e4e4e4; }
.curve { fill: none; stroke-linejoin: round; }
</style>
<rect width="100%" height="100%" fill="#ffffff"/>
{% for each in panels %}
<text class="head" x="{{ each.left }}" y="{{ top - 12 }}">{{ each.title }}</text>
{% for tick in each.rows %}
<line class="grid" x1="{{ each.left }}" x2="{{ each.right }}" y1="{{ tick.at }}" \
y2="{{ tick.at }}"/>
<text class="axis" text-anchor="end" x="{{ each.left - 6 }}" y="{{ tick.at + 3 }}">\
{{ tick.text }}</text>
{% endfor %}
{% for tick in each.columns %}
<text class="axis" text-anchor="middle" x="{{ tick.at }}" y="{{ bottom + 16 }}">\
{{ tick.text }}</text>
{% endfor %}
<text class="axis" text-anchor="middle" x="{{ (each.left + each.right) / 2 }}" \
y="{{ bottom + 32 }}">step</text>
{% for curve in each.curves %}
<polyline class="curve" stroke="{{ curve.colour }}" stroke-width="{{ curve.width }}" \
{% if curve.dashes %}stroke-dasharray="{{ curve.dashes }}" {% endif %}points="{{ curve.points }}"/>
{% endfor %}
{% endfor %}
{% for each in legend %}
<line x1="{{ each.x }}" x2="{{ each.x + 22 }}" y1="16" y2="16" stroke="{{ each.colour }}" \
stroke-width="{{ each.width }}" \
{% if each.dashes %}stroke-dasharray="{{ each.dashes }}"{% endif %}/>
<text x="{{ each.x + 28 }}" y="20">{{ each.text }}</text>
{% endfor %}
</svg>
"""


@dataclass(frozen=True)
class Curve:
    """The points (step, value) of a run, finite ones only."""

    name: str
    points: tuple[tuple[float, float], ...]


def write_plot(logs: Mapping[str, Path], path: Path) -> None:
    """The picture of runs by name, from their JSON lines. ValueError for a file that is no log, and
    for one that cannot be written."""
    runs = {name: read_log(log) for name, log in logs.items()}
    for name, records in runs.items():
        if not records:
            raise ValueError(f"plot: {logs[name]} has no steps to show")

    def norm(record: Record) -> float:
        return math.nan if record.skipped else record.grad_norm

    def curves(value: Callable[[Record], float]) -> list[Curve]:
        return [
            Curve(name, tuple((r.step, value(r)) for r in each if math.isfinite(value(r))))
            for name, each in runs.items()
        ]

    text = svg({"loss": curves(lambda r: r.loss), "gradient norm": curves(norm)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"plot: {path}: {error.strerror}") from error


def svg(panels: Mapping[str, Sequence[Curve]]) -> str:
    """The document: panels side by side, the curves of each in the same colours. Later curves are
    thinner and dashed, so that one that lies on another does not hide it."""
    drawn = [
        _panel(title, curves, LEFT + number * (WIDTH + BETWEEN))
        for number, (title, curves) in enumerate(panels.items())
    ]
    names = [curve.name for curve in next(iter(panels.values()))]
    legend, x = [], LEFT
    for number, name in enumerate(names):
        legend.append({"x": x, "text": name, **_stroke(number)})
        x += 52 + 7 * len(name)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(_TEMPLATE).render(
        width=LEFT + len(drawn) * (WIDTH + BETWEEN) - BETWEEN + 20,
        height=TOP + HEIGHT + 44,
        top=TOP,
        bottom=TOP + HEIGHT,
        names=", ".join(names),
        panels=drawn,
        legend=legend,
    )


def _panel(title: str, curves: Sequence[Curve], left: int) -> dict[str, Any]:
    points = [point for curve in curves for point in curve.points] or [(0.0, 0.0)]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    ticks = _ticks(min(y for _, y in points), max(y for _, y in points))
    low, high = ticks[0], ticks[-1]

    def across(x: float) -> float:
        return round(left + WIDTH * (x - first) / max(last - first, 1), 1)

    def up(y: float) -> float:
        return round(TOP + HEIGHT * (high - y) / (high - low), 1)

    return {
        "title": title,
        "left": left,
        "right": left + WIDTH,
        "rows": [{"at": up(y), "text": f"{y:g}"} for y in ticks],
        "columns": [
            {"at": across(x), "text": f"{x:.0f}"} for x in (first, (first + last) // 2, last)
        ],
        "curves": [
            {
                "points": " ".join(f"{across(x)},{up(y)}" for x, y in curve.points),
                **_stroke(number),
            }
            for number, curve in enumerate(curves)
        ],
    }


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from below the lowest to above the highest value. ValueError for values too
    large to have any."""
    largest = max(abs(low), abs(high))
    if largest > _LARGEST:
        raise ValueError(f"plot: there is a value of {largest:g}; it shows up to {_LARGEST:g}")
    # Neighbouring ticks have to be different numbers, however far from zero they are.
    rough = max(high - low, 1e-6, largest * 1e-9) / _TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def _stroke(number: int) -> dict[str, Any]:
    return {
        "colour": COLOURS[number % len(COLOURS)],
        "width": 4 if number == 0 else 1.8,
        "dashes": "" if number == 0 else "6 3",
    }


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="NAME=LOG...")
@click.option("-o", "path", type=click.Path(path_type=Path), required=True, metavar="FILE")
def main(runs: Sequence[str], path: Path) -> None:
    """Draw the losses and gradient norms of several runs into one picture.

    \b
        python -m impl.pretrain.plot "one device=one.jsonl" tp2-cp2-pp2=eight.jsonl -o loss.svg
    """
    pairs = [run.partition("=") for run in runs]
    if missing := [run for run, (_, sign, _) in zip(runs, pairs, strict=True) if not sign]:
        raise click.UsageError(f"{missing[0]} is not NAME=LOG")
    try:
        write_plot({name: Path(log) for name, _, log in pairs}, path)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


if __name__ == "__main__":
    main()
