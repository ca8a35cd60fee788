"""Explanations in which contributions of ranks, or of parts of the batch, are missing or repeated.

A rank's share of a sum is what the reference gives when everything that is split over an axis is
zero but that rank's part of it: of the inputs and upstream gradients (tokens, parallel inputs,
summands), or of the parameters (the columns of a weight, the rows of an embedding).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from verify.diagnose.evidence import Evidence
from verify.finding import Explanation
from verify.lens import Generated, Problem
from verify.oracle.contract import Contract
from verify.placement import Partial, Placements, Shard, ZigzagShard, pieces
from verify.reference import Change, Reference

ADDITIVE = 1e-6

# By axis, the shares of its ranks.
AllShares = Sequence[tuple[str, list[Tensor]]]


def shares_of_ranks(evidence: Evidence) -> Iterator[Explanation]:
    """Shares are there, left out or added otherwise than all of them once. They take a run of the
    reference each, which is of no use where nothing is split."""
    found = list(_all_shares(evidence))
    for explain in (_own_share, _one_share, _wrong_count):
        yield from explain(evidence, found)


def _own_share(evidence: Evidence, found: AllShares) -> Iterator[Explanation]:
    """Every rank has its own share: the sum over the group is missing."""
    for axis, shares in found:
        predicted = {
            rank: evidence.cut(shares[evidence.ranks.coordinates[rank][axis]], rank)
            for rank in evidence.wrong
        }
        yield evidence.explain(
            f"the sum over {evidence.group_text(axis)} is missing: every rank has {evidence.name}"
            " of its own share only",
            predicted,
        )


def _one_share(evidence: Evidence, found: AllShares) -> Iterator[Explanation]:
    """All ranks have the share of one; or that share is left out, or is counted twice."""
    for axis, shares in found:
        total = torch.stack(shares).sum(0)
        adds_up = _near(total, evidence.full)
        name, whose = evidence.name, [f"{axis}={index}" for index in range(len(shares))]
        variants = {
            f"{name} has the share of {w} only": s for w, s in zip(whose, shares, strict=True)
        }
        for w, share in zip(whose, shares, strict=True) if adds_up else ():
            variants[f"the share of {w} is left out of {name}"] = total - share
            variants[f"the share of {w} is counted twice in {name}"] = total + share
        for sentence, full in variants.items():
            predicted = {rank: evidence.cut(full, rank) for rank in evidence.wrong}
            yield evidence.explain(sentence, predicted)


def missing_sum(evidence: Evidence) -> Iterator[Explanation]:
    """The ranks' tensors add up to the expected one."""
    if evidence.summed:
        return
    for axis, groups in evidence.groups.items():
        if evidence.dim(axis) is not None:
            continue
        predicted = {}
        for group in groups:
            total = torch.stack([evidence.candidate[rank] for rank in group]).sum(0)
            for rank in group:
                others = total - evidence.candidate[rank]
                predicted[rank] = evidence.expected[rank] - others
        if all(rank in predicted for rank in evidence.wrong):
            yield evidence.explain(
                f"the all-reduce over {evidence.group_text(axis)} is missing: the ranks'"
                f" {evidence.name} add up to what it should be",
                predicted,
            )


def _wrong_count(evidence: Evidence, found: AllShares) -> Iterator[Explanation]:
    """A copied summand was added by every rank: the result is the sum of one tensor, n times."""
    for axis, shares in found:
        size = evidence.ranks.sizes[axis]
        for index, share in enumerate(shares):
            full = share * size
            predicted = {rank: evidence.cut(full, rank) for rank in evidence.wrong}
            yield evidence.explain(
                f"{evidence.name} is {size} times the share of {axis}={index}: every rank of"
                f" {evidence.group_text(axis)} added the same part",
                predicted,
            )


def part_of_the_batch(evidence: Evidence) -> Iterator[Explanation]:
    """A gradient of the last, or of the first, sequence of the batch only."""
    reference = evidence.reference
    if reference is None or not evidence.name.startswith("grad "):
        return
    lengths = {g.full.shape[1] for g in reference.problem.upstream.values() if g.full.dim() > 1}
    if len(lengths) != 1 or (batch := lengths.pop()) == 1:
        return
    for which, index in (("last", batch - 1), ("first", 0)):
        results = reference.evaluate(torch.float64, partial(_only_in_batch, index))
        predicted = {r: evidence.cut(results[evidence.name], r) for r in evidence.wrong}
        yield evidence.explain(
            f"{evidence.name} is that of the {which} of the batch's {batch} sequences only:"
            " gradients of microbatches are overwritten instead of accumulated",
            predicted,
        )


def _only_in_batch(index: int, name: str, given: Generated) -> Tensor:
    if not name.startswith("grad ") or given.full.dim() < 2:
        return given.full
    kept = torch.zeros_like(given.full)
    kept[:, index] = given.full[:, index]
    return kept


def _all_shares(evidence: Evidence) -> Iterator[tuple[str, list[Tensor]]]:
    """By axis, the shares of its ranks: of what is given, then of the parameters, then of both,
    where they are split."""
    reference = evidence.reference
    if reference is None:
        return
    for axis in evidence.groups:
        size = evidence.ranks.sizes[axis]
        given, weights = _placements(reference.contract), dict(evidence.parameters)
        ways = [each for each in (given, weights) if _splits(reference.problem, each, axis)]
        if len(ways) > 1:
            ways.append(given | weights)
        for placements in ways:
            shares = [
                _share(reference, evidence.name, partial(_only, placements, axis, size, index))
                for index in range(size)
            ]
            if not all(torch.equal(share, evidence.full) for share in shares):
                yield axis, shares


def _share(reference: Reference, name: str, change: Change) -> Tensor:
    return reference.evaluate(torch.float64, change)[name]


def _splits(problem: Problem, placements: Mapping[str, Placements], axis: str) -> bool:
    """Whether ranks of an axis hold different parts of something that is no index."""
    upstream = {f"grad {name}": each for name, each in problem.upstream.items()}
    given = {**problem.inputs, **problem.parameters, **upstream}
    return any(
        isinstance(placements.get(name, {}).get(axis), Shard | ZigzagShard | Partial)
        for name, each in given.items()
        if each.full.is_floating_point()
    )


def _placements(contract: Contract) -> dict[str, Placements]:
    """Placements of what is given, by the names by which it is generated."""
    given: dict[str, Placements] = {n: spec.placements for n, spec in contract.inputs.items()}
    for name, spec in contract.outputs.items():
        given[f"grad {name}"] = spec.grad_placements or {}
    return given


def _only(
    placements: Mapping[str, Placements],
    axis: str,
    size: int,
    index: int,
    name: str,
    given: Generated,
) -> Tensor:
    """A given tensor with everything zero that rank `index` of `axis` does not hold."""
    placement = placements.get(name, {}).get(axis)
    if isinstance(placement, Partial) and given.parts is not None and len(given.parts) == size:
        return given.parts[index]
    if not isinstance(placement, Shard | ZigzagShard):
        return given.full
    kept = torch.zeros_like(given.full)
    for piece in pieces(given.full.shape[placement.dim], placement, size)[index]:
        place = [slice(None)] * given.full.dim()
        place[placement.dim] = piece
        kept[tuple(place)] = given.full[tuple(place)]
    return kept


def _near(one: Tensor, other: Tensor) -> bool:
    return float((one - other).norm()) <= ADDITIVE * float(other.norm())
