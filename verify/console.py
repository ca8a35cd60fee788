"""The console on which commands print."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any

from rich.console import Console

WIDTH = 100


def console_of_stdout() -> Console:
    """A console on what stdout is now, whatever pytest puts in its place later.

    Wide lines are not broken where the output is no terminal.
    """
    stream: Any = sys.stdout
    with contextlib.suppress(OSError, AttributeError, io.UnsupportedOperation):
        stream = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    console = Console(file=stream, highlight=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    return console
