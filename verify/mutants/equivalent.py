"""Generated mutants, of the source or a history, that compute what the target computes, each with
the reason in writing.

They are read from `equivalent.toml`. An entry names the place by what is there, not by its line: so
it outlives changes elsewhere in the module, and not a change of the place itself.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from verify.cluster.sim.defects import OPERATORS
from verify.errors import HarnessError
from verify.mutants.catalogue import AnyMutant
from verify.mutants.generated import Generated
from verify.mutants.history import Historic, texts_of
from verify.mutants.packages import modules_of

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


@dataclass(frozen=True)
class Indifferent:
    """What may be done to all that is communicated through a line, whoever calls it, and why that
    changes nothing. No other line of the module is like it."""

    module: str
    line: str
    operator: str
    reason: str

    @property
    def place(self) -> tuple[object, ...]:
        """What tells an entry."""
        return self.module, self.line, self.operator


Entry = Equivalent | Indifferent
# The tables of a file by what an entry of each is.
TABLES: dict[str, type[Entry]] = {"equivalent": Equivalent, "history": Indifferent}


class Equivalents:
    """The entries of a file."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = {each.place: each for each in entries}

    @staticmethod
    def read(path: Path = PATH) -> Equivalents:
        """Raises HarnessError, in one line, for a file that is not as it should be."""
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise HarnessError(f"equivalent mutants: cannot read {path}: {error}") from error
        if more := set(data) - set(TABLES):
            raise HarnessError(
                f"equivalent mutants: {path} has tables {sorted(more)}, which are none of"
                f" {', '.join(TABLES)}"
            )
        entries = [
            _entry(kind, f"{name} {number}", each)
            for name, kind in TABLES.items()
            for number, each in enumerate(data.get(name, []), 1)
        ]
        found = Equivalents(entries)
        if len(found.entries) != len(entries):
            raise HarnessError(f"equivalent mutants: {path} lists one place twice")
        return found

    def reason(self, mutant: AnyMutant) -> str:
        """Why a mutant is equivalent; empty if it is not said to be."""
        places: list[tuple[object, ...]] = []
        if isinstance(mutant, Generated):
            places = [_place(mutant)]
        elif isinstance(mutant, Historic):
            places = [(*line, mutant.family) for line in mutant.texts]
        return next((self.entries[each].reason for each in places if each in self.entries), "")

    def stale(self, mutants: Iterable[Generated]) -> list[str]:
        """The entries about the modules of these mutants, which are all that there are, that
        describe none of them."""
        known = {_place(mutant): mutant.module for mutant in mutants}
        return [
            f"{each.module}, {each.function}, {each.operator} in {each.line!r}: no mutant is so"
            for place, each in self.entries.items()
            if isinstance(each, Equivalent) and each.module in known.values() and place not in known
        ]

    def without_a_line(self, package: str) -> list[str]:
        """The entries about what a package communicates that are of no operator, or not of
        exactly one line."""
        paths = modules_of(package)
        return [
            f"{each.module}, {each.operator} of {each.line!r}: nothing is so"
            for each in self.entries.values()
            if isinstance(each, Indifferent)
            and not (
                each.operator in OPERATORS
                and each.module in paths
                and texts_of(str(paths[each.module])).count(each.line) == 1
            )
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


def _entry(kind: type[Entry], name: str, data: Mapping[str, Any]) -> Entry:
    known = {field.name for field in fields(kind)}
    missing = known - {"nth"} - set(data)
    if missing or set(data) - known:
        raise HarnessError(
            f"equivalent mutants: {name} lacks {sorted(missing)} and has"
            f" {sorted(set(data) - known)} too many"
        )
    return kind(**data)
