"""What commands have in common: the console on which they print, and options with several names."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import Any

import click
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


def names_option(flag: str, name: str, help: str) -> Callable[[Any], Any]:
    """A click option whose value is names separated by commas, of all times that it is given; None
    where it is not."""

    def joined(context: click.Context, option: click.Parameter, given: tuple[str, ...]) -> Any:
        return ",".join(given) if given else None

    return click.option(flag, name, multiple=True, callback=joined, metavar="NAME,...", help=help)
