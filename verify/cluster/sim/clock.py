"""The time that counts for a run: not what the machine gives to others."""

from __future__ import annotations

import time
from threading import Lock, Semaphore

# How often it is looked at. What takes longer, as this process was stopped, counts as so much.
_LOOK = 0.5
# Of the processor: with less, ranks compute nothing, and wait for what is outside, or for nothing.
_IDLE = 0.02


class Clock:
    """Counts seconds since it was made. While this process computes they are those that it had of
    a processor, of which on a busy machine it has a part only; while it does not, as where a rank
    sleeps, they are those that pass."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._passed, self._computed = time.monotonic(), time.process_time()

    def look(self) -> None:
        """Count on; to be called every half second."""
        passed, computed = time.monotonic(), time.process_time()
        waited, worked = passed - self._passed, computed - self._computed
        self.seconds += min(waited, worked if worked > _IDLE * waited else _LOOK)
        self._passed, self._computed = passed, computed


def acquired(lock: Lock | Semaphore, *, within: float) -> bool:
    """Whether a lock was released within so many seconds that count."""
    clock = Clock()
    while clock.seconds < within:
        if lock.acquire(timeout=min(_LOOK, within)):
            return True
        clock.look()
    return False
