"""On which processor rank threads run.

Only one of them runs at a time, so a second processor only makes every hand-over a wake-up across
processors. They share the one that the driver is on; a run later, if the driver has moved, the new
one, so that several drivers on one machine do not end up sharing. While ranks run the driver stays
where it is: woken at their end it would else go to whatever processor is idle, and they after it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator


def current() -> int | None:
    """The processor that the calling thread is on; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    return _sched_getcpu()


@contextlib.contextmanager
def staying_on(processor: int | None) -> Iterator[None]:
    """While inside, the calling thread is kept on a processor, on any it may use if None. Has no
    effect where the system does not allow that."""
    before: set[int] | None = None
    if processor is not None:
        with contextlib.suppress(OSError):
            before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {processor})
    try:
        yield
    finally:
        if before is not None:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, before)


def stay_on(processor: int) -> None:
    """Keep the calling thread on a processor, as one that is not woken at the expense of another.
    Has no effect where the system does not allow that."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, {processor})
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def share_one_arena() -> None:
    """Let all threads of this process allocate from the same memory, from now on: what one rank
    freed is in the cache for the next, and none of them allocates beside another. Has no effect
    where the C library is not glibc."""
    if hasattr(_C, "mallopt"):
        _C.mallopt(_M_ARENA_MAX, 1)


_M_ARENA_MAX = -8
_C = ctypes.CDLL(None)
_sched_getcpu = _C.sched_getcpu if sys.platform == "linux" else lambda: None
