"""The pytest plugin where reports arrive: gathers the records of all properties, writes the report
after each of them, and says the verdict.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from verify.known import KnownFindings
from verify.report import RunFacts, describe_failure, describe_run, write
from verify.report.page import write_page
from verify.report.table import summary
from verify.runner.examiner import (
    FAILURES,
    RANK_STATE,
    RECORD,
    Examiner,
    failure_path,
    failure_text,
    known_text,
)
from verify.runner.options import RunOptions
from verify.runner.record import NOT_RUN, Record, property_name
from verify.verdict import Verdict


class Listener:
    """Is told how a run goes, if it is registered with pytest as a plugin."""

    def collected(self, names: Sequence[str]) -> None:
        """These properties will run."""

    def started(self, name: str) -> None:
        """A property begins."""

    def example(self, name: str, count: int) -> None:
        """A property has done `count` examples; not told where xdist's workers run it."""

    def finished(self, record: Record, text: str) -> None:
        """A property has ended; `text` is what there is to say if it did not pass."""

    def ended(self, document: dict[str, Any]) -> None:
        """The run has ended, and its report is written."""


class Collector:
    """Everything that is known of the run."""

    def __init__(
        self, options: RunOptions, world_size: int, known: KnownFindings, config: pytest.Config
    ) -> None:
        self.options, self.config, self.max_world_size = options, config, world_size
        self.known = known
        self.records: dict[str, Record] = {}
        self._expected: dict[str, None] = {}
        self._rank_state: dict[str, dict[str, None]] = {}
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._clock = time.monotonic()
        self._clear()

    @property
    def _listeners(self) -> list[Listener]:
        plugins = self.config.pluginmanager.get_plugins()
        return [plugin for plugin in plugins if isinstance(plugin, Listener)]

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Pass on what the examiner of this process counts."""
        for plugin in self.config.pluginmanager.get_plugins():
            if isinstance(plugin, Examiner):
                plugin.on_example = self._example

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Give xdist's worker the seed, which may be a fresh one."""
        node.workerinput["shardproof_seed"] = self.options.seed

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note what will run."""
        self._expect([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        """Note what xdist's workers will run."""
        self._expect(ids)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported has properties of which nothing is known."""
        if report.failed:
            name = property_name(report.nodeid)
            known = Record(property=name, verdict=Verdict.UNKNOWN, reason=report.longreprtext)
            self._finish(known)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Tell that a property begins."""
        for listener in self._listeners:
            listener.started(property_name(nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in what is known of a property."""
        name, record = property_name(report.nodeid), None
        for key, value in report.user_properties:
            if key == RECORD:
                record = Record.from_json(json.loads(str(value)))
            elif key == RANK_STATE:
                self._add_rank_state(json.loads(str(value)))
        if report.when == "teardown" and report.passed:
            return
        if record is None and report.failed:
            record = Record(property=name, verdict=Verdict.UNKNOWN, reason=report.longreprtext)
        if record is not None:
            before = self.records.get(name)
            worse = before and before.worsened(record.verdict, record.reason)
            self._finish(worse or record)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the report, with `unknown` for what did not finish, and fail a run that shows
        nothing."""
        missing = [name for name in self._expected if name not in self.records]
        for name in missing:
            if running := self._running(name):
                self._finish(running)
        document = self._write(finished=not missing)
        write_page(self.options.report / "index.html", document)
        if session.exitstatus == pytest.ExitCode.OK and not document["opens_gate"]:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        for listener in self._listeners:
            listener.ended(document)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The table of verdicts."""
        terminalreporter.section("shardproof")
        width = terminalreporter._tw.fullwidth
        colour = terminalreporter._tw.hasmarkup
        text = summary(self._document, self.options.report, width=width, colour=colour)
        terminalreporter.write(text)

    def _expect(self, nodeids: Iterable[str]) -> None:
        fresh = {property_name(nodeid): None for nodeid in nodeids}
        if not set(fresh) - set(self._expected):
            return
        self._expected |= fresh
        self._write(finished=False)
        for listener in self._listeners:
            listener.collected(list(self._expected))

    def _example(self, name: str, count: int) -> None:
        for listener in self._listeners:
            listener.example(name, count)

    def _finish(self, record: Record) -> None:
        self.records[record.property] = record
        text = ""
        if record.findings:
            path = failure_path(self.options.report, record.property)
            write(path, describe_failure(self._facts(finished=True), record))
        if record.verdict in (Verdict.FAILED, Verdict.UNKNOWN):
            text = failure_text(record, self.options, self.known)
        if record.verdict is Verdict.KNOWN:
            text = known_text(record)
        self._write(finished=False)
        for listener in self._listeners:
            listener.finished(record, text)

    def _running(self, name: str) -> Record | None:
        """What is known of a property that is cut short in this process."""
        for plugin in self.config.pluginmanager.get_plugins():
            running = plugin.recorder if isinstance(plugin, Examiner) else None
            if running is not None and running.name == name:
                return self.known.applied(running.interrupted())
        return None

    def _add_rank_state(self, told: dict[str, list[str]]) -> None:
        for name, lines in told.items():
            self._rank_state.setdefault(name, {}).update(dict.fromkeys(lines))

    def _facts(self, *, finished: bool) -> RunFacts:
        return RunFacts(
            options=self.options,
            max_world_size=self.max_world_size,
            workers=len(getattr(self.config.option, "tx", None) or ()),
            started=self._started,
            seconds=time.monotonic() - self._clock,
            finished=finished,
            rank_state={name: list(lines) for name, lines in self._rank_state.items()},
        )

    def _write(self, *, finished: bool) -> dict[str, Any]:
        """Write what is known; until the end, what has not run yet is `unknown` too."""
        waiting = {
            name: Record(property=name, verdict=Verdict.UNKNOWN, reason=NOT_RUN)
            for name in self._expected
        }
        known = {**waiting, **self.records}
        self._document = describe_run(self._facts(finished=finished), list(known.values()))
        write(self.options.report / "report.json", self._document)
        return self._document

    def _clear(self) -> None:
        """Remove the report of an earlier run, so that none of it is taken for one of this run."""
        for name in ("report.json", "index.html"):
            (self.options.report / name).unlink(missing_ok=True)
        for path in (self.options.report / FAILURES).glob("*.json"):
            path.unlink()
