"""The fixture `check`, by which properties reach the target under test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import pytest

from verify.case import Case

EXAMINER = "shardproof-examiner"


class CheckCase(Protocol):
    """The fixture `check`: run one check of `verify.property.CHECKS` on a case."""

    def __call__(self, name: str, case: Case) -> None:
        """Return where the case passes or is not supported; raise where it fails."""
        ...


class _Examines(Protocol):
    def checking(self) -> AbstractContextManager[CheckCase]: ...


@pytest.fixture(scope="session")
def check(request: pytest.FixtureRequest) -> Iterator[CheckCase]:
    """Checks cases on the run's cluster, which is open from the first property to the last."""
    examiner: _Examines | None = request.config.pluginmanager.get_plugin(EXAMINER)
    assert examiner is not None
    with examiner.checking() as checking:
        yield checking
