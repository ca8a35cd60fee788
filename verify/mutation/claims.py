"""Which properties are about a mutant, and in what order they are worth running.

Found out by looking at the examples that properties draw: the concepts that a hand-made mutant
names, and the lines of the target that a mutant changes. Nothing is kept by hand.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from verify.mutants import AnyMutant, Mutant
from verify.mutants.generated import Generated
from verify.mutants.history import Historic
from verify.mutants.operators.conditions import accept
from verify.mutants.packages import modules_of
from verify.mutation.trials import Surveyed

NONE: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Claim:
    """A property about a mutant; a `near` one has examples that are known to reach what is
    changed. `telling` are the numbers of those of its first ones that do, where not all do."""

    property: str
    near: bool = True
    telling: frozenset[int] = NONE


def claims(mutant: AnyMutant, surveyed: Iterable[Surveyed]) -> list[Claim]:
    """The properties about a mutant. Those come first whose examples reach what it changes, or, of
    a condition for a refusal, are refused; and among these, by turns of the checks they are asked,
    those of which most do and that cost least.
    Those about a hand-made one have cases of its concepts, whatever they reach. About a place of a
    history are those, too, whose examples reach all of its lines by other paths. Where a refusal is
    left out, those are about it whose examples are refused and reach its module: in others its
    condition does not hold."""
    lines = _lines_of(mutant)
    refusing = _refusals(mutant, lines)
    found: list[tuple[bool, bool, float, str, Claim]] = []
    for each in surveyed:
        telling, raising = (_reaching(each, mutant.module, some) for some in (lines, refusing))
        about = len(telling)
        if isinstance(mutant, Historic):
            telling = each.communicated.get((mutant.place, mutant.family), NONE)
            about = len(telling or _passing(each, mutant))
        reached, refused = len(telling), len(raising)
        if isinstance(mutant, Mutant):
            about = sum(each.concepts[concept] for concept in mutant.caught_by)
        if _leaves_out_a_refusal(mutant):
            about = refused or each.refusals * any(name == mutant.module for name, _ in each.lines)
        if about:
            share = (min(about, refused or reached) or about) / each.examples
            cost = each.seconds / share
            known = raising or telling
            claim = Claim(
                each.property, bool(reached), known if len(known) < each.examples else NONE
            )
            found.append((not claim.near, not refused, cost, each.check, claim))
    return _by_turns(sorted(found, key=lambda each: each[:3]))


def _by_turns(found: Iterable[tuple[bool, bool, float, str, Claim]]) -> list[Claim]:
    """Of those that are as near, the first of each check, then the second of each, and so on: what
    one check cannot see, another may."""
    before = Counter[tuple[bool, bool, str]]()
    turns: list[tuple[bool, bool, int, Claim]] = []
    for far, fits, _, check, claim in found:
        turns.append((far, fits, before[far, fits, check], claim))
        before[far, fits, check] += 1
    return [claim for *_, claim in sorted(turns, key=lambda each: each[:3])]


def _leaves_out_a_refusal(mutant: AnyMutant) -> bool:
    return isinstance(mutant, Generated) and mutant.family == accept.__name__


def _lines_of(mutant: AnyMutant) -> Sequence[int]:
    if isinstance(mutant, Historic):
        return ()
    if isinstance(mutant, Generated):
        return mutant.lines
    return mutant.lines(_source(mutant.module))


def _refusals(mutant: AnyMutant, lines: Sequence[int]) -> list[int]:
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


def _passing(surveyed: Surveyed, mutant: Historic) -> frozenset[int]:
    """Which examples reach all lines of a place, by whatever path."""
    lines = ((module, at) for (module, _), (_, at) in zip(mutant.texts, mutant.place, strict=True))
    return frozenset.intersection(*(surveyed.lines.get(line, NONE) for line in lines))


def _reaching(surveyed: Surveyed, module: str, lines: Sequence[int]) -> frozenset[int]:
    """Which examples reach the line that most do, of these."""
    found = (surveyed.lines.get((module, line), NONE) for line in lines)
    return max(found, key=len, default=NONE)


@functools.cache
def _source(module: str) -> str:
    return modules_of(module.partition(".")[0])[module].read_text(encoding="utf-8")
