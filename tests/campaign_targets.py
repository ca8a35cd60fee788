"""impl as a target, for campaigns: with a defect, and with bad luck."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from group_targets import OtherOrder, Right


def _parent_is_a_worker() -> bool:
    return b"ray::" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes()


class Unlucky(OtherOrder):
    """The first process that loads it loses its worker to SIGKILL."""

    def version(self) -> str:
        with contextlib.suppress(FileExistsError):
            if _parent_is_a_worker():
                os.close(os.open(os.environ["UNLUCKY"], os.O_CREAT | os.O_EXCL))
                os.kill(os.getppid(), signal.SIGKILL)
        return "1"


class Doomed(Right):
    """Every worker that loads it is lost."""

    def version(self) -> str:
        if _parent_is_a_worker():
            os.kill(os.getppid(), signal.SIGKILL)
        return "1"
