"""The time that counts for a run: not what the machine gives to others."""

from __future__ import annotations

import os
import time
from contextlib import suppress

# Those of the system, also while somebody looks at what the ranks open (`verify.disk`).
from os import close as _close
from os import open as _open
from os import read as _read
from threading import Lock

# How often it is looked at. What takes longer, as this process was stopped, counts as so much.
_LOOK = 0.5
_TASKS = "/proc/self/task"
_MOST = 128


def delayed() -> float:
    """The seconds that threads of this process could have run in and did not get a processor; 0
    where the system does not tell (Linux: Documentation/scheduler/sched-stats.rst)."""
    found = 0.0
    for each in os.listdir(_TASKS) if os.path.isdir(_TASKS) else ():
        # The thread may have ended, or the system may count nothing.
        with suppress(OSError, IndexError):
            found += int(_text(f"{_TASKS}/{each}/schedstat").split()[1]) / 1e9
    return found


def _text(path: str) -> bytes:
    file = _open(path, os.O_RDONLY)
    try:
        return _read(file, _MOST)
    finally:
        _close(file)


class Clock:
    """Counts on from so many seconds: those that pass, without those in which a thread waited for
    a processor that had other work."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._passed, self._delayed = time.monotonic(), delayed()

    def look(self) -> None:
        """Count on; to be called every half second."""
        passed, late = time.monotonic(), delayed()
        # The delays of a thread are gone with it.
        lost = max(late - self._delayed, 0.0)
        self.seconds += min(max(passed - self._passed - lost, 0.0), _LOOK)
        self._passed, self._delayed = passed, late


def acquired(lock: Lock, *, within: float) -> bool:
    """Whether a lock was released within so many seconds that count; half a second always does."""
    look = min(_LOOK, within)
    if lock.acquire(timeout=look):
        return True
    clock = Clock(look)
    while clock.seconds < within:
        if lock.acquire(timeout=look):
            return True
        clock.look()
    return False
