"""Generated mutants that compute what the target computes, each with the reason in writing.

They are read from `equivalent.toml`. An entry names the place by what is there, not by its line: so
it outlives changes elsewhere in the module, and not a change of the place itself.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from verify.errors import HarnessError
from verify.mutants.generated import Generated

PATH = Path(__file__).with_name("equivalent.toml")


@dataclass(frozen=True)
class Equivalent:
    """What a mutant does, and why that changes nothing. It is the `nth` that does just that in
    lines like this one of the function."""

    module: str
    function: str
    line: str
    operator: str
    snippet: str
    replacement: str
    reason: str
    nth: int = 1

    @property
    def place(self) -> tuple[object, ...]:
        """What tells a mutant."""
        where = (self.module, self.function, self.line)
        return *where, self.operator, self.snippet, self.replacement, self.nth


class Equivalents:
    """The entries of a file."""

    def __init__(self, entries: Iterable[Equivalent]) -> None:
        self.entries = {each.place: each for each in entries}

    @staticmethod
    def read(path: Path = PATH) -> Equivalents:
        """Raises HarnessError, in one line, for a file that is not as it should be."""
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise HarnessError(f"equivalent mutants: cannot read {path}: {error}") from error
        listed = data.get("equivalent", [])
        entries = [_entry(number, each) for number, each in enumerate(listed, 1)]
        found = Equivalents(entries)
        if len(found.entries) != len(entries):
            raise HarnessError(f"equivalent mutants: {path} lists one place twice")
        return found

    def reason(self, mutant: Generated) -> str:
        """Why a mutant is equivalent; empty if it is not said to be."""
        found = self.entries.get(_place(mutant))
        return found.reason if found else ""

    def stale(self, mutants: Iterable[Generated]) -> list[str]:
        """The entries about the modules of these mutants, which are all that there are, that
        describe none of them."""
        known = {_place(mutant): mutant.module for mutant in mutants}
        return [
            f"{each.module}, {each.function}, {each.operator} in {each.line!r}: no mutant is so"
            for place, each in self.entries.items()
            if each.module in known.values() and place not in known
        ]


def _place(mutant: Generated) -> tuple[object, ...]:
    return (
        mutant.module,
        mutant.function,
        mutant.line,
        mutant.family,
        " ".join(mutant.snippet.split()),
        " ".join(mutant.replacement.split()),
        mutant.nth,
    )


def _entry(number: int, data: Mapping[str, Any]) -> Equivalent:
    known = {field.name for field in fields(Equivalent)}
    missing = known - {"nth"} - set(data)
    if missing or set(data) - known:
        raise HarnessError(
            f"equivalent mutants: entry {number} lacks {sorted(missing)} and has"
            f" {sorted(set(data) - known)} too many"
        )
    return Equivalent(**data)
