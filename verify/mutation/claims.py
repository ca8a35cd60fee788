"""Which properties are about a mutant, and in what order they are worth running.

Found out by looking at the examples that properties draw: the concepts that a hand-made mutant
names, and the lines of the target that a mutant changes. Nothing is kept by hand.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from verify.mutants.generated import Generated
from verify.mutants.mutant import Mutant
from verify.mutants.packages import modules_of
from verify.mutation.trials import Surveyed


def claims(mutant: Mutant | Generated, surveyed: Iterable[Surveyed]) -> list[str]:
    """The properties about a mutant: those first of which most examples are about it and cost
    least. A hand-made one is about all cases of its concepts, and most about those that reach its
    lines, as far as that is known; one of a condition for a refusal about what is refused."""
    lines = _lines_of(mutant)
    refusing = _refusals(mutant.module, lines)
    found: list[tuple[bool, bool, float, int, str]] = []
    for number, each in enumerate(surveyed):
        reached, refused = (_most(each, mutant.module, some) for some in (lines, refusing))
        about = reached
        if isinstance(mutant, Mutant):
            about = sum(each.concepts[concept] for concept in mutant.caught_by)
        if about:
            share = (min(about, refused or reached) or about) / each.examples
            cost = each.seconds / share
            found.append((not reached, not refused, cost, number, each.property))
    return [name for *_, name in sorted(found)]


def _lines_of(mutant: Mutant | Generated) -> Sequence[int]:
    if isinstance(mutant, Generated):
        return mutant.lines
    return mutant.lines("\n".join(_source(mutant.module)))


def _refusals(module: str, lines: Sequence[int]) -> list[int]:
    """The lines that raise what the conditions in these lines are for."""
    source = ["", *_source(module), ""]
    return [
        line + 1
        for line in lines
        if source[line].lstrip().startswith(("if ", "elif "))
        and source[line + 1].lstrip().startswith("raise ")
    ]


def _most(surveyed: Surveyed, module: str, lines: Sequence[int]) -> int:
    """How many examples reach one of these lines."""
    return max((surveyed.lines[module, line] for line in lines), default=0)


@functools.cache
def _source(module: str) -> list[str]:
    path = modules_of(module.partition(".")[0])[module]
    return path.read_text(encoding="utf-8").splitlines()
