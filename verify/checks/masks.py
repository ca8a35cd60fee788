"""The dropout masks that a target draws: recorded, judged, and given to the reference.

Every call of torch's dropout in forward is recorded on its rank, in order, as what was kept. So the
reference can apply the same masks, whatever generator made them, and three laws can be told: ranks
that hold copies of a tensor drop the same elements of it, ranks that hold different parts do not,
and no dropout repeats the mask of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import ceil, log, log2
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from verify.finding import Divergence
from verify.oracle.contract import Contract, Mask
from verify.placement import Cut, Placements, assemble, shard
from verify.replica import RankMap

# Masks of different parts agree by chance once in 2**40 cases; a keep rate is as far off, to either
# side, at most twice in e**26, which is once in 10**11.
_COINCIDENCE_BITS = 40
_SURPRISE = 26.0


class _Recording(TorchFunctionMode):
    """Draws the mask of every dropout first, and then applies it as torch's dropout does."""

    def __init__(self, masks: list[Tensor]) -> None:
        super().__init__()
        self._masks = masks

    def __torch_function__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if function not in (F.dropout, torch.dropout):
            return function(*args, **given)
        names = ("input", "p", "training" if function is F.dropout else "train", "inplace")
        given |= dict(zip(names, args, strict=False))
        p, active = given.get("p", 0.5), given.get(names[2], True)
        if not active or p == 0.0:
            return function(*args, **(kwargs or {}))
        source = given["input"]
        noise = F.dropout(torch.ones_like(source, requires_grad=False), p)
        # What is computed again in backward has been recorded already.
        if torch._C._current_graph_task_id() == -1:
            self._masks.append(noise != 0)
        return source.mul_(noise) if given.get("inplace", False) else source * noise


@contextmanager
def recorded() -> Iterator[list[Tensor]]:
    """While inside, the masks of this thread's dropouts, True where an element is kept. Nothing is
    recorded of a dropout that drops nothing."""
    masks: list[Tensor] = []
    with _Recording(masks):
        yield masks


def applied_alike() -> AbstractContextManager[object]:
    """While inside, this thread's dropouts are applied as `recorded` applies them, and nothing is
    recorded: for what a target computes again. torch's own keep other tensors on some devices."""
    return _Recording([])


