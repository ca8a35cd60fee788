"""`shardproof campaign`: sends units out, keeps what comes back, and says how it goes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from verify.campaign.document import Merge
from verify.campaign.engine import Engine, Outcome, engine
from verify.campaign.journal import Journal
from verify.campaign.plan import Plan, Unit
from verify.campaign.summary import print_summary, write_campaign
from verify.campaign.work import do
from verify.console import console_of_stdout
from verify.runner.pytest_run import known_findings

PASSED, NOT_PASSED = 0, 1
_WRITE_SECONDS = 2.0


def campaign(
    plan: Plan, *, address: str | None, workers: int | None, resume: bool, timeout: float
) -> int:
    """Run a campaign to its end: 0 if the gate opens, 1 if it does not.

    `timeout` is the most seconds of a unit. Raises BadArgument for options that fit nothing here,
    and for a directory that has, or has not, a campaign to resume.
    """
    known_findings(plan.run, names_package=True)
    with engine(address, workers, do) as started:
        journal = Journal(plan.run.report, plan, resume=resume)
        try:
            return Campaign(plan, journal, started, timeout, console_of_stdout()).run()
        finally:
            journal.close()


class Campaign:
    """One campaign, as it goes."""

    def __init__(
        self, plan: Plan, journal: Journal, engine: Engine, timeout: float, console: Console
    ) -> None:
        self.plan, self.journal, self.engine = plan, journal, engine
        self.timeout, self.console = timeout, console
        self.merge = Merge(plan, plan.run.report)
        self._began = self._written = time.monotonic()
        self._examples = journal.examples()

    def run(self) -> int:
        """Do all units that are not done, those that failed before first, once more."""
        for unit, document in self.journal.documents():
            self.merge.add(unit, document)
        units = [unit for unit in self.plan.units() if unit not in self.journal.done]
        again = self._again()
        self._say_what(units, again)
        try:
            with self._progress() as progress:
                task = progress.add_task("units", total=len(units) + len(again))
                for outcome in self.engine.outcomes([*again, *units], self._arguments):
                    if outcome is not None:
                        self._take(outcome)
                        progress.advance(task, 0 if outcome.retried else 1)
                    self._write_now_and_then()
        except BaseException:
            self._write(finished=False)
            raise
        document = self._write(finished=True)
        print_summary(self.console, document, self.plan.run.report)
        return PASSED if document["opens_gate"] else NOT_PASSED

    def _again(self) -> list[Unit]:
        """A unit for each suite of which there are failing examples."""
        failing = self.merge.failing()
        return [Unit(suite, 0, again=True) for suite in self.plan.suites if suite in failing]

    def _say_what(self, units: Sequence[Unit], again: Sequence[Unit]) -> None:
        plan = self.plan
        done = f", {len(self.journal.done)} done before" if self.journal.done else ""
        once_more = f", and {len(again)} suites with failures once more" if again else ""
        self.console.print(
            f"shardproof campaign: {plan.run.target}, {len(plan.suites)} suites, seeds {plan.first}"
            f" to {plan.end - 1}: {len(units)} units{done}{once_more}; {self.engine.workers}"
            f" workers, {plan.run.max_examples} examples a property",
            soft_wrap=True,
        )

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=40), MofNCompleteColumn(),
            TimeElapsedColumn(), console=self.console, transient=True,
            disable=not self.console.is_terminal,
        )  # fmt: skip

    def _arguments(self, unit: Unit) -> tuple[object, ...]:
        options = self.plan.options(unit).arguments()
        at = options.index("--report")
        options[at : at + 2] = []
        options += ["--again"] * unit.again
        examples = self._examples if unit.again else {}
        return options, os.getcwd(), examples, self.timeout

    def _take(self, outcome: Outcome) -> None:
        unit, document = outcome.unit, outcome.document
        if document is None:
            self.merge.lost_attempts += 1
            what = "tried again" if outcome.retried else "given up"
            self.console.print(Text(f"lost    {unit}: {outcome.lost}; {what}"), soft_wrap=True)
            if not outcome.retried:
                self.merge.lost[unit] = outcome.lost
                self.journal.lose(unit, outcome.lost)
            return
        if unit.again:
            self.merge.again(unit.suite, document)
            # A property of which no example is kept is skipped, and that is a failure of a run.
            fail = [f for f in document["failures"] if f["findings"] or f["verdict"] == "failed"]
            said = f"{len(fail)} properties have failing examples"
        else:
            self.journal.finish(unit, document, outcome.examples)
            before = len(self.merge.failures)
            self.merge.add(unit, document)
            new = len(self.merge.failures) - before
            said = f"{document['verdict']}, {document['coverage']['examples']} examples,"
            said += f" {document['seconds']:.1f} s" + f", {new} new failures" * bool(new)
        self.console.print(Text(f"done    {unit}: {said}"), soft_wrap=True)

    def _write_now_and_then(self) -> None:
        if time.monotonic() - self._written > _WRITE_SECONDS:
            self._write(finished=False)

    def _write(self, *, finished: bool) -> dict[str, object]:
        seconds = time.monotonic() - self._began
        document = self.merge.describe(
            seconds=seconds, finished=finished, workers=self.engine.workers
        )
        write_campaign(Path(self.plan.run.report), document)
        self._written = time.monotonic()
        return document
