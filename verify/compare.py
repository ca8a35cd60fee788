"""Holds the ranks' tensors against the reference, in the order of execution, and copies together.

Every local tensor of every rank is looked at: where ranks hold copies, one is compared with the
reference and the others with it, bit for bit. Parts of a `Partial` tensor are summed first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from verify.diagnose.evidence import Evidence
from verify.errors import BeyondRange, HarnessError
from verify.finding import Divergence, Kind
from verify.oracle.contract import Contract
from verify.placement import Partial, Placements, shard
from verify.rank_program import Observation
from verify.reference import Results, result_names
from verify.replica import RankMap
from verify.tolerance import Excess, Tolerance

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FIRST: tuple[Kind, ...] = (
    "missing",
    "unexpected",
    "shape",
    "dtype",
    "contract",
    "value",
    "copies",
)


@dataclass(frozen=True)
class Expectation:
    """What one replica should compute: full results, and how near is near enough."""

    full: Results
    tolerance: Tolerance


@dataclass
class _Wrong:
    """One rank's complaint about one tensor."""

    rank: int
    kind: Kind
    detail: str = ""
    excess: Excess | None = None


@dataclass
class Comparison:
    """Compares the observations of all ranks with the expectation of each replica.

    `divergences` are the wrong tensors in the order of execution; `evidence` is of the first of
    them, where its values are wrong, and knows how far off those after it are; `elements` is how
    many were compared. Raises HarnessError if it did not see every tensor, and BeyondRange if
    nothing is wrong with what it could judge, and something is that the reference cannot be
    computed of in the case's dtype.
    """

    contract: Contract
    ranks: RankMap
    expectations: Mapping[str, Expectation]
    observations: Sequence[Observation]
    divergences: list[Divergence] = field(default_factory=list)
    evidence: Evidence | None = None
    elements: int = 0
    _seen: int = 0
    _beyond: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        names = result_names(self.contract)
        for name in names:
            self._compare(name)
        for name in self.contract.frozen:
            self._unexpected(f"grad {name}")
        if not self.contract.outputs or self._seen != len(names) * len(self.observations):
            raise HarnessError(
                f"compare: saw {self._seen} local tensors of {len(names)} results on"
                f" {len(self.observations)} ranks"
            )
        if self._beyond and not self.divergences:
            beyond = ", ".join(name for name in names if name in self._beyond)
            raise BeyondRange(f"reference: {beyond} overflows")

    def _compare(self, name: str) -> None:
        wrong = [
            each
            for replica, members in self.ranks.replicas.items()
            for each in self._replica(name, self.expectations[replica], members)
        ]
        if wrong:
            self._note(name, wrong)

    def _replica(
        self, name: str, expectation: Expectation, members: tuple[int, ...]
    ) -> list[_Wrong]:
        found: list[_Wrong] = []
        placements = self._placements(name, members[0])
        for rank in members:
            self._seen += 1
            found += self._malformed(name, expectation, rank, placements)
        if found:
            return found
        if expectation.tolerance.overflows(name):
            self._beyond.add(name)
            return []
        if any(isinstance(placement, Partial) for placement in placements.values()):
            return self._sums(name, expectation, members, placements)
        for alike in self.ranks.alike(placements, members):
            found += self._copies(name, expectation, alike, placements)
        return found

    def _placements(self, name: str, rank: int) -> Placements:
        return placements_in(self.contract, self.observations[rank], name)

    def _malformed(
        self, name: str, expectation: Expectation, rank: int, placements: Placements
    ) -> list[_Wrong]:
        """What is wrong with a local tensor before its values are looked at."""
        if self._placements(name, rank) != placements:
            raise HarnessError(f"compare: the ranks do not agree how {name} is placed")
        found = self.observations[rank].tensors[name]
        if found is None:
            return [_Wrong(rank, "missing", "is missing: backward did not reach it")]
        shape = self._cut(expectation.full[name], placements, rank).shape
        dtype = expectation.tolerance.reference.dtypes[name]
        if found.shape != shape:
            text = f"has shape {list(found.shape)} and should have {list(shape)}"
            return [_Wrong(rank, "shape", text)]
        if found.dtype is not dtype:
            text = f"is {_short(found.dtype)} and should be {_short(dtype)}"
            return [_Wrong(rank, "dtype", text)]
        self.elements += found.numel()
        return []

    def _copies(
        self, name: str, expectation: Expectation, alike: tuple[int, ...], placements: Placements
    ) -> list[_Wrong]:
        """Compare the first of several copies with the reference, and the others with it."""
        first, found = self._local(name, alike[0]), []
        excess = self._excess(name, expectation, first, alike[0], placements)
        for rank in alike:
            mine = self._local(name, rank)
            if same_bits(mine, first):
                found += [_Wrong(rank, "value", excess=excess)] if excess else []
            elif other := self._excess(name, expectation, mine, rank, placements):
                found.append(_Wrong(rank, "value", excess=other))
            elif not excess:
                found.append(_apart(rank, mine, first, f"on rank {alike[0]}, which holds a copy"))
        return found

    def _sums(
        self, name: str, expectation: Expectation, members: tuple[int, ...], placements: Placements
    ) -> list[_Wrong]:
        found = []
        for summands in self.ranks.summed(placements, members):
            total = self._total(name, summands)
            excess = self._excess(name, expectation, total, summands[0], placements)
            if excess is not None:
                text = f"(the sum over ranks {', '.join(map(str, summands))})"
                found += [_Wrong(rank, "value", text, excess) for rank in summands]
        return found

    def _excess(
        self,
        name: str,
        expectation: Expectation,
        candidate: Tensor,
        rank: int,
        placements: Placements,
    ) -> Excess | None:
        def cut(full: Tensor) -> Tensor:
            return self._cut(full, placements, rank)

        expected = cut(expectation.full[name]).double()
        return expectation.tolerance.excess(name, candidate.double(), expected, cut)

    def _unexpected(self, name: str) -> None:
        wrong = [
            _Wrong(rank, "unexpected", "is there although its parameter is frozen")
            for rank, each in enumerate(self.observations)
            if each.tensors.get(name) is not None
        ]
        if wrong:
            self._note(name, wrong)

    def _note(self, name: str, wrong: list[_Wrong]) -> None:
        """Add the divergence of a tensor: the worst rank speaks for all."""
        kind = min((each.kind for each in wrong), key=_FIRST.index)
        blamed = [each for each in wrong if each.kind == kind]
        worst = max(blamed, key=lambda each: (_ratio(each.excess), -each.rank))
        divergence = Divergence(
            tensor=name,
            kind=kind,
            rank=worst.rank,
            coordinates=_many(self.ranks, worst.rank),
            ranks=tuple(sorted({each.rank for each in blamed})),
            detail=worst.detail,
            **({} if worst.excess is None else vars(worst.excess)),
        )
        if kind == "value" and (self.evidence or not self.divergences):
            evidence = self._evidence(name, worst.rank, divergence.ranks)
            if self.evidence is None:
                self.evidence = evidence
            else:
                later = max(self.evidence.later, evidence.relative)
                self.evidence = replace(self.evidence, later=later)
        self.divergences.append(divergence)

    def _evidence(self, name: str, rank: int, wrong: tuple[int, ...]) -> Evidence:
        replica = self.ranks.replica(rank)
        members, expectation = self.ranks.replicas[replica], self.expectations[replica]
        placements = self._placements(name, rank)
        candidate = {
            summands[0]: self._total(name, summands)
            for summands in self.ranks.summed(placements, members)
        }
        return Evidence(
            name=name,
            full=expectation.full[name].double(),
            placements=placements,
            ranks=self.ranks,
            candidate=candidate,
            wrong=tuple(each for each in wrong if each in candidate),
            dtype=expectation.tolerance.reference.dtypes[name],
            reference=expectation.tolerance.reference,
            parameters=self.observations[rank].placements,
        )

    def _total(self, name: str, summands: tuple[int, ...]) -> Tensor:
        locals_ = [self._local(name, rank).double() for rank in summands]
        return locals_[0] if len(locals_) == 1 else torch.stack(locals_).sum(0)

    def _local(self, name: str, rank: int) -> Tensor:
        found = self.observations[rank].tensors[name]
        if found is None:
            raise HarnessError(f"compare: {name} on rank {rank} is missing")
        return found

    def _cut(self, full: Tensor, placements: Placements, rank: int) -> Tensor:
        return shard(full, placements, self.ranks.sizes, self.ranks.coordinates[rank])


