"""Which properties are about a mutant, and in what order they are worth running.

Found out by looking at the examples that properties draw: the concepts that a hand-made mutant
names, and the lines of the target that a mutant changes. Nothing is kept by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from verify.mutants.generated import Generated
from verify.mutants.mutant import Mutant
from verify.mutants.packages import modules_of
from verify.mutation.trials import Surveyed


def claims(mutant: Mutant | Generated, surveyed: Iterable[Surveyed]) -> list[str]:
    """The properties about a mutant: those first of which most examples are about it and cost
    least. A hand-made one is about all cases of its concepts, and most about those that reach its
    lines, as far as that is known."""
    lines = _lines_of(mutant)
    found: list[tuple[bool, float, int, str]] = []
    for number, each in enumerate(surveyed):
        reached = max((each.lines[mutant.module, line] for line in lines), default=0)
        about = reached
        if isinstance(mutant, Mutant):
            about = sum(each.concepts[concept] for concept in mutant.caught_by)
        if about:
            share = (min(about, reached) or about) / each.examples
            found.append((not reached, each.seconds / share, number, each.property))
    return [name for *_, name in sorted(found)]


def _lines_of(mutant: Mutant | Generated) -> Sequence[int]:
    if isinstance(mutant, Generated):
        return mutant.lines
    package = mutant.module.partition(".")[0]
    return mutant.lines(modules_of(package)[mutant.module].read_text(encoding="utf-8"))
