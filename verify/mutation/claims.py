"""Which properties are about a mutant, and in what order they are worth running.

Found out by looking at the examples that properties draw: the concepts that a hand-made mutant
names, and the lines of the target that a mutant changes. Nothing is kept by hand.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from verify.mutants.generated import Generated
from verify.mutants.mutant import Mutant
from verify.mutants.operators.conditions import accept
from verify.mutants.packages import modules_of
from verify.mutation.trials import Surveyed


def claims(mutant: Mutant | Generated, surveyed: Iterable[Surveyed]) -> list[str]:
    """The properties about a mutant. Those come first whose examples reach what it changes, or, of
    a condition for a refusal, are refused; and among these of which most do and that cost least.
    Those about a hand-made one have cases of its concepts, whatever they reach. Where a refusal is
    left out, those are about it whose examples are refused and reach its module: in others its
    condition does not hold."""
    lines = _lines_of(mutant)
    refusing = _refusals(mutant, lines)
    found: list[tuple[bool, bool, float, int, str]] = []
    for number, each in enumerate(surveyed):
        reached, refused = (_most(each, mutant.module, some) for some in (lines, refusing))
        about = reached
        if isinstance(mutant, Mutant):
            about = sum(each.concepts[concept] for concept in mutant.caught_by)
        if _leaves_out_a_refusal(mutant):
            about = refused or each.refusals * any(name == mutant.module for name, _ in each.lines)
        if about:
            share = (min(about, refused or reached) or about) / each.examples
            cost = each.seconds / share
            found.append((not reached, not refused, cost, number, each.property))
    return [name for *_, name in sorted(found)]


def _leaves_out_a_refusal(mutant: Mutant | Generated) -> bool:
    return isinstance(mutant, Generated) and mutant.family == accept.__name__


def _lines_of(mutant: Mutant | Generated) -> Sequence[int]:
    if isinstance(mutant, Generated):
        return mutant.lines
    return mutant.lines(_source(mutant.module))


def _refusals(mutant: Mutant | Generated, lines: Sequence[int]) -> list[int]:
    """The lines that raise what the conditions in these lines are for."""
    if isinstance(mutant, Generated) and len(lines) > 2:
        # Of a parameter: all that the function does.
        return []
    source = ["", *_source(mutant.module).splitlines(), ""]
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
def _source(module: str) -> str:
    return modules_of(module.partition(".")[0])[module].read_text(encoding="utf-8")
