"""Whether a run shows anything: results that are missing, of no elements or zero throughout, where
the reference's are not, agree with each other, keep little and communicate as promised, and say
nothing of it. Every rank has to show its own part.

`equivalence` compares every element with the reference and needs none of this; the other checks
compare a target with itself or count what it does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from verify.case import Case
from verify.checks.masks import Masks
from verify.compare import placements_in
from verify.lens import generate
from verify.oracle.contract import Contract
from verify.placement import Partial, shard
from verify.rank_program import Observation
from verify.reference import Reference, result_names
from verify.replica import RankMap, ranks_text
from verify.tolerance import Tolerance


def unshown(
    case: Case,
    contract: Contract,
    ranks: RankMap,
    observations: Sequence[Observation],
    names: Collection[str] | None = None,
) -> Iterator[str]:
    """One line for each result, of these `names` if given, that ranks of a replica lack or have of
    another shape, or that is zero on them, or as the sum of theirs, where it must not be. The
    reference runs only where something is zero, under the masks that were."""
    masks = Masks(contract, ranks, [each.masks for each in observations])
    if wrong := masks.misshapen():
        yield wrong
        return
    looking = _Looking(case, contract, ranks, observations, masks)
    for name in result_names(contract) if names is None else names:
        for members in ranks.replicas.values():
            if lines := [*looking.misshapen(name, members)]:
                yield from lines
            elif zero := looking.zero(name, members):
                yield f"{name} is zero throughout on {ranks_text(zero)}; it should not be"


@dataclass
class _Looking:
    """What ranks show. `_tolerances` are of the replicas where something was zero."""

    case: Case
    contract: Contract
    ranks: RankMap
    observations: Sequence[Observation]
    masks: Masks
    _tolerances: dict[str, Tolerance] = field(default_factory=dict)

    def misshapen(self, name: str, members: Sequence[int]) -> Iterator[str]:
        """Of these ranks, those that lack a result or have it of another shape."""
        lines: dict[tuple[str, str], list[int]] = {}
        full = torch.zeros(()).expand(_shape(self.contract, name))
        for rank in members:
            found, wanted = self.observations[rank].tensors[name], self._cut(name, rank)(full)
            if found is None:
                said = "is missing", ": backward did not reach it"
            elif found.shape != wanted.shape:
                said = f"is {list(found.shape)}", f"; it should be {list(wanted.shape)}"
            else:
                continue
            lines.setdefault(said, []).append(rank)
        for (what, rest), own in lines.items():
            yield f"{name} {what} on {ranks_text(own)}{rest}"

    def zero(self, name: str, members: Sequence[int]) -> list[int]:
        """Of these ranks, those whose part of a result is zero, or a sum of parts, and must not
        be."""
        placements = placements_in(self.contract, self.observations[members[0]], name)
        alone: list[tuple[int, ...]] = [(rank,) for rank in members]
        partial = any(isinstance(placement, Partial) for placement in placements.values())
        together = self.ranks.summed(placements, members) if partial else alone
        return [
            rank
            for summands in together
            if self._vanishes(name, summands)
            and _wrongly_zero(self._tolerance(summands[0]), name, self._cut(name, summands[0]))
            for rank in summands
        ]

    def _vanishes(self, name: str, summands: Sequence[int]) -> bool:
        found = [self.observations[rank].tensors[name] for rank in summands]
        parts = [each for each in found if each is not None and each.any()]
        return not parts or (len(parts) > 1 and not bool(torch.stack(parts).sum(0).any()))

    def _cut(self, name: str, rank: int) -> Callable[[Tensor], Tensor]:
        placements = placements_in(self.contract, self.observations[rank], name)
        at = self.ranks.coordinates[rank]
        return lambda full: shard(full, placements, self.ranks.sizes, at)

    def _tolerance(self, rank: int) -> Tolerance:
        replica = self.ranks.replica(rank)
        if replica not in self._tolerances:
            given = generate(self.case, self.contract, self.ranks, replica)
            given = given.with_masks(self.masks.full(replica))
            self._tolerances[replica] = Tolerance(Reference(self.case, self.contract, given))
        return self._tolerances[replica]


def must_not_vanish(reference: Reference, name: str) -> bool:
    """Whether zeros would be no correct result; nothing is known where the reference overflows in
    the case's dtype."""
    return _wrongly_zero(Tolerance(reference), name, lambda full: full)


def _wrongly_zero(tolerance: Tolerance, name: str, cut: Callable[[Tensor], Tensor]) -> bool:
    expected = cut(tolerance.reference.results[name]).double()
    zeros = torch.zeros_like(expected)
    if torch.equal(expected, zeros) or tolerance.overflows(name):
        return False
    return tolerance.excess(name, zeros, expected, cut) is not None


def _shape(contract: Contract, name: str) -> tuple[int, ...]:
    """The full shape of a result."""
    if name in contract.outputs:
        return contract.outputs[name].shape
    source = name.removeprefix("grad ")
    if source in contract.inputs:
        return contract.inputs[source].shape
    return contract.parameters[source]
