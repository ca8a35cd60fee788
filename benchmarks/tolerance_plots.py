"""The plots of `benchmarks/tolerances.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.lines import Line2D

# Of Okabe and Ito, told apart by all eyes.
COLOURS = {"float32": "#0072B2", "bfloat16": "#D55E00", "float16": "#009E73"}
RIGHT, WRONG, GREY = "#0072B2", "#D55E00", "#555555"
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "svg.hashsalt": "shardproof",
}
_NOTHING = 1e-3


def draw_sizes(
    points: Mapping[tuple[str, str], Sequence[Any]],
    labels: Mapping[str, tuple[str, str]],
    path: Path,
) -> None:
    """A panel for each operation: relative errors as dots, what is allowed as a line, by dtype."""
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(2, 4, figsize=(13, 6), sharey=True, layout="constrained")
        for axis, (name, (along, result)) in zip(axes.flat, labels.items(), strict=True):
            for dtype, colour in COLOURS.items():
                line = points[name, dtype]
                sizes = [point.size for point in line]
                allowed = [max(e.allowed for e in point.errors) for point in line]
                axis.plot(sizes, allowed, color=colour, linewidth=1.5)
                for point in line:
                    off = [e.relative for e in point.errors if e.relative]
                    axis.plot([point.size] * len(off), off, "o", color=colour, markersize=3)
            axis.set(xscale="log", yscale="log", title=f"{name}: {result}", xlabel=along)
            axis.set_xticks(sizes, [str(size) for size in sizes], minor=False)
            axis.minorticks_off()
            axis.grid(axis="y", color="#dddddd", linewidth=0.5)
        for axis in axes[:, 0]:
            axis.set_ylabel("distance from float64,\nrelative")
        lines = [Line2D([], [], color=colour, label=dtype) for dtype, colour in COLOURS.items()]
        lines += [
            Line2D([], [], color=GREY, label="allowed"),
            Line2D([], [], color=GREY, marker="o", linestyle="", label="impl, by seed"),
        ]
        figure.legend(handles=lines, loc="outside upper right", ncols=5, frameon=False)
        _save(figure, path)


def draw_margins(beyond: Mapping[str, tuple[list[float], list[float]]], path: Path) -> None:
    """A row for each mutant: errors over what is allowed, of impl and of the mutant."""
    with pyplot.rc_context(_STYLE):
        figure, axis = pyplot.subplots(figsize=(9, 0.45 * len(beyond) + 1.4), layout="constrained")
        for row, (right, wrong) in enumerate(beyond.values()):
            for ratios, colour, marker in ((right, RIGHT, "o"), (wrong, WRONG, "D")):
                seen = [max(ratio, _NOTHING) for ratio in ratios]
                axis.plot(seen, [row] * len(seen), marker, color=colour, markersize=5)
        axis.axvline(1.0, color=GREY, linewidth=1)
        axis.set_yticks(range(len(beyond)), list(beyond))
        axis.set(xscale="log", xlabel="largest error over what is allowed", ylim=(-0.6, None))
        axis.invert_yaxis()
        axis.grid(axis="x", color="#dddddd", linewidth=0.5)
        lines = [
            Line2D([], [], marker=marker, linestyle="", color=colour, label=label)
            for marker, colour, label in (("o", RIGHT, "impl"), ("D", WRONG, "the mutant"))
        ]
        figure.legend(handles=lines, loc="outside upper right", ncols=2, frameon=False)
        _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """As SVG, and without a date, so that the same figures are the same file."""
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
