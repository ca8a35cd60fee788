"""Runs rank programs for a check, and tells whose failure a failed run is.

What a rank raised inside target code, a deadlock and collectives that do not fit are the target's:
a `Mismatch` with a `Finding`. Everything else is the harness's: `HarnessError`, never a verdict.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from verify.adversary import Adversary
from verify.case import Case
from verify.cluster.base import Cluster, CollectiveMismatch, Deadlock, RankFailure, RankFailures
from verify.cluster.history import History
from verify.errors import HarnessError, Mismatch, NotSupported
from verify.finding import Finding, Kind
from verify.rank_program import what_the_target_did
from verify.replica import ranks_text
from verify.target import Target
from verify.targets import load_target

T = TypeVar("T")

# Kinds of failure by which clusters name ranks that neither returned nor raised.
_STUCK = ("Unfinished", "Unresponsive")


@dataclass
class Bench:
    """A check on a case: where the target runs, and who is told when it fails. It is a cluster too,
    whose failures are already blamed, for checks that want one."""

    check: str
    case: Case
    target_name: str
    cluster: Cluster
    name: str = field(init=False)
    max_world_size: int = field(init=False)

    def __post_init__(self) -> None:
        self.name, self.max_world_size = self.cluster.name, self.cluster.max_world_size

    @property
    def target(self) -> Target:
        """The target under test."""
        return load_target(self.target_name)

    def require_support(self, case: Case) -> None:
        """Raise NotSupported where the target does not declare to support a case."""
        if reason := self.target.supports(case):
            raise NotSupported(f"{self.target_name} does not support {case}: {reason}")

    def run(
        self,
        program: Callable[..., T],
        *args: Any,
        world_size: int,
        rank_states: Iterable[object] = (),
        adversary: Adversary | None = None,
        history: History | None = None,
    ) -> list[T]:
        """The results of every rank, with the target's state kept apart for each, under the case's
        adversary unless another is given. Raises Mismatch for the target's failures and
        HarnessError for the harness's."""
        states = (*self.target.rank_state(), *rank_states)
        try:
            results = self.cluster.run(
                program,
                *args,
                world_size=world_size,
                rank_states=states,
                adversary=self.case.adversary if adversary is None else adversary,
                history=history,
            )
        except RankFailures as failures:
            raise self._blame(failures) from failures
        if len(results) != world_size:
            raise HarnessError(
                f"cluster {self.cluster.name}: {len(results)} results of {world_size} ranks"
            )
        return results

    def mismatch(self, kind: Kind, **parts: Any) -> Mismatch:
        """A Mismatch that carries a finding."""
        finding = Finding(
            check=self.check, kind=kind, target=self.target_name, case=self.case, **parts
        )
        return Mismatch(finding.message(), finding)

    def close(self) -> None:
        """The cluster is not this object's to close."""

    def _blame(self, failures: RankFailures) -> Exception:
        headline = (failures.headline,) if failures.headline else ()
        details = (*headline, *_describe(failures.failures))
        if isinstance(failures, Deadlock):
            return self.mismatch("deadlock", details=details)
        if isinstance(failures, CollectiveMismatch):
            return self.mismatch("collective", details=details)
        ours = [f for f in failures.failures if f.kind not in _STUCK and not what_the_target_did(f)]
        if ours or not failures.failures:
            told = "\n".join(f"{failure}\n{failure.traceback}" for failure in ours)
            return HarnessError(f"{self.check} of {self.case}: {failures.headline or ''}{told}")
        kinds = {failure.kind.rpartition(".")[2] for failure in failures.failures}
        if kinds == {"Mismatch"}:
            return self.mismatch("contract", details=details)
        return self.mismatch("deadlock" if kinds & {*_STUCK} else "crash", details=details)


def _describe(failures: Sequence[RankFailure]) -> tuple[str, ...]:
    """What ranks said, each text once: `ranks 0, 1, running forward: ValueError: no (a.py:12)`."""
    found: dict[str, list[int]] = {}
    for failure in failures:
        found.setdefault(_said(failure), []).append(failure.rank)
    return tuple(f"{ranks_text(ranks)}{said}" for said, ranks in found.items())


def _said(failure: RankFailure) -> str:
    doing = what_the_target_did(failure)
    during = f", {doing}" if doing else ""
    message, kind = " ".join(failure.message.split()), failure.kind.rpartition(".")[2]
    if kind == "Mismatch" or failure.kind in _STUCK:
        return f"{during}: {message}"
    return f"{during}: {failure.kind}: {message}{_place(failure.traceback)}"


def _place(traceback: str) -> str:
    """The innermost place that is not torch's, in parentheses; empty without a traceback."""
    places = re.findall(r'File "(.*?)", line (\d+), in (\S+)', traceback)
    own = [place for place in places if "/torch/" not in place[0]]
    if not own:
        return ""
    path, line, function = own[-1]
    short = os.path.relpath(path) if path.startswith(os.getcwd()) else path
    return f" ({short.rpartition('site-packages/')[2]}:{line} in {function})"
