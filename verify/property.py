"""The checks: what a property says of a case, by name in `CHECKS`.

Each takes a case, a target's name and a cluster, returns how much it compared when the case
passes (elements of tensors, or ranks where no tensors are compared), and raises `Mismatch` with a
`Finding` when the target is wrong, `NotSupported` when it does not declare the capability,
`BadArgument` when the case is none, and `HarnessError` when nothing can be said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from verify.case import Case
from verify.checks.blame import Bench
from verify.checks.group_laws import groups_check
from verify.checks.initialisation import initialisation_check
from verify.checks.masks import Masks
from verify.checks.misfit import misfit
from verify.checks.promises import (
    kept_too_much,
    miscommunicated,
    not_waited_for,
    promises_communication,
)
from verify.checks.random_states import left_elsewhere, moved_by_backward
from verify.checks.refusal import refusal
from verify.checks.rerun import rerun, unrepeatable
from verify.checks.stream_laws import streams
from verify.checks.stream_misuse import misuse
from verify.checks.traffic import traffic
from verify.checks.vacuity import must_not_vanish, unshown
from verify.cluster.base import Cluster
from verify.cluster.history import History
from verify.compare import Comparison, Expectation, difference, same_bits
from verify.diagnose import diagnose
from verify.errors import BadArgument, HarnessError, Mismatch, NotSupported
from verify.finding import Divergence
from verify.layout import Layout
from verify.lens import check_fits, generate
from verify.oracle.contract import Contract
from verify.rank_program import Observation, Source, contract_of, observe
from verify.reference import Reference
from verify.replica import RankMap
from verify.runner.limits import limits
from verify.schedules.check import schedule_check
from verify.tolerance import Tolerance


class Check(Protocol):
    """A check by name: returns how much it compared, where the case passes."""

    def __call__(self, case: Case, *, target_name: str, cluster: Cluster) -> int:
        """Raise Mismatch, NotSupported, BadArgument or HarnessError where it does not."""
        ...


def equivalence(case: Case, *, target_name: str, cluster: Cluster) -> int:
    """Outputs, input gradients and parameter gradients of every rank are the reference's, and
    copies on several ranks hold the same bits. Of dropouts: copies of a tensor are dropped alike,
    different parts independently, at the right rate, and the reference is given the masks; and
    backward leaves random generators as forward left them."""
    bench = Bench("equivalence", case, target_name, cluster)
    contract, ranks = _admit(bench)
    problems = {name: generate(case, contract, ranks, name) for name in ranks.replicas}
    observations = bench.run(observe, target_name, case, world_size=case.layout.world_size)
    if details := moved_by_backward(observations):
        raise bench.mismatch("random state", details=details)
    masks = _masks(bench, contract, ranks, observations)
    # Only now: while a target runs there is no result of the reference that it could find.
    expectations = {
        name: _expect(Reference(case, contract, problem.with_masks(masks.full(name))))
        for name, problem in problems.items()
    }
    return _judge(bench, contract, ranks, expectations, observations)


def invariance(case: Case, *, target_name: str, cluster: Cluster) -> int:
    """The target on the case's layout agrees with itself on one rank, given the same data. The
    reference only calibrates: each of the two may be as far from it as equivalence allows."""
    bench = Bench("invariance", case, target_name, cluster)
    contract, ranks = _admit(bench)
    if contract.masks:
        raise BadArgument(f"case: {case} drops at random, which depends on the layout")
    alone = Layout(sequence_parallel=case.layout.sequence_parallel)
    whole = dataclasses.replace(case, layout=alone)
    bench.require_support(whole)
    check_fits(whole, contract_of(whole), RankMap(alone, contract.axes))
    singles = {}
    for replica in ranks.replicas:
        (singles[replica],) = bench.run(
            observe, target_name, whole, Source(case, replica), world_size=1
        )
    observations = bench.run(observe, target_name, case, world_size=case.layout.world_size)
    expectations = {}
    for replica, single in singles.items():
        reference = Reference(case, contract, generate(case, contract, ranks, replica))
        expectations[replica] = _expect_same(bench, reference, single)
    return _judge(bench, contract, ranks, expectations, observations)


def determinism(case: Case, *, target_name: str, cluster: Cluster) -> int:
    """Two runs of the case give every rank the same bits; in the `sim` cluster, which repeats
    itself, the ranks take turns in another order the second time, unless the run has no
    adversary."""
    bench = Bench("determinism", case, target_name, cluster)
    contract, ranks = _admit(bench)
    adversaries = [case.adversary] * 2
    if cluster.name == "sim" and limits().adversaries:
        other = case.seed + 1 if case.adversary.schedule == case.seed else case.seed
        adversaries[1] = dataclasses.replace(case.adversary, schedule=other)
    first, second = (
        bench.run(
            observe,
            target_name,
            case,
            world_size=case.layout.world_size,
            adversary=adversary,
        )
        for adversary in adversaries
    )
    _require_shown(bench, contract, ranks, first)
    if divergences := _divergences(first, second, ranks, "in a second run of the same case"):
        raise bench.mismatch("bits", divergences=divergences)
    return _elements(first)


def recomputation(case: Case, *, target_name: str, cluster: Cluster) -> int:
    """The case gives every rank the bits that it gives without its option `recompute`: outputs,
    gradients, dropout masks, and the random generators' states; of a second pass, which shows what
    the first one left behind."""
    bench = Bench("recomputation", case, target_name, cluster)
    contract, ranks = _admit(bench)
    options = {name: value for name, value in case.options.items() if name != "recompute"}
    if len(options) == len(case.options):
        raise BadArgument(f"case.options: {case} has no recompute, so there is nothing to compare")
    plain = dataclasses.replace(case, options=options)
    # What is no pass of the harness, but a whole training, says itself how often it runs.
    times = 2 if any(s.grad_placements is not None for s in contract.outputs.values()) else 1
    first, second = (
        bench.run(observe, target_name, each, None, times, world_size=case.layout.world_size)
        for each in (plain, case)
    )
    _require_shown(bench, contract, ranks, first)
    if divergences := _divergences(first, second, ranks, "without recomputation"):
        raise bench.mismatch("bits", divergences=divergences)
    if details := left_elsewhere(first, second) + moved_by_backward(second):
        raise bench.mismatch("random state", details=details)
    return _elements(first)


def communication(case: Case, *, target_name: str, cluster: Cluster) -> int:
    """Every rank communicates what the contract promises, in forward, in backward and to complete
    gradients: these operations, over these groups, of this many elements, and nothing else."""
    bench = Bench("communication", case, target_name, cluster)
    contract, ranks = _admit(bench)
    if not promises_communication(contract):
        raise BadArgument(f"case: {case} promises nothing about communication")
    if cluster.name != "sim":
        raise NotSupported(f"the cluster {cluster.name} keeps no history of communication")
    history = History()
    observations = bench.run(
        observe, target_name, case, world_size=case.layout.world_size, history=history
    )
    _require_shown(bench, contract, ranks, observations)
    if details := miscommunicated(contract, case.layout, history):
        raise bench.mismatch("communication", details=details)
    return len(observations)


def waiting(case: Case, *, target_name: str, cluster: Cluster) -> int:
    """Every rank waits for all that it begins: also for a send, as only then what is sent may be
    written to, and its memory be taken for something else."""
    bench = Bench("waiting", case, target_name, cluster)
    contract, ranks = _admit(bench)
    if cluster.name != "sim":
        raise NotSupported(f"the cluster {cluster.name} keeps no history of communication")
    history = History()
    observations = bench.run(
        observe, target_name, case, world_size=case.layout.world_size, history=history
    )
    _require_shown(bench, contract, ranks, observations)
    if details := not_waited_for(history):
        raise bench.mismatch("waiting", details=details)
    return len(observations)


def memory(case: Case, *, target_name: str, cluster: Cluster) -> int:
    """On every rank autograd keeps no more from forward to backward than the contract promises."""
    bench = Bench("memory", case, target_name, cluster)
    contract, ranks = _admit(bench)
    if contract.kept is None:
        raise BadArgument(f"case: {case} promises nothing about memory")
    observations = bench.run(observe, target_name, case, world_size=case.layout.world_size)
    _require_shown(bench, contract, ranks, observations)
    if not any(each.kept for each in observations) and contract.kept:
        raise HarnessError(f"memory of {case}: autograd kept nothing, so nothing was seen")
    if details := kept_too_much(contract, observations):
        raise bench.mismatch("memory", details=details)
    return len(observations)


def groups(case: Case, *, target_name: str, cluster: Cluster) -> int:
    """The target's process groups obey the laws of `verify.checks.group_laws`."""
    bench = Bench("groups", case, target_name, cluster)
    try:
        groups_check(case, target_name=target_name, cluster=bench)
        return case.layout.world_size
    except Mismatch as error:
        if error.finding is not None:
            raise
        raise bench.mismatch("groups", details=(str(error),)) from error


