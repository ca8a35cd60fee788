"""Mutants that are generated from what a target communicates: one for each place of its history
and each thing that may go wrong there.

A place is a path of calls that some example took, at most `DEPTH` lines of the target from the one
that communicates on. So what `collectives.all_reduce` does is wrong for one of its callers, also
where they begin it and wait later, or where the calls are torch's own. The source stays as it is:
what is wrong is what the simulated ranks get (`verify.cluster.sim.defects`). Their names,
`MODULE:LINE+MODULE:LINE:OPERATOR` with the innermost line first, are stable while the source is; as
a target each is `impl@history:NAME`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import CodeType

from verify.cluster.sim.defects import OPERATORS, Defect, plant
from verify.errors import BadArgument
from verify.mutants.packages import full_name, modules_of, short_modules_of

PREFIX = "history:"
DEPTH = 5
_ABOVE = "+"

# Modules without the package and lines, the innermost first.
Place = tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True)
class Historic:
    """A defect of what one place of a target communicates. `family` is the operator; `module` is
    the one that communicates, `texts` the place as modules and what their lines say."""

    name: str
    family: str
    wrong: str
    module: str
    place: Place
    texts: tuple[tuple[str, str], ...]
    defect: Defect
    replacement: str = ""

    @property
    def snippet(self) -> str:
        """The texts of the lines."""
        return "\n".join(text for _, text in self.texts)

    def applied_to(self, source: str) -> str:
        """The source as it is: that it is a mutant's is what tells the simulated ranks."""
        plant(self.name, self.defect)
        return source


def mutants_of(package: str, communicated: Iterable[tuple[Place, str]]) -> list[Historic]:
    """The mutants of places and operators that fit there, in the order of the source."""
    return [_made(package, *each) for each in sorted(set(communicated)) if each[0]]


def find_historic(package: str, name: str) -> Historic:
    """The mutant of a name without its prefix. Raises BadArgument where the name is none of a place
    and an operator, of which each line is one of a function."""
    text, _, operator = name.rpartition(":")
    known = _modules(package)
    place = []
    for each in text.split(_ABOVE):
        module, _, line = each.partition(":")
        if module not in known or not line.isdecimal() or int(line) not in _code(known[module]):
            close = get_close_matches(module, known, n=3) or sorted(known)[:3]
            raise BadArgument(
                f"target: {package} has no mutant {PREFIX}{name!r}: {each!r} is no MODULE:LINE of"
                f" a function in it, with modules as {', '.join(close)}"
            )
        place.append((module, int(line)))
    if operator not in OPERATORS:
        raise BadArgument(
            f"target: {package} has no mutant {PREFIX}{name!r}: {operator!r} is not one of"
            f" {', '.join(OPERATORS)}"
        )
    return _made(package, tuple(place), operator)


def root_of(package: str) -> str:
    """The folder of a package, as its code has it."""
    return str(modules_of(package)[package].parent) + "/"


def place_of(package: str, path: Iterable[tuple[str, int]]) -> Place:
    """The place of files and lines."""
    names = {path: name for name, path in _modules(package).items()}
    return tuple((names[file], line) for file, line in path)


@cache
def _modules(package: str) -> dict[str, str]:
    """The files of a package by the names of modules without it."""
    return {name: str(path) for name, path in short_modules_of(package).items()}


def _made(package: str, place: Place, operator: str) -> Historic:
    files = _modules(package)
    module, _ = place[0]
    where = _ABOVE.join(f"{name}:{line}" for name, line in place)
    path = tuple((files[name], line) for name, line in place)
    return Historic(
        name=f"{PREFIX}{where}:{operator}",
        family=operator,
        wrong=OPERATORS[operator].wrong,
        module=full_name(package, module),
        place=place,
        texts=tuple((full_name(package, name), texts_of(files[name])[n - 1]) for name, n in place),
        defect=Defect(root_of(package), path, DEPTH, OPERATORS[operator]),
    )


@cache
def texts_of(file: str) -> tuple[str, ...]:
    """What the lines of a file say, without their indentation."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return tuple(map(str.strip, lines))


@cache
def _code(file: str) -> frozenset[int]:
    """The lines of a file at which a function may be."""
    whole = compile(Path(file).read_text(encoding="utf-8"), file, "exec", dont_inherit=True)
    return frozenset(line for code in _functions(whole) for *_, line in code.co_lines() if line)


def _functions(code: CodeType) -> Iterator[CodeType]:
    """The code within code."""
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield each
            yield from _functions(each)