@dataclass(frozen=True)
class Masks:
    """The masks of all ranks, by rank and in the order of the contract's."""

    contract: Contract
    ranks: RankMap
    found: Sequence[Sequence[Tensor]]

    def misshapen(self) -> str | None:
        """How the masks differ in number or shape from what the contract promises; else None."""
        for rank, masks in enumerate(self.found):
            promised = {name: self.contract.masks[name] for name in self._names(rank)}
            if len(masks) != len(promised):
                names = ", ".join(promised) or "none"
                return f"rank {rank} applies {len(masks)} dropouts; promised are {names}"
            for mask, (name, spec) in zip(masks, promised.items(), strict=True):
                wanted = self._cut(torch.empty(spec.shape, device="meta"), spec.placements, rank)
                if mask.shape != wanted.shape:
                    return (
                        f"rank {rank} applies the dropout {name} to {list(mask.shape)}; its part is"
                        f" {list(wanted.shape)}"
                    )
        return None

    def divergences(self) -> list[Divergence]:
        """Copies that drop different elements, parts that drop the same, wrong keep rates; and
        dropouts that repeat another's mask."""
        found = [
            each
            for name, spec in self.contract.masks.items()
            for members in self.ranks.replicas.values()
            for each in self._of(name, spec, [rank for rank in members if self._is_at(rank, spec)])
        ]
        return found or self._repeated()

    def full(self, replica: str) -> dict[str, Tensor]:
        """The masks of a replica as full tensors: the union of what its ranks drew."""
        found = {}
        for name, spec in self.contract.masks.items():
            members = [r for r in self.ranks.replicas[replica] if self._is_at(r, spec)]
            found[name] = assemble(
                spec.shape,
                {rank: self._by_name(rank)[name] for rank in members},
                spec.placements,
                self._sizes,
                {rank: self._coordinates[rank] for rank in members},
            )
        return found

    @cached_property
    def _sizes(self) -> Mapping[str, int]:
        return sizes_of(self.ranks)

    @cached_property
    def _coordinates(self) -> list[Mapping[str, int]]:
        """Of every rank on these, the first level of cp the innermost."""
        found: list[Mapping[str, int]] = []
        for each in self.ranks.coordinates:
            left, levels = each.get("cp", 0), {}
            for i, size in enumerate(self.ranks.layout.hierarchical_cp or ()):
                left, levels[f"hcp_{i}"] = divmod(left, size)
            found.append({**each, **levels})
        return found

    def _alike(self, spec: Mask, members: Sequence[int]) -> list[tuple[int, ...]]:
        """The sets of ranks that hold copies."""
        split = [axis for axis, placement in spec.placements.items() if isinstance(placement, Cut)]
        found: dict[tuple[int, ...], tuple[int, ...]] = {}
        for rank in members:
            key = tuple(self._coordinates[rank][axis] for axis in split)
            found[key] = (*found.get(key, ()), rank)
        return list(found.values())

    def _by_name(self, rank: int) -> dict[str, Tensor]:
        """The masks of a rank, where none is misshapen."""
        return dict(zip(self._names(rank), self.found[rank], strict=True))

    def _names(self, rank: int) -> list[str]:
        """The dropouts that a rank applies."""
        return [name for name, spec in self.contract.masks.items() if self._is_at(rank, spec)]

    def _is_at(self, rank: int, spec: Mask) -> bool:
        return all(self.ranks.coordinates[rank][axis] == at for axis, at in spec.at.items())

    def _of(self, name: str, spec: Mask, members: Sequence[int]) -> list[Divergence]:
        together = self._alike(spec, members)
        for ranks in together:
            first = self._by_name(ranks[0])[name]
            for rank in ranks[1:]:
                if not torch.equal(self._by_name(rank)[name], first):
                    text = f"drops other elements than on rank {ranks[0]}, which holds a copy"
                    return [self._divergence(name, rank, text)]
        parts = [(ranks[0], self._by_name(ranks[0])[name]) for ranks in together]
        for i, (rank, mask) in enumerate(parts):
            for other, theirs in parts[:i]:
                apart = self._apart(rank, other, spec)
                if apart and mask.numel() >= enough(spec.p) and torch.equal(mask, theirs):
                    text = f"drops the same elements as on rank {other}, which holds another part"
                    return [self._divergence(name, rank, text)]
        # Of parts that may be alike one counts: their numbers may be the same.
        drawn = {self._apart_at(rank, spec): mask for rank, mask in reversed(parts)}
        kept = sum(int(mask.sum()) for mask in drawn.values())
        count = sum(mask.numel() for mask in drawn.values())
        if _surprise(kept, count, 1 - spec.p) > _SURPRISE:
            text = f"keeps {kept} of {count} elements; dropout is {spec.p}"
            return [self._divergence(name, parts[0][0], text)]
        return []

    def _repeated(self) -> list[Divergence]:
        """Dropouts that drop the same elements as another one of their replica, which may be on
        another rank, of another stage for one."""
        found = []
        for members in self.ranks.replicas.values():
            seen: dict[tuple[float, tuple[int, ...], bytes], tuple[int, str]] = {}
            for rank in members:
                for name, mask in self._by_name(rank).items():
                    p = self.contract.masks[name].p
                    if mask.numel() < enough(p):
                        continue
                    bits = mask.contiguous().numpy().tobytes()
                    place, other = seen.setdefault((p, tuple(mask.shape), bits), (rank, name))
                    if other != name:
                        where = "before it" if place == rank else f"on rank {place}"
                        text = f"drops the same elements as the dropout {other} {where}"
                        found.append(self._divergence(name, rank, text))
        return found

    def _apart(self, rank: int, other: int, spec: Mask) -> bool:
        """Whether two ranks have parts that may not be dropped alike."""
        return self._apart_at(rank, spec) != self._apart_at(other, spec)

    def _apart_at(self, rank: int, spec: Mask) -> tuple[int, ...]:
        """Where a rank is on the axes whose parts may not be dropped alike."""
        return tuple(
            self._coordinates[rank][axis] for axis in spec.placements if axis not in spec.alike
        )

    def _divergence(self, name: str, rank: int, text: str) -> Divergence:
        sizes, coordinates = self.ranks.sizes, self.ranks.coordinates[rank]
        return Divergence(
            tensor=f"mask {name}",
            kind="masks",
            rank=rank,
            coordinates={a: i for a, i in coordinates.items() if sizes[a] > 1},
            ranks=(rank,),
            detail=text,
        )

    def _cut(self, full: Tensor, placements: Placements, rank: int) -> Tensor:
        split = {a: p for a, p in placements.items() if isinstance(p, Cut)}
        return shard(full, split, self._sizes, self._coordinates[rank])


def sizes_of(ranks: RankMap) -> Mapping[str, int]:
    """The sizes of what a mask may be split over: every axis, and cp's levels, hcp_0 and on."""
    levels = ranks.layout.hierarchical_cp or ()
    return {**ranks.sizes, **{f"hcp_{i}": size for i, size in enumerate(levels)}}


def _surprise(kept: int, count: int, rate: float) -> float:
    """Minus the logarithm of an upper bound on the probability that of `count` elements, each kept
    with probability `rate`, as many are kept or more (or fewer, below the rate): Chernoff's bound,
    `count` times the divergence of the two rates."""
    found = ((kept, rate), (count - kept, 1 - rate))
    return sum(n * log(n / (count * share)) for n, share in found if n)


def enough(p: float) -> int:
    """How many elements two masks have that do not agree by chance."""
    return ceil(_COINCIDENCE_BITS / -log2(p * p + (1 - p) * (1 - p)))
