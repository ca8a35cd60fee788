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
    """What a mutant does, and why that changes nothing. `count` is the number of mutants that do
    just that in lines like this one of the function."""

    module: str
    function: str
    line: str
    operator: str
    snippet: str
    replacement: str
    reason: str
    count: int = 1

    @property
    def place(self) -> tuple[str, ...]:
        """What tells a mutant."""
        where = (self.module, self.function, self.line)
        return *where, self.operator, self.snippet, self.replacement


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
        """What is wrong with the entries about the modules of these mutants, which are all that
        there are: those that describe none of them, or not as many as they say."""
        counts: dict[tuple[str, ...], int] = {}
        modules = set()
        for mutant in mutants:
            modules.add(mutant.module)
            counts[_place(mutant)] = counts.get(_place(mutant), 0) + 1
        return [
            f"{each.module}, {each.function}, {each.operator} in {each.line!r}:"
            f" {counts.get(place, 0)} mutants are like that, not {each.count}"
            for place, each in self.entries.items()
            if each.module in modules and counts.get(place, 0) != each.count
        ]


def _place(mutant: Generated) -> tuple[str, ...]:
    return (
        mutant.module,
        mutant.function,
        mutant.line,
        mutant.family,
        " ".join(mutant.snippet.split()),
        " ".join(mutant.replacement.split()),
    )


def _entry(number: int, data: Mapping[str, Any]) -> Equivalent:
    known = {field.name for field in fields(Equivalent)}
    missing = known - {"count"} - set(data)
    if missing or set(data) - known:
        raise HarnessError(
            f"equivalent mutants: entry {number} lacks {sorted(missing)} and has"
            f" {sorted(set(data) - known)} too many"
        )
    return Equivalent(**data)