def placements_in(contract: Contract, observation: Observation, name: str) -> Placements:
    """The placement of a result: of an output, an input's gradient, a parameter's gradient."""
    if name in contract.outputs:
        return contract.outputs[name].placements
    source = name.removeprefix("grad ")
    if source in contract.inputs:
        return contract.inputs[source].grad_placements or {}
    return observation.placements[source]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits; -0.0 passes for 0.0."""
    if one is other or torch.equal(one, other):
        return True
    # To torch.equal a NaN differs from itself.
    bits = _BITS[one.element_size()]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


def difference(mine: Tensor, other: Tensor) -> Excess:
    """Where two tensors of one shape that do not hold the same bits differ most."""
    apart = (mine.double() - other.double()).abs().nan_to_num(torch.inf)
    index = tuple(int(i) for i in torch.unravel_index(apart.argmax(), apart.shape))
    value, wanted = float(mine[index]), float(other[index])
    return Excess(index, wanted, value, float(apart[index]), 0.0, "element")


def _apart(rank: int, mine: Tensor, other: Tensor, detail: str) -> _Wrong:
    return _Wrong(rank, "copies", detail, difference(mine, other))


def _ratio(excess: Excess | None) -> float:
    if excess is None:
        return 0.0
    if excess.error != excess.error:
        return torch.inf
    return excess.error / excess.bound if excess.bound else excess.error


def _many(ranks: RankMap, rank: int) -> dict[str, int]:
    """A rank's coordinates on the axes with more than one rank."""
    return {a: i for a, i in ranks.coordinates[rank].items() if ranks.sizes[a] > 1}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
