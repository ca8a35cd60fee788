"""Which lines of a package run while one looks: on ranks, whose threads begin meanwhile, and here,
as those do that make a table of a schedule."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

from verify.mutants.packages import modules_of

# A module's name and a line of its source.
Line = tuple[str, int]


class Lines:
    """While open, `reached` has the lines of `package` that ran since `clear`."""

    def __init__(self, package: str) -> None:
        self._names = {str(path): name for name, path in modules_of(package).items()}
        self.reached: set[Line] = set()

    def clear(self) -> None:
        """Forget what was reached."""
        self.reached.clear()

    def __enter__(self) -> Lines:
        self._before = threading.gettrace(), sys.gettrace()
        threading.settrace(self._calls)
        sys.settrace(self._calls)
        return self

    def __exit__(self, *error: object) -> None:
        elsewhere, here = self._before
        threading.settrace(elsewhere)
        sys.settrace(here)

    def _calls(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._lines if frame.f_code.co_filename in self._names else None

    def _lines(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.reached.add((self._names[frame.f_code.co_filename], frame.f_lineno))
        return self._lines
