"""The pytest plugin where properties run: the fixture `check`, and a `Record` with every report.

A report carries its record as JSON in `user_properties`, which is also how it travels from xdist's
workers.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import format_exception
from typing import Any

import pytest
from hypothesis import is_hypothesis_test, reject

from verify.case import Case
from verify.check_fixture import CheckCase
from verify.cluster import open_cluster
from verify.errors import BadArgument, Mismatch, NotSupported
from verify.interrupts import DeferredInterrupt
from verify.limits import Limits
from verify.options import RunOptions
from verify.property import CHECKS
from verify.record import Record, file_name, property_name
from verify.recorder import Recorder, Undecided, told
from verify.targets import load_target
from verify.verdict import Verdict

RECORD, RANK_STATE = "shardproof record", "shardproof rank state"
FAILURES = "failures"


def failure_path(report: Path, name: str) -> Path:
    """Where the failure of a property is written."""
    return report / FAILURES / file_name(name)


def failure_text(record: Record, options: RunOptions) -> str:
    """What is printed of a property that did not pass."""
    path = failure_path(options.report, record.property)
    texts = [
        finding.message(str(path)) + (f"\n\n{finding.table()}" if finding.divergences else "")
        for finding in record.findings
    ]
    if record.reason or not texts:
        texts.append(f"{record.property}: {record.verdict.value}: {record.reason}")
    if not record.findings:
        texts.append(f"Again: shardproof run {' '.join(again(record, options))}")
    return "\n\n".join(texts)


def again(record: Record, options: RunOptions) -> list[str]:
    """Arguments of `shardproof run` that draw the examples of a property again."""
    given = options.arguments()
    suites = ["--suite", record.suite]
    if "--suite" in given:
        at = given.index("--suite")
        given[at : at + 2] = []
    at = given.index("--report")
    given[at : at + 2] = []
    return given + suites


class Examiner:
    """Runs the properties of one process on one cluster, and records what they show."""

    def __init__(self, options: RunOptions, limits: Limits, config: pytest.Config) -> None:
        self.options, self.limits, self.config = options, limits, config
        self.recorder: Recorder | None = None
        self.on_example: Callable[[str, int], None] = lambda name, count: None
        self._record: Record | None = None
        self._rank_state = ""
        self._interrupt = DeferredInterrupt()

    @contextmanager
    def checking(self) -> Iterator[CheckCase]:
        """What the fixture `check` is, on the run's cluster."""
        size = self.limits.max_world_size or 1
        with open_cluster(self.options.cluster, world_size=size) as cluster:  # type: ignore[attr-defined]

            def check(name: str, case: Case) -> None:
                self._check(name, case, cluster)

            yield check

    def _check(self, name: str, case: Case, cluster: Any) -> None:
        recorder = self.recorder
        assert recorder is not None, "check is used outside of a test"
        if reason := self.limits.excludes(case):
            recorder.left_out(reason)
            reject()
        began = time.monotonic()
        try:
            if name not in CHECKS:
                raise BadArgument(f"check: {name!r} is not one of {', '.join(CHECKS)}")
            CHECKS[name](case, target_name=self.options.target, cluster=cluster)
        except NotSupported as error:
            recorder.not_supported(case, error)
        except Mismatch as mismatch:
            recorder.failed(mismatch)
            raise
        except Exception as error:
            if recorder.skips_undecided(time.monotonic() - began):
                reject()
            raise Undecided(error) from error
        else:
            recorder.checked(case)

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Leave out the files of suites that are not wanted."""
        name = collection_path.name
        if not self.options.suites or not name.startswith("test_") or collection_path.is_dir():
            return None
        return True if property_name(name) not in self.options.suites else None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Let an interrupt wait until the ranks are at rest."""
        with DeferredInterrupt() as self._interrupt:
            done = yield
        if self._interrupt.asked:
            item.session.shouldstop = "interrupted"
        return done

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Function) -> Generator[None, object, object]:
        """Record every example of a property."""
        self._record = None
        self.recorder = recorder = Recorder(
            property_name(item.nodeid),
            must_check="check" in item.fixturenames,
            on_example=self.on_example,
        )
        raised: BaseException | None = None
        try:
            with _recorded(item, recorder, self._interrupt):
                return (yield)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raised = error
            raise
        finally:
            self._record = recorder.conclude(raised)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Give the report its record, and a text that is about the failure and not about pytest."""
        report = yield
        record = self._record_of(report, call)
        if record is None:
            return report
        self.recorder = None
        report.user_properties.append((RECORD, json.dumps(record.to_json())))
        self._tell_rank_state(report)
        if record.verdict in (Verdict.FAILED, Verdict.UNKNOWN):
            report.outcome = "failed"
            if not self._wants_tracebacks() or report.longrepr is None:
                report.longrepr = failure_text(record, self.options)
                report.sections = []
        return report

    def _record_of(self, report: pytest.TestReport, call: pytest.CallInfo[None]) -> Record | None:
        name = property_name(report.nodeid)
        if report.skipped:
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            return Record(property=name, verdict=Verdict.UNKNOWN, reason=f"skipped: {why}")
        if report.when == "call":
            return self._record
        if not report.failed or call.excinfo is None:
            return None
        error = call.excinfo.value
        reason = f"{report.when} ended in {told(error)}"
        trace = "".join(format_exception(error))
        return Record(property=name, verdict=Verdict.UNKNOWN, reason=reason, traceback=trace)

    def _tell_rank_state(self, report: pytest.TestReport) -> None:
        ask = getattr(load_target(self.options.target), "rank_state_report", None)
        told = json.dumps(ask()) if ask else ""
        if told != self._rank_state:
            self._rank_state = told
            report.user_properties.append((RANK_STATE, told))

    def _wants_tracebacks(self) -> bool:
        return self.config.option.verbose >= 2 or bool(getattr(self.config.option, "debug", None))


class _recorded:
    """While open, every run of a test's function is an example of the recorder."""

    def __init__(
        self, item: pytest.Function, recorder: Recorder, interrupt: DeferredInterrupt
    ) -> None:
        self._interrupt = interrupt
        self._holder: Any = item
        self._name = "obj"
        if is_hypothesis_test(item.obj):
            self._holder, self._name = item.obj.hypothesis, "inner_test"
        self._inner = getattr(self._holder, self._name)
        self._recorder = recorder

    def __enter__(self) -> None:
        inner, recorder, interrupt = self._inner, self._recorder, self._interrupt

        @functools.wraps(inner)
        def example(*args: Any, **kwargs: Any) -> Any:
            interrupt.check()
            with recorder.example(kwargs):
                return inner(*args, **kwargs)

        setattr(self._holder, self._name, example)

    def __exit__(self, *error: object) -> None:
        setattr(self._holder, self._name, self._inner)
