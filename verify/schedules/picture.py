"""A pipeline schedule for a reader: who computes what when, its bubble, what it keeps.

Lines of at most 100 columns. A long schedule goes on below; what does not fit is left out, and the
text says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

from verify.schedules.laws import Plan
from verify.schedules.table import Compute, Table
from verify.schedules.times import Timed, Times

WIDTH = 100
# The most that is shown: stages, and lines of all of them.
STAGE_LIMIT = 16
LINE_LIMIT = 64

LETTERS = {"forward": "F", "backward": "B", "input": "I", "weight": "W"}
MEANINGS = {
    "forward": "forward",
    "backward": "backward",
    "input": "gradient of the input",
    "weight": "gradients of the weights",
}
STYLES = {
    "forward": "black on bright_cyan",
    "backward": "black on bright_green",
    "input": "black on bright_green",
    "weight": "black on bright_yellow",
}
_IDLE = "·"

# A character and its style.
_Cell = tuple[str, str]


def label_of(compute: Compute, vpp: int) -> str:
    """A work in a few characters: F3 is the forward of microbatch 3; with several chunks F3a, F3b,
    ... on the stage's first, second, ... of them."""
    chunk = "" if vpp == 1 else chr(ord("a") + compute.chunk) if vpp <= 26 else f".{compute.chunk}"
    return f"{LETTERS[compute.work]}{compute.microbatch}{chunk}"


def title(plan: Plan) -> str:
    """What the picture shows."""
    counts = {"stage": plan.pp, "chunk": plan.vpp, "microbatch": plan.microbatches}
    plurals = {"stage": "stages", "chunk": "chunks", "microbatch": "microbatches"}
    stages, chunks, microbatches = (
        f"{count} {name if count == 1 else plurals[name]}" for name, count in counts.items()
    )
    return f"{plan.kind}: {stages}" + f" of {chunks}" * (plan.vpp > 1) + f", {microbatches}"


def works_of(plan: Plan) -> tuple[str, ...]:
    """The kinds of work in a schedule."""
    halves = ("input", "weight") if plan.kind == "zb-h1" else ("backward",)
    return ("forward", *halves)


def picture(table: Table, plan: Plan) -> list[Text]:
    """The lines of the picture; colours come out on a terminal only."""
    times = Times(table, plan.vpp)
    return [*map(Text, _head(plan)), *_chart(times, plan), Text(), *map(Text, facts(times, plan))]


def facts(times: Times, plan: Plan) -> list[str]:
    """The bubble, and the activations that every stage keeps at most, in words."""
    idle, span = times.bubble, times.span
    lines = [
        f"bubble  {idle} of {span} units of time: {idle / span:.1%}, or"
        f" {idle / plan.work:.1%} of the work"
    ]
    what = "microbatches" if plan.vpp == 1 else f"microbatches on 1 of {plan.vpp} chunks"
    for until in plan.peaks():
        most = times.peaks(until=until)
        shown = [str(each) for each in most[:STAGE_LIMIT]]
        shown += ["..."] if len(most) > STAGE_LIMIT else []
        name = "" if until != ("weight",) else ", until their weights' gradients"
        lines.append(f"peak    {' '.join(shown)} {what}{name}, by stage")
    return lines


def _head(plan: Plan) -> list[str]:
    legend = [f"{LETTERS[work]} {MEANINGS[work]}" for work in works_of(plan)]
    legend += ["a, b, ... chunk"] if plan.vpp > 1 else []
    units = "a backward takes two units, all else one"
    units = "each takes one unit" if plan.kind == "zb-h1" else units
    return [title(plan), f"{', '.join(legend)}, {_IDLE} idle; {units}", ""]


def _chart(times: Times, plan: Plan) -> Iterator[Text]:
    labels = [label_of(t.compute, plan.vpp) for stage in times.stages for t in stage]
    unit = max(map(len, labels))
    margin = len(f"stage {plan.pp - 1} ")
    columns = (WIDTH - margin) // unit
    shown: list[int | None] = list(range(plan.pp))
    if plan.pp > STAGE_LIMIT:
        shown = [*range(STAGE_LIMIT - 1), None, plan.pp - 1]
    rows = {s: _row(times.stages[s], times.span, unit, plan.vpp) for s in shown if s is not None}
    panels = -(-times.span // columns)
    fit = max(LINE_LIMIT // (len(shown) + 2), 1)
    for panel in range(min(panels, fit)):
        first = panel * columns
        until = min(first + columns, times.span)
        yield from [Text()] if panel else []
        yield Text(" " * margin + _scale(first, until, unit))
        for stage in shown:
            if stage is None:
                yield Text("...")
                continue
            line = Text(f"stage {stage}".ljust(margin))
            for character, style in rows[stage][first * unit : until * unit]:
                line.append(character, style)
            line.rstrip()
            yield line
    if panels > fit:
        yield Text(f"left out: {times.span - fit * columns} of {times.span} units of time")
    if plan.pp > STAGE_LIMIT:
        yield Text(f"left out: {plan.pp - STAGE_LIMIT} of {plan.pp} stages")


def _row(stage: Sequence[Timed], span: int, unit: int, vpp: int) -> list[_Cell]:
    row: list[_Cell] = [(_IDLE, "dim")] * (span * unit)
    for timed in stage:
        text = label_of(timed.compute, vpp).ljust((timed.end - timed.begin) * unit)
        style = STYLES[timed.compute.work]
        row[timed.begin * unit : timed.end * unit] = [(character, style) for character in text]
    return row


def _scale(first: int, until: int, unit: int) -> str:
    """The time above every fifth unit."""
    text = ""
    for time in range(first, until):
        if time % 5 == 0 and len(text) <= (time - first) * unit:
            text = text.ljust((time - first) * unit) + str(time)
    return text[: (until - first) * unit]
