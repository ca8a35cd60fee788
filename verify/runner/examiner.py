"""The pytest plugin where properties run: the fixture `check`, and a `Record` with every report.

A report carries its record as JSON in `user_properties`, which is also how it travels from xdist's
workers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import format_exception

import pytest
from hypothesis import is_hypothesis_test

from verify.case import Case
from verify.cluster import open_cluster
from verify.cluster.base import Cluster
from verify.errors import BadArgument, WorldLost
from verify.known import KnownFindings
from verify.runner.check_fixture import CheckCase
from verify.runner.draws import limited, name_examples, seeded
from verify.runner.exercise import Recorded, check_case
from verify.runner.interrupts import DeferredInterrupt
from verify.runner.limits import Limits
from verify.runner.options import SEED_BITS, RunOptions
from verify.runner.record import Record, file_name, property_name
from verify.runner.recorder import Recorder, Undecided, told
from verify.targets import load_target
from verify.verdict import Judgement, Verdict, judge

RECORD, RANK_STATE = "shardproof record", "shardproof rank state"
FAILURES = "failures"
# Of a property that was offered pairs and has not shown them: so many times so many more examples.
FURTHER, FURTHER_EXAMPLES = 10, 10


def failure_path(report: Path, name: str) -> Path:
    """Where the failure of a property is written."""
    return report / FAILURES / file_name(name)


def failure_text(record: Record, options: RunOptions, known: KnownFindings) -> str:
    """What is printed of a property that did not pass, and of what is known of it no more than
    that."""
    path = failure_path(options.report, record.property)
    texts = [
        finding.message(str(path)) + (f"\n\n{finding.table()}" if finding.divergences else "")
        for finding in record.findings
        if known.number(record.property, finding) is None
    ]
    if record.reason or not texts:
        texts.append(f"{record.property}: {record.verdict.value}: {record.reason}")
        texts.append(f"Again: shardproof run {' '.join(again(record, options))}")
    if beside := known_text(record):
        texts.append(beside)
    return "\n\n".join(texts)


def known_text(record: Record) -> str:
    """What is printed of a property that failed as known: why, and where that is on record."""
    seen = [each for each in record.known if each.state == "fails"]
    return "\n".join(f"  known: {each.reason} ({each.reference})" for each in seen)


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

    def __init__(
        self, options: RunOptions, limits: Limits, known: KnownFindings, config: pytest.Config
    ) -> None:
        self.options, self.limits, self.known, self.config = options, limits, known, config
        self.recorder: Recorder | None = None
        self.on_example: Callable[[str, int], None] = lambda name, count: None
        self._record: Record | None = None
        self._cluster: Cluster | None = None
        self._lost = ""
        self._rank_state = ""
        self._interrupt = DeferredInterrupt()

    @contextmanager
    def checking(self) -> Iterator[CheckCase]:
        """What the fixture `check` is, on the run's cluster."""
        size = self.limits.max_world_size or 1
        with open_cluster(
            self.options.cluster, world_size=size, device=self.options.device
        ) as cluster:  # type: ignore[attr-defined]

            def check(name: str, case: Case) -> None:
                self._check(name, case, cluster)

            self._cluster = cluster
            yield check
            self._cluster = None

    def _check(self, name: str, case: Case, cluster: Cluster) -> None:
        recorder = self.recorder
        assert recorder is not None, "check is used outside of a test"
        check_case(
            name,
            case,
            target=self.options.target,
            cluster=cluster,
            limits=self.limits,
            recorder=recorder,
            known=lambda finding: self.known.number(recorder.name, finding),
        )

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Leave out the files of suites that are not wanted."""
        name = collection_path.name
        if not self.options.suites or not name.startswith("test_") or collection_path.is_dir():
            return None
        return True if property_name(name) not in self.options.suites else None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Let an interrupt wait until the ranks are at rest, and end the run with its world."""
        with DeferredInterrupt() as self._interrupt:
            done = yield
        if self._interrupt.asked:
            item.session.shouldstop = "interrupted"
        if self._lost:
            item.session.shouldstop = self._lost
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
        if self.options.database is not None and is_hypothesis_test(item.obj):
            name_examples(item.obj, recorder.name)
        raised: BaseException | None = None
        try:
            with Recorded(item, recorder, self._interrupt):
                done = yield
                self._draw_on(item, recorder)
                return done
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raised = error
            if isinstance(error, Undecided) and isinstance(error.error, WorldLost):
                self._lost = str(error.error)
            raise
        finally:
            concluded = recorder.conclude(raised)
            self._record = self.known.applied(concluded, self._rerun)

    def _draw_on(self, item: pytest.Function, recorder: Recorder) -> None:
        """Where all pairs are required, run a property that was offered some in vain a little
        longer: steering goes for them."""
        if not (self.options.require_pairs and is_hypothesis_test(item.obj)):
            return
        for number in range(1, FURTHER + 1):
            if all(given_up for _, _, given_up in recorder.steering.open()):
                return
            seed = self.options.seed + (number << SEED_BITS)
            with seeded(recorder.name, seed=seed), limited(item.obj, examples=FURTHER_EXAMPLES):
                item.runtest()

    def _rerun(self, check: str, case: Case) -> Judgement | None:
        """How a case goes that was not drawn; None where this run cannot have it, `unknown` where
        it is no case."""
        if self._cluster is None or self.limits.excludes(case):
            return None
        try:
            return judge(check, case, target_name=self.options.target, cluster=self._cluster)
        except BadArgument as error:
            return Judgement(Verdict.UNKNOWN, str(error))

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
                report.longrepr = failure_text(record, self.options, self.known)
                report.sections = []
        elif record.verdict is Verdict.KNOWN:
            # How pytest and its plugins name a failure that was expected.
            report.outcome = "skipped"
            report.wasxfail = "; ".join(each.reason for each in record.known)
        elif record.verdict is Verdict.NOT_SUPPORTED:
            # Hypothesis complains where it finds no case that this run wants.
            report.outcome, report.longrepr = "passed", None
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
