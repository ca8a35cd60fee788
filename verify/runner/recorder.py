"""Writes down what happens while the examples of one property run, and concludes a `Record`."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from traceback import format_exception

from hypothesis.errors import FailedHealthCheck, Flaky, Unsatisfiable, UnsatisfiedAssumption

from verify.case import Case
from verify.coverage.factors import row_key
from verify.coverage.steering import Steering
from verify.errors import Mismatch, NotSupported
from verify.finding import Finding
from verify.layout import Layout
from verify.runner.record import Record, Unsupported, layout_key
from verify.verdict import Verdict, worst

_REASONS = 20
_DIGITS = 16
_UNDECIDED_SECONDS = 60.0
# Checks of cases that cannot be computed.
REFUSED = ("refusal", "misfit", "misuse", "unrepeatable")


class Undecided(BaseException):
    """A check could not decide, `error` says why. It is no Exception, so that Hypothesis ends the
    property at once: there is nothing to shrink."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Recorder:
    """What happens to one property. After its first failure that is not known only its findings are
    noted, because the examples that follow are Hypothesis' search for a smaller one."""

    def __init__(
        self, name: str, *, must_check: bool, on_example: Callable[[str, int], None]
    ) -> None:
        self.name, self.must_check, self.on_example = name, must_check, on_example
        self.examples = self.compared = 0
        self.found: Finding | None = None
        self._as_known: dict[int, Finding] = {}
        self._failed = False
        self._raised: BaseException | None = None
        self._undecided_seconds = 0.0
        self._verdicts: set[Verdict] = set()
        self._layouts: Counter[str] = Counter()
        self._arithmetic: Counter[str] = Counter()
        self._options: Counter[str] = Counter()
        self._rows: Counter[str] = Counter()
        self._digest = hashlib.sha256()
        self.steering = Steering()
        self._left_out: Counter[str] = Counter()
        self._unwanted = 0
        self._not_supported: dict[str, Unsupported] = {}
        self._started = time.monotonic()
        self._in_example: list[Verdict] = []
        self._cases_in_example: list[Case] = []
        self._rows_in_example: set[str] = set()

    @contextmanager
    def example(self, drawn: Mapping[str, object]) -> Iterator[None]:
        """One example with what was drawn for it; an example that is rejected is none."""
        self._in_example, self._cases_in_example = [], []
        self._rows_in_example = set()
        try:
            yield
        except UnsatisfiedAssumption:
            raise
        except (Exception, Undecided) as error:
            self._count(drawn)
            self._failed, self.steering.active = True, False
            self._raised = error
            raise
        if not self._failed:
            if not self._in_example and not self.must_check:
                self.compared += 1
                self._cover(drawn.values())
                self._in_example = [Verdict.PASSED]
            self._verdicts.update(self._in_example)
            self._cover(self._cases_in_example)
            self._rows.update(self._rows_in_example)
        self._count(drawn)

    def reached(self, check: str, case: Case) -> None:
        """The case is going to be checked."""
        if check not in REFUSED and not self._failed:
            self.steering.reached(case)

    def checked(self, check: str, case: Case, compared: int) -> None:
        """The case passed a check, and so much of it was compared. One that had to be refused
        covers nothing that can be computed."""
        self._in_example.append(Verdict.PASSED)
        if not self._failed:
            self.compared += compared
            if case not in self._cases_in_example:
                self._cases_in_example.append(case)
            if check not in REFUSED:
                self._rows_in_example.add(row_key(case.concept, self.steering.checked(case)))

    def failed(self, mismatch: Mismatch) -> None:
        """The case failed."""
        self.found = mismatch.finding or self.found

    def failed_as_known(self, number: int, finding: Finding) -> None:
        """The case failed as is known by this number, of which the first finding is kept."""
        self._in_example.append(Verdict.KNOWN)
        if not self._failed:
            self._as_known.setdefault(number, finding)

    def not_supported(self, case: Case, error: NotSupported) -> None:
        """The target declares that it cannot do the case."""
        self._in_example.append(Verdict.NOT_SUPPORTED)
        reason = str(error).rpartition("]: ")[2]
        known = self._not_supported.get(reason)
        if known is None and len(self._not_supported) >= _REASONS:
            reason = "other reasons"
            known = self._not_supported.get(reason)
        if not self._failed:
            count, example = (known.count, known.example) if known else (0, str(case))
            self._not_supported[reason] = Unsupported(reason, count + 1, example)

    def skips_undecided(self, seconds: float) -> bool:
        """Whether an example that took `seconds` and could not be decided is passed over: in the
        search for a smaller example, which it need not end, for a while."""
        self._undecided_seconds += seconds
        return self._failed and self._undecided_seconds < _UNDECIDED_SECONDS

    def left_out(self, reason: str, *, unwanted: bool = False) -> None:
        """A case was drawn that this run cannot check, or one that it does not want, or nothing can
        be said of it."""
        self._left_out[reason] += 1
        self._unwanted += unwanted

    def conclude(self, error: BaseException | None = None) -> Record:
        """What is known now; `error` is what the property raised in the end."""
        verdict, reason, findings = self._verdict(error)
        return Record(
            property=self.name,
            verdict=verdict,
            reason=reason,
            examples=self.examples,
            compared=self.compared,
            digest=self._digest.hexdigest()[:_DIGITS],
            seconds=time.monotonic() - self._started,
            layouts=dict(self._layouts),
            arithmetic=dict(self._arithmetic),
            options=dict(self._options),
            rows=dict(self._rows),
            open=tuple(self.steering.open()),
            not_supported=tuple(self._not_supported.values()),
            left_out=dict(self._left_out),
            findings=(*findings, *self._as_known.values()),
            traceback=_traceback(error) if error is not None and not findings else "",
        )

    def interrupted(self) -> Record:
        """What is known of a property that did not finish: what its last example that failed says,
        if one did."""
        if self.found is None:
            return self.conclude(self._raised).worsened(Verdict.UNKNOWN, "interrupted")
        return self.conclude(Mismatch("interrupted while shrinking", self.found))

    def _verdict(self, error: BaseException | None) -> tuple[Verdict, str, tuple[Finding, ...]]:
        nothing = error is None or isinstance(error, Unsatisfiable | FailedHealthCheck)
        unwanted = self._unwanted and self._unwanted == self._left_out.total()
        if nothing and unwanted and not self.examples:
            return Verdict.NOT_SUPPORTED, f"in this run: {', '.join(self._left_out)}", ()
        if error is not None:
            return self._of_error(error)
        if self._failed:
            return Verdict.FAILED, "it failed, and passed when it was run again", self._last()
        if not self._verdicts:
            what = "no example was checked" if self.examples else "no example ran"
            return Verdict.UNKNOWN, what, ()
        if Verdict.PASSED in self._verdicts and not self.compared:
            return Verdict.UNKNOWN, "no element was compared in any example", ()
        return worst(self._verdicts), "", ()

    def _of_error(self, error: BaseException) -> tuple[Verdict, str, tuple[Finding, ...]]:
        leaves = list(_leaves(error))
        findings = [e.finding for e in leaves if isinstance(e, Mismatch) and e.finding]
        if not findings and self.found:
            why = "; ".join(map(told, leaves))
            reason = f"it failed, and the search for a smaller example ended: {why}"
            return Verdict.FAILED, reason, self._last()
        unclear = [e for e in leaves if not (isinstance(e, Mismatch) and e.finding)]
        reasons = ["it does not fail every time that it is run"] * isinstance(error, Flaky)
        reason = "\n".join([*reasons, *map(told, unclear)])
        false = any(isinstance(e, AssertionError) for e in leaves)
        return Verdict.FAILED if false else Verdict.UNKNOWN, reason, tuple(findings)

    def _last(self) -> tuple[Finding, ...]:
        return () if self.found is None else (self.found,)

    def _count(self, drawn: Mapping[str, object]) -> None:
        if not self._failed:
            self.examples += 1
            for name, value in drawn.items():
                plain = value.to_json() if isinstance(value, Case | Layout) else repr(value)
                self._digest.update(json.dumps([name, plain], sort_keys=True).encode())
            self.on_example(self.name, self.examples)

    def _cover(self, values: Iterable[object]) -> None:
        for value in values:
            if isinstance(value, Layout):
                self._layouts[layout_key(value.to_json())] += 1
            elif isinstance(value, Case):
                self._layouts[layout_key(value.layout.to_json())] += 1
                self._arithmetic[f"{value.lens} {value.dtype}"] += 1
                self._options.update(
                    f"{value.concept} {name}={given}" for name, given in value.options.items()
                )


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, Undecided):
        yield error.error
    elif isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error


def _traceback(error: BaseException) -> str:
    return "".join("".join(format_exception(leaf)) for leaf in _leaves(error))


def told(error: BaseException) -> str:
    """What an error without a finding says, and Hypothesis' notes of the example, if any."""
    said = str(error) if isinstance(error, AssertionError) else ""
    said = said or f"{type(error).__name__}: {error}"
    return "\n".join([said, *getattr(error, "__notes__", [])])
