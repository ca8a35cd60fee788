"""Runs properties in this process, on one target after another, without pytest."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Set
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import hypothesis
from hypothesis import Phase

from verify.case import Case
from verify.cluster import open_cluster
from verify.cluster.sim.defects import OPERATORS, Path, listening
from verify.cluster.sim.exchange import Call
from verify.mutants.history import DEPTH, Place, place_of, root_of
from verify.mutation.lines import Line, Lines
from verify.runner.draws import use_profile
from verify.runner.exercise import Recorded, check_case
from verify.runner.interrupts import DeferredInterrupt
from verify.runner.limits import Limits, limits, set_limits
from verify.runner.options import RunOptions
from verify.runner.record import Record
from verify.runner.recorder import REFUSED, Recorder
from verify.runner.suites import PACKAGE
from verify.targets import load_target

WORLD_SIZE = 16
# What no run on the target itself comes near; a mutant may well never end.
_SECONDS_OF_A_RUN = 20.0


@dataclass(frozen=True)
class Surveyed:
    """What the examples of a property are about: how many there were, how many of them draw each
    concept and are to be refused, and which, by number, reach each line of the target, and
    communicate at each place of it what each operator fits; `seconds` is what an example takes, and
    `check` what is mostly asked of one."""

    property: str
    examples: int = 0
    seconds: float = 0.0
    concepts: Counter[str] = field(default_factory=Counter)
    lines: Mapping[Line, frozenset[int]] = field(default_factory=dict)
    communicated: Mapping[tuple[Place, str], frozenset[int]] = field(default_factory=dict)
    refusals: int = 0
    check: str = ""


@dataclass(frozen=True)
class Trial:
    """What came of a property: its record, the seconds until its first failure or until it stopped,
    whether nothing of it is left to run, how many examples did, not only drawn, and whether
    something was raised."""

    record: Record
    seconds: float
    ended: bool
    ran: int
    broke: bool = False


class _Enough(BaseException):
    """Ends a property early. It is no Exception, so that Hypothesis does not search on."""


class Trials:
    """The properties, drawn as `options` say, and a cluster that runs their cases.

    Without `shrink` the first failing case is not made smaller. With `trace`, the name of a
    package, a survey notes the lines of it that examples reach, which takes its time.
    """

    def __init__(self, options: RunOptions, *, shrink: bool = True, trace: str | None = None):
        self.options, self.shrink, self.trace = options, shrink, trace
        self._stack = ExitStack()

    def __enter__(self) -> Trials:
        size = self.options.max_world_size or WORLD_SIZE
        self.limits = Limits(size, self.options.lenses, self.options.adversary)
        # What libraries warn of in a defect is told by what fails.
        self._stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        self._stack.callback(set_limits, limits())
        set_limits(self.limits)
        self._stack.callback(use_profile(self.options))
        if not self.shrink:
            _leave_out_shrinking(f"shardproof-{self.options.profile}-as-drawn")
        # A property keeps the settings that it was imported under.
        self._forget()
        self._stack.callback(self._forget)
        self.lines = Lines(self.trace) if self.trace else None
        if self.lines:
            # Before the cluster's threads begin, which inherit it.
            self._stack.enter_context(self.lines)
        self.cluster = open_cluster("sim", world_size=size, timeout=_SECONDS_OF_A_RUN)
        self._stack.callback(self.cluster.close)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(
        self,
        name: str,
        *,
        target: str,
        after: int = 0,
        within: float = math.inf,
        only: Set[int] | None = None,
    ) -> Trial:
        """What comes of a property on a target. Its first `after` examples, which ran before, are
        drawn and do not run again; with `within` it stops before the first that would begin later
        than so many seconds after the others, and runs at least one. With `only` just examples of
        these numbers run."""
        began = time.monotonic()
        # When the example before each of those that run had ended.
        stamps, ran = [began], dict[int, float]()
        recorder = Recorder(
            name, must_check=True, on_example=lambda *told: stamps.append(time.monotonic())
        )

        def check(which: str, case: Case) -> None:
            if recorder.steering.active and not self.limits.excludes(case):
                count = recorder.examples
                if only is not None and count > max(only, default=-1):
                    raise _Enough
                if count < after or (only is not None and count not in only):
                    recorder.reached(which, case)
                    return
                if stamps[-1] > min(ran.values(), default=math.inf) + within:
                    raise _Enough
                ran[count] = stamps[-1]
            check_case(
                which,
                case,
                target=target,
                cluster=self.cluster,
                limits=self.limits,
                recorder=recorder,
            )

        error = _called(self._function(name), check, recorder)
        ended = not isinstance(error, _Enough)
        record = recorder.conclude(error if ended else None)
        broke = ended and error is not None
        return Trial(record, stamps[-1] - began, ended, len(ran), broke)

    def survey(self, name: str, *, target: str, examples: int) -> Surveyed:
        """What the first examples of a property are about. They run on the target if lines are
        traced, and are only drawn otherwise."""
        concepts, checks = Counter[str](), Counter[str]()
        reached: dict[Line, set[int]] = defaultdict(set)
        heard: dict[tuple[Path, str], set[int]] = defaultdict(set)
        recorder = Recorder(name, must_check=True, on_example=lambda *told: None)

        def check(which: str, case: Case) -> None:
            if recorder.examples >= examples:
                raise _Enough
            concepts[case.concept] += 1
            checks[which] += 1
            if self.lines is None:
                return
            self.lines.clear()
            check_case(
                which,
                case,
                target=target,
                cluster=self.cluster,
                limits=self.limits,
                recorder=recorder,
            )
            for line in self.lines.reached:
                reached[line].add(recorder.examples)

        def hear(call: Call, path: Path) -> None:
            for operator in (name for name, each in OPERATORS.items() if each.fits(call)):
                heard[path, operator].add(recorder.examples)

        # Its import is nobody's example.
        load_target(target)
        began = time.monotonic()
        with listening(root_of(target), DEPTH, hear) if self.lines else nullcontext():
            error = _called(self._function(name), check, recorder)
        if error is not None and not isinstance(error, _Enough):
            raise error
        count = recorder.examples
        seconds = (time.monotonic() - began) / max(count, 1)
        # One law of groups asks for what there is not.
        refusals = sum(checks[each] for each in (*REFUSED, "groups"))
        # Most lines have one of a few sets.
        kept: dict[frozenset[int], frozenset[int]] = {}
        lines = {
            line: kept.setdefault(numbers, numbers)
            for line, numbers in ((line, frozenset(each)) for line, each in reached.items())
        }
        communicated = {
            (place_of(target, path), operator): frozenset(numbers)
            for (path, operator), numbers in heard.items()
        }
        mostly = max(checks, key=lambda each: checks[each], default="")
        return Surveyed(name, count, seconds, concepts, lines, communicated, refusals, mostly)

    def _function(self, name: str) -> Callable[..., Any]:
        suite, _, function = name.partition(".")
        module = importlib.import_module(f"{PACKAGE}.test_{suite}")
        found: Callable[..., Any] = getattr(module, f"test_{function}")
        return found

    def _forget(self) -> None:
        for name in [each for each in sys.modules if each.startswith(f"{PACKAGE}.test_")]:
            del sys.modules[name]


def _leave_out_shrinking(profile: str) -> None:
    """Make the present settings, without that phase, those of what is imported from now on."""
    present = hypothesis.settings()
    phases = [each for each in present.phases if each is not Phase.shrink]
    hypothesis.settings.register_profile(profile, present, phases=phases)
    hypothesis.settings.load_profile(profile)


def _called(
    function: Callable[..., Any], check: Callable[[str, Case], None], recorder: Recorder
) -> BaseException | None:
    """What calling a property raises. One that checks no case of a target is not called."""
    if "check" not in inspect.signature(function).parameters:
        return None
    item = SimpleNamespace(obj=function)
    try:
        with Recorded(item, recorder, DeferredInterrupt()):
            item.obj(check=check)
    except BaseException as error:
        return error
    return None
