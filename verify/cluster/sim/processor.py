"""On which processor rank threads run.

Only one of them runs at a time, so a second processor only makes every hand-over a wake-up across
processors. They share the one that the driver is on; a run later, if the driver has moved, the new
one, so that several drivers on one machine do not end up sharing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys


def current() -> int | None:
    """The processor that the calling thread is on; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    return _sched_getcpu()


def stay_on(processor: int) -> None:
    """Keep the calling thread on a processor, as one that is not woken at the expense of another.
    Has no effect where the system does not allow that."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, {processor})
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


_sched_getcpu = ctypes.CDLL(None).sched_getcpu if sys.platform == "linux" else lambda: None
