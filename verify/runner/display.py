"""How a run looks while it goes: bars on a terminal, one line for each property elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from verify.report.table import STYLES, print_summary
from verify.runner.collector import Listener
from verify.runner.options import RunOptions
from verify.runner.record import Record
from verify.verdict import Verdict


class Display(Listener):
    """Shows a run on a console; a plugin of pytest, in the place of its own terminal output."""

    def __init__(self, console: Console, options: RunOptions, *, tracebacks: bool) -> None:
        self.console, self.options, self.tracebacks = console, options, tracebacks
        self.document: dict[str, Any] | None = None
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._total: TaskID | None = None
        self._done = 0

    def collected(self, names: Sequence[str]) -> None:
        """Say what will run."""
        options = self.options
        if self._done == 0:
            where = " on ".join(filter(None, (options.cluster, options.device)))
            self.console.print(
                f"shardproof: {options.target} on {where}, {len(names)} properties,"
                f" {options.max_examples} examples each, seed {options.seed}"
            )
        if self.console.is_terminal and self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self.console,
                transient=True,
            )
            self._total = self._progress.add_task("properties", total=len(names))
            self._progress.start()

    def started(self, name: str) -> None:
        """Show a bar for the property."""
        if self._progress is not None:
            total = self.options.max_examples
            self._tasks[name] = self._progress.add_task(Text(name).plain, total=total)

    def example(self, name: str, count: int) -> None:
        """Move the property's bar."""
        if self._progress is not None and name in self._tasks:
            self._progress.update(self._tasks[name], completed=count)

    def finished(self, record: Record, text: str) -> None:
        """One line for the property, and what is to say if it did not pass."""
        self._done += 1
        if self._progress is not None:
            if record.property in self._tasks:
                self._progress.remove_task(self._tasks.pop(record.property))
            if self._total is not None:
                self._progress.update(self._total, completed=self._done)
        verdict = record.verdict.value
        counts = (
            f"{record.examples} examples, {len(record.layouts)} layouts, {record.seconds:.1f} s"
        )
        line = Text.assemble((f"{verdict:14}", STYLES[verdict]), f" {record.property}: {counts}")
        self.console.print(line, soft_wrap=True)
        if text:
            known = record.verdict is Verdict.KNOWN
            self.console.print(Text(text if known else f"\n{text}\n"), soft_wrap=True)

    def ended(self, document: dict[str, Any]) -> None:
        """The table."""
        self.stop()
        self.document = document
        self.console.print()
        print_summary(self.console, document, self.options.report)

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> Any:
        """Show the traceback that pytest made, where one is wanted."""
        if report.failed and self.tracebacks and not isinstance(report.longrepr, str):
            self.console.print(Text(report.longreprtext), soft_wrap=True)
        return (yield)

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Take the place of pytest's terminal output."""
        config.pluginmanager.unregister(name="terminalreporter")

    def pytest_internalerror(self, excrepr: object, excinfo: pytest.ExceptionInfo[Any]) -> bool:
        """Say that pytest or a plugin broke, in one line unless tracebacks are wanted."""
        self.stop()
        what = f"\n{excrepr}" if self.tracebacks else f" {excinfo.exconly()}"
        print(f"shardproof: error: pytest broke:{what}", file=sys.stderr)
        return True
