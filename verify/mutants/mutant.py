"""What a mutant is: a few lines of one module's source, and the wrong lines in their place."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher

from verify.errors import HarnessError


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A named defect. `wrong` says in a sentence what is computed instead.

    `snippet` occurs exactly once in the source of `module`; `replacement` takes its place.
    `caught_by` names concepts each of which must fail, whatever else does. `seen` is the identifier
    of a published defect (`verify.mutants.published`) whose mistake it makes, maybe in another
    place, or where else the like was seen, or `invented`.
    """

    name: str
    family: str
    wrong: str
    module: str
    snippet: str
    replacement: str
    caught_by: tuple[str, ...]
    seen: str = "invented"

    def applied_to(self, source: str) -> str:
        """The mutated source. Raises HarnessError unless the snippet occurs once in `source`."""
        count = source.count(self.snippet)
        if count != 1:
            raise HarnessError(
                f"mutant {self.name}: its snippet occurs {count} times in {self.module}, not once:"
                f" {self.snippet!r}"
            )
        return source.replace(self.snippet, self.replacement)

    def lines(self, source: str) -> list[int]:
        """The lines of the source that it changes or leaves out, or that are beside what it puts
        in; counted from 1."""
        before = source.splitlines()
        matcher = SequenceMatcher(None, before, self.applied_to(source).splitlines(), False)
        found: list[int] = []
        for kind, start, end, *_ in matcher.get_opcodes():
            if kind != "equal":
                found += range(start + 1, end + 1) or (start, start + 1)
        return [line for line in found if 1 <= line <= len(before)]
