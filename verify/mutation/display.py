"""How a mutation score looks: while it is found, and then as a table of at most 100 columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from verify.mutation.document import complaints
from verify.mutation.outcome import Outcome

STYLES = {"caught": "green", "survived": "bold red", "unknown": "bold yellow"}


class Progression:
    """Bars on a terminal, elsewhere one line a mutant."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._running: dict[str, None] = {}

    def phase(self, what: str, total: int) -> None:
        """So many things will be done."""
        self.stop()
        self._running.clear()
        if not self.console.is_terminal:
            self.console.print(f"{total} {what}")
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[running]}"),
            console=self.console,
            transient=True,
        )
        self._task = self._progress.add_task(what, total=total, running="")
        self._progress.start()

    def begun(self, name: str) -> None:
        """One of them has begun."""
        self._running[name] = None
        self._show(0)

    def done(self, name: str, outcome: Outcome | None) -> None:
        """One of them is done."""
        self._running.pop(name, None)
        self._show(1)
        if outcome is not None:
            by = f" by {outcome.caught_by}" if outcome.caught_by else ""
            fate = outcome.fate.value
            line = f" {name}{by}: {outcome.examples} examples, {outcome.seconds:.1f} s"
            reason = outcome.reason.strip().rpartition("\n")[2]
            self.console.print(
                Text.assemble((f"{fate:9}", STYLES[fate]), line, f": {reason}" if reason else "")
            )

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _show(self, advance: int) -> None:
        if self._progress is not None:
            running = ", ".join(self._running)[:40]
            self._progress.update(self._task, advance=advance, running=running)


def print_score(console: Console, document: Mapping[str, Any]) -> None:
    """The kill matrix, the sums, and what is not as it should be."""
    console.print(_matrix(document))
    console.print()
    if document["every"]:
        console.print(_catchers(document))
        console.print()
    console.print(_sums(document))
    console.print()
    for line in complaints(document):
        console.print(Text(line, "bold red"))
    total, target = document["total"], document["target"]
    console.print(
        f"{total['caught']} of {total['mutants']} mutants of {target['name']} caught, score"
        f" {_percent(total['score'])}; {total['survived']} survived ({total['equivalent']}"
        f" equivalent), {total['unknown']} unknown; detection {_time(total['median_seconds'])}"
        f" median, {_time(total['worst_seconds'])} worst; {document['seconds']:.0f} s in all"
    )


def _matrix(document: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("mutant", overflow="fold", max_width=34)
    table.add_column("class", overflow="fold", max_width=12)
    table.add_column("caught by, and the case", overflow="fold")
    for name in ("examples", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in document["mutants"]:
        if row["caught_by"]:
            how = Text.assemble(row["caught_by"], "\n", (row["case_text"] or row["message"], "dim"))
        else:
            why = row["equivalent"] or row["reason"] or ", ".join(row["properties"])
            how = Text.assemble((row["fate"], STYLES[row["fate"]]), "\n", (why, "dim"))
        seconds = f"{row['seconds']:.1f} s"
        table.add_row(Text(row["name"]), row["class"], how, str(row["examples"]), seconds)
    return table


def _catchers(document: Mapping[str, Any]) -> Table:
    """How many mutants each property catches of those that it was run on, and which it alone, as
    far as all others have passed."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("property", overflow="fold")
    for name in ("run on", "fails on", "alone"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("which are", overflow="fold")
    ran, failing = Counter[str](), Counter[str]()
    alone: dict[str, list[str]] = {}
    for row in document["mutants"]:
        ran.update(row["properties"])
        failing.update(row["failing"])
        if len(row["failing"]) == 1 and not row["undecided"]:
            alone.setdefault(row["failing"][0], []).append(row["name"])
    for name in sorted(ran, key=lambda each: (-failing[each], each)):
        own = alone.get(name, [])
        table.add_row(name, str(ran[name]), str(failing[name]), str(len(own)), ", ".join(own))
    return table


def _sums(document: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("class")
    for name in ("mutants", "caught", "survived", "equivalent", "unknown", "score"):
        table.add_column(name, justify="right")
    for name in ("median", "worst"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, each in (*document["classes"].items(), ("all", document["total"])):
        counts = ("mutants", "caught", "survived", "equivalent", "unknown")
        table.add_row(
            Text(name),
            *(str(each[count]) for count in counts),
            _percent(each["score"]),
            _time(each["median_seconds"]),
            _time(each["worst_seconds"]),
        )
    return table


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{100 * score:.1f}%"


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s"
