"""Which properties are about a mutant, and in what order they are worth running.

Found out by looking at the examples that properties draw: a concept that a mutant names, or the
lines of the target that a generated mutant changes. Nothing is kept by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from verify.mutants.generated import Generated
from verify.mutants.mutant import Mutant
from verify.mutation.trials import Surveyed


def claims(mutant: Mutant | Generated, surveyed: Iterable[Surveyed]) -> list[str]:
    """The properties about a mutant: most of its examples, and the quickest, first."""
    found = [
        (each.seconds / share, number, each.property)
        for number, each in enumerate(surveyed)
        if (share := _share(mutant, each)) > 0
    ]
    return [name for _, _, name in sorted(found)]


def _share(mutant: Mutant | Generated, surveyed: Surveyed) -> float:
    """The part of a property's examples that are about the mutant."""
    if isinstance(mutant, Generated):
        counts: Sequence[int] = [surveyed.lines[mutant.module, line] for line in mutant.lines]
        about = max(counts, default=0)
    else:
        about = sum(surveyed.concepts[concept] for concept in mutant.caught_by)
    return about / surveyed.examples if surveyed.examples else 0.0
