"""Observations as right ranks would make them, to be spoilt by tests."""

import fake_targets  # noqa: F401  (registers the concepts)
import torch

from verify.case import Case
from verify.compare import Comparison, Expectation
from verify.layout import Layout
from verify.lens import generate
from verify.placement import Partial, Shard, shard
from verify.rank_program import Observation, contract_of
from verify.reference import Reference, result_names
from verify.replica import RankMap
from verify.tolerance import Tolerance

SHAPE = {"sequence": 6, "batch": 4, "in_features": 8, "out_features": 6}


class Scene:
    """A case with its references, and what every rank would have; `spoil` and then `compare`."""

    def __init__(self, case: Case, contract=None, parameters=None):
        self.case = case
        self.contract = contract or contract_of(case)
        self.placed = parameters or {"weight": {"tp": Shard(1)}, "bias": {}}
        self.ranks = RankMap(case.layout, self.contract.axes)
        self.references = {
            replica: Reference(
                case, self.contract, generate(case, self.contract, self.ranks, replica)
            )
            for replica in self.ranks.replicas
        }
        self.tensors = [self._rank(rank) for rank in range(case.layout.world_size)]

    def placements(self, name):
        source = name.removeprefix("grad ")
        if name in self.contract.outputs:
            return self.contract.outputs[name].placements
        if source in self.contract.inputs:
            return self.contract.inputs[source].grad_placements
        return self.placed[source]

    def cut(self, name, rank, full):
        placements = self.placements(name)
        coordinates = self.ranks.coordinates[rank]
        part = shard(full, placements, self.ranks.sizes, coordinates)
        if any(isinstance(p, Partial) for p in placements.values()):
            first = self.ranks.part(placements, rank) == 0
            return part.clone() if first else torch.zeros_like(part)
        return part.clone()

    def full(self, name, rank=0):
        return self.references[self.ranks.replica(rank)].native[name]

    def _rank(self, rank):
        return {
            name: self.cut(name, rank, self.full(name, rank))
            for name in result_names(self.contract)
        }

    def spoil(self, name, way, ranks=None):
        """Replace a tensor by `way(tensor, rank)` on these ranks, or on all."""
        for rank in range(len(self.tensors)) if ranks is None else ranks:
            self.tensors[rank][name] = way(self.tensors[rank][name], rank)
        return self

    def spoil_full(self, name, way):
        """Give every rank its part of `way(full)` instead of its part of the full tensor."""
        return self.spoil(name, lambda _, rank: self.cut(name, rank, way(self.full(name, rank))))

    def compare(self) -> Comparison:
        expectations = {
            replica: Expectation(reference.results, Tolerance(reference))
            for replica, reference in self.references.items()
        }
        observed = [Observation(tensors, self.placed) for tensors in self.tensors]
        return Comparison(self.contract, self.ranks, expectations, observed)


def scene(lens="fp64", dtype="float64", layout=None, options=None, concept="fake_row", seed=0):
    """A row-parallel linear layer on tp2-dp2, unless told otherwise."""
    shape = SHAPE if concept == "fake_row" else {"sequence": 4, "batch": 2, "hidden": 6}
    case = Case(
        concept=concept,
        layout=layout or Layout(tp=2, dp=2),
        shape=shape,
        options=options or {},
        lens=lens,
        dtype=dtype,
        seed=seed,
    )
    return Scene(case, parameters=None if concept == "fake_row" else {})


__all__ = ["SHAPE", "Scene", "scene"]
