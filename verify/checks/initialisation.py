"""The check `initialisation`: what a model's parameters are before training.

1. With way `whole` every rank's part is, bit for bit, its part of what one rank alone has.
2. With way `local` ranks of a stage that hold copies, as replicas too, hold the same bits.
3. Parts, layers and, with way `local`, stages are drawn independently: no two are alike.
4. Values have mean zero and the spread that the rule promises; where it promises none, they are
   zero.
5. They are others with another seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from verify.case import Case
from verify.checks.blame import Bench
from verify.cluster.base import Cluster
from verify.compare import same_bits
from verify.errors import Mismatch
from verify.layout import Layout
from verify.oracle.initialise import Drawn, initialisation
from verify.placement import assemble, shard
from verify.rank_program import session_of, target_code
from verify.replica import RankMap
from verify.targets import load_target

Local = Mapping[str, Tensor]
_DEVIATIONS = 7.0
# Fewer random numbers can be alike by chance, in bfloat16.
_TELLING = 8
_MOST_DETAILS = 6


def initialisation_check(case: Case, *, target_name: str, cluster: Cluster) -> int:
    """The parameters of the case's model as the target builds it obey laws 1 to 5."""
    bench = Bench("initialisation", case, target_name, cluster)
    promised = initialisation(case)
    bench.require_support(case)
    found = bench.run(_built, target_name, case, world_size=case.layout.world_size)
    court = _Court(case, promised)
    another = replace(case, seed=case.seed + 1)
    seeded = bench.run(_built, target_name, another, world_size=case.layout.world_size)
    details = [*court.spread(found), *court.moved(found, seeded)]
    if case.options.get("way", "whole") == "whole":
        alone = replace(case, layout=Layout(sequence_parallel=case.layout.sequence_parallel))
        (single,) = bench.run(_built, target_name, alone, world_size=1)
        details += [*court.cut(found, single), *court.apart([single], Layout())]
    else:
        details += [*court.copies(found), *court.apart(found, case.layout)]
    if details:
        raise bench.mismatch("initialisation", details=tuple(details[:_MOST_DETAILS]))
    return sum(part.numel() for local in found for part in local.values())


def _built(target_name: str, case: Case) -> Local:
    """Rank program: the local parameters of the model, as built."""
    promised, layout = initialisation(case), case.layout
    ranks, rank = RankMap(layout, _axes(promised)), dist.get_rank()
    with session_of(load_target(target_name), layout) as session:
        with target_code(f"building {case.concept}"):
            parameters = dict(session.build(case).parameters())
        with target_code("compared with what is promised"):
            if set(parameters) != set(promised):
                raise Mismatch(
                    f"parameters: {', '.join(parameters)}; promised are {', '.join(promised)}"
                )
            for name, (parameter, _) in parameters.items():
                drawn = promised[name]
                whole = torch.empty(drawn.shape, device="meta")
                part = shard(whole, drawn.placements, ranks.sizes, ranks.coordinates[rank])
                if parameter.shape != part.shape:
                    raise Mismatch(
                        f"{name} is {list(parameter.shape)} on rank {rank}; it should be"
                        f" {list(part.shape)}"
                    )
        return {name: parameter.detach().cpu() for name, (parameter, _) in parameters.items()}


def _axes(promised: Mapping[str, Drawn]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(axis for each in promised.values() for axis in each.placements))


class _Court:
    """Holds the parameters of all ranks against the laws, one line for what breaks them."""

    def __init__(self, case: Case, promised: Mapping[str, Drawn]) -> None:
        self.case, self.promised = case, promised
        self.ranks = RankMap(case.layout, _axes(promised))

    def cut(self, found: Sequence[Local], single: Local) -> Iterator[str]:
        """Law 1."""
        for rank, local in enumerate(found):
            for name, drawn in self.promised.items():
                at = self.ranks.coordinates[rank]
                part = shard(single[name], drawn.placements, self.ranks.sizes, at)
                if not same_bits(local[name], part):
                    yield f"{name} on rank {rank} is not its part of what one rank alone has"

    def moved(self, found: Sequence[Local], seeded: Sequence[Local]) -> Iterator[str]:
        """Law 5."""
        for rank, (local, other) in enumerate(zip(found, seeded, strict=True)):
            for name, tensor in local.items():
                telling = self.promised[name].spread and tensor.numel() >= _TELLING
                if telling and same_bits(tensor, other[name]):
                    yield f"{name} on rank {rank} is what it is with another seed"

    def copies(self, found: Sequence[Local]) -> Iterator[str]:
        """Law 2."""
        for name in self.promised:
            first: dict[tuple[int, ...], int] = {}
            for rank, local in enumerate(found):
                other = first.setdefault(self._place(name, rank), rank)
                if not same_bits(local[name], found[other][name]):
                    yield f"{name} on rank {rank} is not that of rank {other}, which holds a copy"

    def apart(self, found: Sequence[Local], layout: Layout) -> Iterator[str]:
        """Law 3."""
        seen: dict[bytes, tuple[str, tuple[int, ...], int]] = {}
        for rank, local in enumerate(found):
            for name, tensor in local.items():
                if not self.promised[name].spread or tensor.numel() < _TELLING:
                    continue
                place = self._place(name, rank) if layout == self.case.layout else ()
                key = tensor.double().flatten().numpy().tobytes()
                other, where, first = seen.setdefault(key, (name, place, rank))
                if (other, where) != (name, place):
                    yield f"{name} on rank {rank} has the numbers of {other} on rank {first}"

    def spread(self, found: Sequence[Local]) -> Iterator[str]:
        """Law 4, of the first stage's full parameters."""
        at = self.ranks.coordinates
        members = [rank for rank in range(len(found)) if at[rank]["pp"] == 0]
        for name, drawn in self.promised.items():
            local = {rank: found[rank][name].double() for rank in members}
            coordinates = {rank: at[rank] for rank in members}
            full = assemble(drawn.shape, local, drawn.placements, self.ranks.sizes, coordinates)
            if not drawn.spread:
                if full.any():
                    yield f"{name} is not zero"
                continue
            if not full.any():
                yield f"{name} is zero; promised is a spread of {drawn.spread:.3g}"
            count, roundoff = full.numel(), torch.finfo(found[0][name].dtype).eps
            mean, square = float(full.mean()), float((full**2).mean())
            if not abs(mean) <= _DEVIATIONS * drawn.spread / count**0.5:
                yield f"{name} has mean {mean:.3g}; promised is 0, spread {drawn.spread:.3g}"
            # A sum of squares has a long tail (Laurent and Massart, Annals of Statistics 28(5),
            # 2000, lemma 1): of a single number 3.4 deviations are not rare.
            allowed = _DEVIATIONS * (2 / count) ** 0.5 + 2 * roundoff
            beyond = square / drawn.spread**2 - 1
            if not -allowed <= beyond <= allowed + _DEVIATIONS**2 / count:
                yield f"{name} has a spread of {square**0.5:.3g}; promised is {drawn.spread:.3g}"

    def _place(self, name: str, rank: int) -> tuple[int, ...]:
        """Where a rank's part belongs: ranks of one place hold copies."""
        axes = ("pp", *self.promised[name].placements)
        return tuple(self.ranks.coordinates[rank][axis] for axis in axes)
