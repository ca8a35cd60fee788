"""Verdicts: what is known of a property after its examples. A verdict is never lost.

`unknown` is the verdict of a check that broke, and fails a gate as `failed` does. `not supported`
is what the target declares that it cannot do, and what has no case in the lenses that the run is
told to use; it is reported, and alone it passes no gate.
`failed (known)` is a failure that the run was told to expect; it is reported like any other.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from verify.case import Case
from verify.cluster.base import Cluster
from verify.errors import BadArgument, Mismatch, NotSupported
from verify.finding import Finding
from verify.property import CHECKS


class Verdict(Enum):
    """What is known, from the best to the worst."""

    PASSED = "passed"
    NOT_SUPPORTED = "not supported"
    KNOWN = "failed (known)"
    UNKNOWN = "unknown"
    FAILED = "failed"


_ORDER = tuple(Verdict)


@dataclass(frozen=True)
class Judgement:
    """A verdict, the words that go with it, and what was found if it is `failed`."""

    verdict: Verdict
    reason: str = ""
    finding: Finding | None = None


def judge(check: str, case: Case, *, target_name: str, cluster: Cluster) -> Judgement:
    """Run one check on one case and say what is known then. Raises only BadArgument, for a check
    that does not exist or a case that is none."""
    if check not in CHECKS:
        raise BadArgument(f"check: {check!r} is not one of {', '.join(CHECKS)}")
    try:
        CHECKS[check](case, target_name=target_name, cluster=cluster)
    except BadArgument:
        raise
    except Exception as error:
        return judgement_of(error)
    return Judgement(Verdict.PASSED)


def judgement_of(error: BaseException) -> Judgement:
    """What an exception that came out of a check says."""
    if isinstance(error, Mismatch):
        return Judgement(Verdict.FAILED, str(error), error.finding)
    if isinstance(error, NotSupported):
        return Judgement(Verdict.NOT_SUPPORTED, str(error))
    return Judgement(Verdict.UNKNOWN, "".join(traceback.format_exception(error)))


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict of several together; `unknown` of none, because nothing was shown.

    What passed besides something that is not supported did pass.
    """
    found = set(verdicts)
    if not found:
        return Verdict.UNKNOWN
    if found == {Verdict.PASSED, Verdict.NOT_SUPPORTED}:
        return Verdict.PASSED
    return max(found, key=_ORDER.index)


def opens_gate(verdicts: Iterable[Verdict]) -> bool:
    """Whether a gate may let through what has these verdicts: something passed or failed as known,
    and all the rest did so or is not supported."""
    return worst(verdicts) in (Verdict.PASSED, Verdict.KNOWN)
