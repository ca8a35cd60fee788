"""Whether a run shows anything: results that are missing or zero throughout, where the reference's
are not, agree with each other, keep little and communicate as promised, and say nothing of it.

`equivalence` compares every element with the reference and needs none of this; the other checks
compare a target with itself or count what it does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from verify.case import Case
from verify.checks.masks import Masks
from verify.lens import generate
from verify.oracle.contract import Contract
from verify.rank_program import Observation
from verify.reference import Reference, result_names
from verify.replica import RankMap
from verify.tolerance import Tolerance


def unshown(
    case: Case,
    contract: Contract,
    ranks: RankMap,
    observations: Sequence[Observation],
    names: Collection[str] | None = None,
) -> Iterator[str]:
    """One line for each result, of these `names` if given, that a rank of a replica lacks, or that
    is zero on all of them where it must not be. The reference runs only where something is zero,
    under the masks that were."""
    masks = Masks(contract, ranks, [each.masks for each in observations])
    if wrong := masks.misshapen():
        yield wrong
        return
    references: dict[str, Reference] = {}
    for name in result_names(contract) if names is None else names:
        for replica, members in ranks.replicas.items():
            found = [observations[rank].tensors[name] for rank in members]
            there = [each for each in found if each is not None]
            which = f"ranks {', '.join(map(str, members))}"
            if len(there) < len(found):
                lacking = [rank for rank in members if observations[rank].tensors[name] is None]
                which = f"ranks {', '.join(map(str, lacking))}"
                yield f"{name} is missing on {which}: backward did not reach it"
            elif not any(map(_any, there)):
                if replica not in references:
                    given = generate(case, contract, ranks, replica)
                    given = given.with_masks(masks.full(replica))
                    references[replica] = Reference(case, contract, given)
                if must_not_vanish(references[replica], name):
                    yield f"{name} is zero throughout on {which}; it should not be"


def must_not_vanish(reference: Reference, name: str) -> bool:
    """Whether zeros would be no correct result."""
    expected = reference.results[name].double()
    zeros = torch.zeros_like(expected)
    return Tolerance(reference).excess(name, zeros, expected, lambda full: full) is not None


def _any(tensor: torch.Tensor) -> bool:
    return bool(tensor.any())
