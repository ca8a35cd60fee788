"""The checks: what a property says of a case, by name in `CHECKS`.

Each takes a case, a target's name and a cluster, returns when the case passes, and raises
`Mismatch` with a `Finding` when the target is wrong, `NotSupported` when it does not declare the
capability, `BadArgument` when the case is none, and `HarnessError` when nothing can be said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from verify.blame import Bench
from verify.case import Case
from verify.cluster.base import Cluster
from verify.compare import Comparison, Expectation, difference, same_bits
from verify.diagnose import diagnose
from verify.errors import HarnessError, Mismatch
from verify.finding import Divergence
from verify.group_laws import groups_check
from verify.layout import Layout
from verify.lens import check_fits, generate
from verify.oracle.contract import Contract
from verify.rank_program import Observation, Source, contract_of, observe
from verify.reference import Reference
from verify.refusal import refusal
from verify.replica import RankMap
from verify.tolerance import Tolerance


class Check(Protocol):
    """A check by name: returns where the case passes."""

    def __call__(self, case: Case, *, target_name: str, cluster: Cluster) -> None:
        """Raise Mismatch, NotSupported, BadArgument or HarnessError where it does not."""
        ...


def equivalence(case: Case, *, target_name: str, cluster: Cluster) -> None:
    """Outputs, input gradients and parameter gradients of every rank are the reference's, and
    copies on several ranks hold the same bits."""
    bench = Bench("equivalence", case, target_name, cluster)
    contract, ranks = _admit(bench)
    expectations = {
        replica: _expect(Reference(case, contract, generate(case, contract, ranks, replica)))
        for replica in ranks.replicas
    }
    observations = bench.run(observe, target_name, case, world_size=case.layout.world_size)
    _judge(bench, contract, ranks, expectations, observations)


def invariance(case: Case, *, target_name: str, cluster: Cluster) -> None:
    """The target on the case's layout agrees with itself on one rank, given the same data. The
    reference only calibrates: each of the two may be as far from it as equivalence allows."""
    bench = Bench("invariance", case, target_name, cluster)
    contract, ranks = _admit(bench)
    alone = Layout(sequence_parallel=case.layout.sequence_parallel)
    whole = dataclasses.replace(case, layout=alone)
    bench.require_support(whole)
    check_fits(whole, contract_of(whole), RankMap(alone, contract.axes))
    expectations = {}
    for replica in ranks.replicas:
        reference = Reference(case, contract, generate(case, contract, ranks, replica))
        (single,) = bench.run(observe, target_name, whole, Source(case, replica), world_size=1)
        expectations[replica] = _expect_same(bench, reference, single)
    observations = bench.run(observe, target_name, case, world_size=case.layout.world_size)
    _judge(bench, contract, ranks, expectations, observations)


def determinism(case: Case, *, target_name: str, cluster: Cluster) -> None:
    """Two runs of the case give every rank the same bits."""
    bench = Bench("determinism", case, target_name, cluster)
    _, ranks = _admit(bench)
    first, second = (
        bench.run(observe, target_name, case, world_size=case.layout.world_size) for _ in range(2)
    )
    names = [name for name in first[0].tensors if any(o.tensors[name] is not None for o in first)]
    if not names:
        raise HarnessError(f"determinism of {case}: there is no tensor to compare")
    divergences = [d for name in names if (d := _changed(name, first, second, ranks))]
    if divergences:
        raise bench.mismatch("bits", divergences=tuple(divergences))


def groups(case: Case, *, target_name: str, cluster: Cluster) -> None:
    """The target's process groups obey the laws of `verify.group_laws`."""
    bench = Bench("groups", case, target_name, cluster)
    try:
        groups_check(case, target_name=target_name, cluster=bench)
    except Mismatch as error:
        if error.finding is not None:
            raise
        raise bench.mismatch("groups", details=(str(error),)) from error


CHECKS: Mapping[str, Check] = {
    "equivalence": equivalence,
    "invariance": invariance,
    "determinism": determinism,
    "refusal": refusal,
    "groups": groups,
}


def _admit(bench: Bench) -> tuple[Contract, RankMap]:
    """The contract of a case that is valid and that the target says it supports."""
    contract = contract_of(bench.case)
    ranks = RankMap(bench.case.layout, contract.axes)
    check_fits(bench.case, contract, ranks)
    bench.require_support(bench.case)
    return contract, ranks


def _expect(reference: Reference) -> Expectation:
    return Expectation(reference.results, Tolerance(reference))


def _expect_same(bench: Bench, reference: Reference, single: Observation) -> Expectation:
    """What a run on one rank computed, as the expectation for the same data on many."""
    full = {}
    for name, wanted in reference.results.items():
        found = single.tensors[name]
        if found is None or found.shape != wanted.shape:
            what = "is missing" if found is None else f"has shape {list(found.shape)}"
            detail = f"one rank alone: {name} {what}; it should have {list(wanted.shape)}"
            raise bench.mismatch("contract", details=(detail,))
        full[name] = found.double()
    return Expectation(full, Tolerance(reference, slack=2.0))


def _judge(
    bench: Bench,
    contract: Contract,
    ranks: RankMap,
    expectations: Mapping[str, Expectation],
    observations: Sequence[Observation],
) -> None:
    """Raise Mismatch with a diagnosis where an observation is not what is expected."""
    for rank, each in enumerate(observations):
        if each.placements != observations[0].placements:
            detail = (
                f"rank {rank} places its parameters as {each.placements}, rank 0 as"
                f" {observations[0].placements}"
            )
            raise bench.mismatch("contract", details=(detail,))
    comparison = Comparison(contract, ranks, expectations, observations)
    if comparison.divergences:
        evidence = comparison.evidence
        raise bench.mismatch(
            comparison.divergences[0].kind,
            divergences=tuple(comparison.divergences),
            explanations=() if evidence is None else diagnose(evidence),
        )


def _changed(
    name: str, first: Sequence[Observation], second: Sequence[Observation], ranks: RankMap
) -> Divergence | None:
    """How one tensor differs between two runs, on the first rank where it does."""
    pairs = [
        (one.tensors[name], other.tensors[name]) for one, other in zip(first, second, strict=True)
    ]
    apart = [
        rank
        for rank, (one, other) in enumerate(pairs)
        if (one is None) != (other is None)
        or (one is not None and other is not None and not _same(one, other))
    ]
    if not apart:
        return None
    one, other = pairs[apart[0]]
    wrong = {"tensor": name, "rank": apart[0], "ranks": tuple(apart)}
    coordinates = ranks.coordinates[apart[0]]
    if one is None or other is None or one.shape != other.shape or one.dtype is not other.dtype:
        detail = "has another shape or dtype, or is missing, in one of two runs"
        return Divergence(kind="shape", coordinates=coordinates, detail=detail, **wrong)  # type: ignore[arg-type]
    excess = difference(one, other)
    return Divergence(
        kind="bits",
        coordinates=coordinates,
        detail="in a second run of the same case",
        **wrong,  # type: ignore[arg-type]
        **vars(excess),
    )


def _same(one: object, other: object) -> bool:
    return (
        one.shape == other.shape and one.dtype is other.dtype and same_bits(one, other)  # type: ignore[attr-defined,arg-type]
    )