CHECKS: Mapping[str, Check] = {
    "equivalence": equivalence,
    "invariance": invariance,
    "determinism": determinism,
    "recomputation": recomputation,
    "rerun": rerun,
    "unrepeatable": unrepeatable,
    "communication": communication,
    "waiting": waiting,
    "memory": memory,
    "traffic": traffic,
    "refusal": refusal,
    "misfit": misfit,
    "groups": groups,
    "streams": streams,
    "misuse": misuse,
    "schedule": schedule_check,
    "initialisation": initialisation_check,
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
        if not found.any() and must_not_vanish(reference, name):
            detail = f"one rank alone: {name} is zero throughout; it should not be"
            raise bench.mismatch("contract", details=(detail,))
        full[name] = found.double()
    return Expectation(full, Tolerance(reference, slack=2.0))


def _judge(
    bench: Bench,
    contract: Contract,
    ranks: RankMap,
    expectations: Mapping[str, Expectation],
    observations: Sequence[Observation],
) -> int:
    """How many elements were compared. Raises Mismatch with a diagnosis where an observation is not
    what is expected."""
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
    return comparison.elements


def _require_shown(
    bench: Bench, contract: Contract, ranks: RankMap, observations: Sequence[Observation]
) -> None:
    """Raise Mismatch where a run shows nothing of a result."""
    if details := tuple(unshown(bench.case, contract, ranks, observations)):
        raise bench.mismatch("contract", details=details)


def _elements(observations: Sequence[Observation]) -> int:
    found = [t for each in observations for t in each.tensors.values() if t is not None]
    return sum(tensor.numel() for tensor in found)


def _masks(
    bench: Bench, contract: Contract, ranks: RankMap, observations: Sequence[Observation]
) -> Masks:
    """The dropout masks of all ranks. Raises Mismatch where they break a law of masks."""
    masks = Masks(contract, ranks, [each.masks for each in observations])
    if wrong := masks.misshapen():
        raise bench.mismatch("contract", details=(wrong,))
    if divergences := masks.divergences():
        raise bench.mismatch("masks", divergences=tuple(divergences))
    return masks


def _divergences(
    first: Sequence[Observation], second: Sequence[Observation], ranks: RankMap, detail: str
) -> tuple[Divergence, ...]:
    """The tensors whose bits differ between two runs. Raises HarnessError if there are none."""
    names = [name for name in first[0].tensors if any(o.tensors[name] is not None for o in first)]
    if not names:
        raise HarnessError(f"{ranks.layout}: there is no tensor to compare")
    found = (_changed(name, first, second, ranks, detail) for name in names)
    return tuple(each for each in found if each is not None)


def _changed(
    name: str,
    first: Sequence[Observation],
    second: Sequence[Observation],
    ranks: RankMap,
    detail: str,
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
        text = "has another shape or dtype, or is missing, in one of two runs"
        return Divergence(kind="shape", coordinates=coordinates, detail=text, **wrong)  # type: ignore[arg-type]
    excess = difference(one, other)
    return Divergence(
        kind="bits",
        coordinates=coordinates,
        detail=detail,
        **wrong,  # type: ignore[arg-type]
        **vars(excess),
    )


def _same(one: object, other: object) -> bool:
    return (
        one.shape == other.shape and one.dtype is other.dtype and same_bits(one, other)  # type: ignore[attr-defined,arg-type]
    )
