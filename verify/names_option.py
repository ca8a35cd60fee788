"""Options of commands that take several names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def names_option(flag: str, name: str, help: str) -> Callable[[Any], Any]:
    """A click option whose value is names separated by commas, of all times that it is given; None
    where it is not."""

    def joined(context: click.Context, option: click.Parameter, given: tuple[str, ...]) -> Any:
        return ",".join(given) if given else None

    return click.option(flag, name, multiple=True, callback=joined, metavar="NAME,...", help=help)
