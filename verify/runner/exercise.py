"""How a property's function is run: what `check` does with a case, and what is noted of every
example."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

from hypothesis import is_hypothesis_test, reject

from verify.case import Case
from verify.cluster.base import Cluster
from verify.coverage.steering import steered
from verify.errors import BadArgument, BeyondRange, Mismatch, NotSupported
from verify.finding import Finding
from verify.property import CHECKS
from verify.runner.draws import seeded
from verify.runner.interrupts import DeferredInterrupt
from verify.runner.limits import Limits
from verify.runner.recorder import Recorder, Undecided


class HasFunction(Protocol):
    """Whatever holds the function of a property as `obj`, such as pytest's items do."""

    obj: Callable[..., Any]


# Which of those that are known a failure is, by number, if it is one.
Known = Callable[[Finding], int | None]


def check_case(
    name: str,
    case: Case,
    *,
    target: str,
    cluster: Cluster,
    limits: Limits,
    recorder: Recorder,
    known: Known = lambda finding: None,
) -> None:
    """Run one check on a case and tell the recorder. Raises Mismatch where it fails otherwise than
    is `known`, Undecided where nothing can be said, and rejects the example where it is none for
    this run. What is beyond the range of a dtype is no failure and no reason to draw another, which
    would then depend on what ranks drop."""
    if reason := limits.excludes(case):
        recorder.left_out(reason, unwanted=case.lens not in limits.lenses)
        reject()
    recorder.reached(name, case)
    began = time.monotonic()
    try:
        if name not in CHECKS:
            raise BadArgument(f"check: {name!r} is not one of {', '.join(CHECKS)}")
        compared = CHECKS[name](case, target_name=target, cluster=cluster)
    except NotSupported as error:
        recorder.not_supported(case, error)
    except Mismatch as mismatch:
        finding = mismatch.finding
        if finding is None or (number := known(finding)) is None:
            recorder.failed(mismatch)
            raise
        recorder.failed_as_known(number, finding)
    except BeyondRange:
        recorder.left_out(f"the reference overflows in {case.dtype}")
    except Exception as error:
        if recorder.skips_undecided(time.monotonic() - began):
            reject()
        raise Undecided(error) from error
    else:
        recorder.checked(name, case, compared)


class Recorded:
    """While open, every run of the function that `item` holds is an example of the recorder, whose
    steering its draws follow, from a seed of its own."""

    def __init__(self, item: HasFunction, recorder: Recorder, interrupt: DeferredInterrupt) -> None:
        self._interrupt = interrupt
        self._holder: Any = item
        self._name = "obj"
        self._drawn: set[str] = set()
        if is_hypothesis_test(item.obj):
            self._holder, self._name = item.obj.hypothesis, "inner_test"  # type: ignore[attr-defined]
            self._drawn = set(item.obj.hypothesis._given_kwargs)  # type: ignore[attr-defined]
        self._inner = getattr(self._holder, self._name)
        self._recorder = recorder
        self._draws = ExitStack()

    def __enter__(self) -> None:
        inner, recorder, interrupt = self._inner, self._recorder, self._interrupt
        drawn = self._drawn

        @functools.wraps(inner)
        def example(*args: Any, **kwargs: Any) -> Any:
            interrupt.check()
            # Without the fixtures.
            with recorder.example({name: kwargs[name] for name in kwargs if name in drawn}):
                return inner(*args, **kwargs)

        setattr(self._holder, self._name, example)
        self._draws.enter_context(steered(recorder.steering))
        self._draws.enter_context(seeded(recorder.name))

    def __exit__(self, *error: object) -> None:
        setattr(self._holder, self._name, self._inner)
        self._draws.close()
