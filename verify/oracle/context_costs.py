"""What context parallelism communicates and keeps on a rank, by the published formulas.

With n ranks, and for each of them q, k, v, o the elements of its tokens and its tensor-parallel
heads, and m their rows of scores:

| algorithm | forward | backward |
|---|---|---|
| all_gather | all-gather k, v | all-gather k, v; reduce-scatter n k, n v |
| ring | n - 1 times send k, v | n - 1 times send k, v; n times their gradients |
| ulysses | all-to-all q, k, v, o | the same |
| hierarchical | ulysses over the inner ranks, ring over the outer ones | |

Each keeps q, k, v, o, and two numbers for each of the m rows (a peak and a total; their lse alone
would do, less exactly), whatever n. An all-to-all of heads over more ranks than there are kv
heads repeats k and v, to one kv head for each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from verify.layout import Layout
from verify.oracle.contract import Step


@dataclass(frozen=True)
class Volume:
    """The sizes of an attention on one device."""

    sequence: int
    batch: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int


@dataclass(frozen=True)
class Costs:
    """Of one algorithm on a layout. The heads are shared out to `together` ranks, besides tp; 1
    for an algorithm that leaves them alone."""

    algorithm: str
    layout: Layout
    volume: Volume
    together: int

    @property
    def forward(self) -> tuple[Step, ...]:
        """What a rank communicates in forward."""
        return ALGORITHMS[self.algorithm](self)[0]

    @property
    def backward(self) -> tuple[Step, ...]:
        """What a rank communicates in backward."""
        return ALGORITHMS[self.algorithm](self)[1]

    @property
    def kept(self) -> int:
        """The elements that a rank keeps for backward."""
        return self.q + self.k + self.v + self.out + 2 * self._tokens * self._heads

    @property
    def q(self) -> int:
        """Elements of a rank's queries; `k`, `v` and `out` likewise."""
        return self._tokens * self._heads * self.volume.dim

    @property
    def k(self) -> int:
        """Of keys, repeated where that is needed."""
        return self._tokens * self._kv_heads * self.volume.dim

    @property
    def v(self) -> int:
        """Of values, repeated where that is needed."""
        return self._tokens * self._kv_heads * self.volume.value_dim

    @property
    def out(self) -> int:
        """Of outputs."""
        return self._tokens * self._heads * self.volume.value_dim

    @property
    def _tokens(self) -> int:
        return self.volume.sequence * self.volume.batch // self.layout.cp

    @property
    def _heads(self) -> int:
        return self.volume.heads // self.layout.tp

    @property
    def _kv_heads(self) -> int:
        return max(self.volume.kv_heads // self.layout.tp, self.together)


Steps = tuple[Step, ...]


def _all_gather(costs: Costs) -> tuple[Steps, Steps]:
    gathers = tuple(Step("all_gather", "cp", each) for each in (costs.k, costs.v))
    whole = (costs.layout.cp * each for each in (costs.k, costs.v))
    return gathers, (*gathers, *(Step("reduce_scatter", "cp", each) for each in whole))


def _ring(costs: Costs) -> tuple[Steps, Steps]:
    return _round(costs, "cp", costs.layout.cp)


def _ulysses(costs: Costs) -> tuple[Steps, Steps]:
    exchanges = _exchanges(costs, "cp")
    return exchanges, exchanges


def _hierarchical(costs: Costs) -> tuple[Steps, Steps]:
    if costs.layout.cp == 1:
        return (), ()
    exchanges = _exchanges(costs, "hcp_0")
    forward, backward = _round(costs, "hcp_1", costs.layout.cp // costs.together)
    return (*exchanges, *forward), (*exchanges, *backward)


def _exchanges(costs: Costs, kind: str) -> Steps:
    given = (costs.q, costs.k, costs.v, costs.out)
    return tuple(Step("all_to_all", kind, each) for each in given)


def _round(costs: Costs, kind: str, size: int) -> tuple[Steps, Steps]:
    sends = tuple(Step("send", kind, each) for each in (costs.k, costs.v))
    return sends * (size - 1), sends * (2 * size - 1)


ALGORITHMS: Mapping[str, Callable[[Costs], tuple[Steps, Steps]]] = {
    "all_gather": _all_gather,
    "ring": _ring,
    "ulysses": _ulysses,
    "hierarchical": _hierarchical,
}
