"""Bringing tokens to the ranks of their experts, and what the experts made of them back.

Experts are split over `ep`, each rank having a run of them, and every expert over `etp`. All ranks
of a block of ep * etp hold different tokens, equally many, and every one of an expert's ranks needs
all tokens that go to it. What comes back from them are summands over etp.

| dispatcher | forward, dispatch | forward, combine | worth it |
|---|---|---|---|
| all-gather | all-gather of all tokens and weights over ep * etp | reduce-scatter | top_k near ep |
| all-to-all | all-to-all over ep, then gather over etp | the way back, summed | top_k below ep |

Backward of each is the other's forward. With the all-to-all the weights stay at home. Both give
the same sums of the same terms. GShard, arXiv:2006.16668; the names are Megatron's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from impl.collectives import all_gather, all_to_all_unequal
from impl.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from impl.moe.permutation import by_expert
from impl.partition import part_of


@dataclass(frozen=True)
class Dispatched:
    """Tokens at the ranks of their experts: `tokens` [pairs, hidden] sorted by local expert, of
    which `counts` has the number for each. `combine`, given the experts' outputs for these (this
    rank's summands over etp) and the probabilities [tokens, experts] at home, gives [tokens,
    hidden] at home: sums weighted by probabilities, in the wider dtype of the two."""

    tokens: Tensor
    counts: list[int]
    combine: Callable[[Tensor, Tensor], Tensor]


class Dispatcher(Protocol):
    """One of the ways, bound to the groups of a block."""

    def __call__(self, tokens: Tensor, chosen: Tensor) -> Dispatched:
        """Dispatch `tokens` [tokens, hidden] to the experts that `chosen` [tokens, experts] says.
        Collective over the block. ValueError unless the experts divide by ep."""
        ...


@dataclass(frozen=True, kw_only=True)
class AllGatherDispatcher:
    """Every rank sees all tokens of the block and picks those of its experts."""

    top_k: int
    ep_group: ProcessGroup
    block_group: ProcessGroup

    def __call__(self, tokens: Tensor, chosen: Tensor) -> Dispatched:
        """See `Dispatcher`. Backward: reduce-scatter of the tokens' gradients."""
        mine = part_of(chosen.shape[1], group=self.ep_group, name="num_experts")
        # Not every backend moves bools.
        everyone = all_gather(chosen.to(torch.uint8), dim=0, group=self.block_group).bool()
        local = everyone[:, mine.start : mine.stop]
        permutation = by_expert(local, width=min(self.top_k, len(mine)))
        gathered = gather_from_sequence_parallel_region(tokens, group=self.block_group)

        def combine(outputs: Tensor, probabilities: Tensor) -> Tensor:
            weights = gather_from_sequence_parallel_region(probabilities, group=self.block_group)
            weights = weights[:, mine.start : mine.stop].t()[local.t()]
            summands = permutation.gather(outputs * weights.unsqueeze(-1))
            return reduce_scatter_to_sequence_parallel_region(summands, group=self.block_group)

        return Dispatched(permutation.spread(gathered), local.sum(0).tolist(), combine)


@dataclass(frozen=True, kw_only=True)
class AllToAllDispatcher:
    """A copy of a token travels to each rank that has an expert of its choice."""

    top_k: int
    ep_group: ProcessGroup
    etp_group: ProcessGroup

    def __call__(self, tokens: Tensor, chosen: Tensor) -> Dispatched:
        """See `Dispatcher`. Backward: the exchanges in reverse."""
        mine = part_of(chosen.shape[1], group=self.ep_group, name="num_experts")
        permutation = by_expert(chosen, width=self.top_k)
        counts = chosen.sum(0)
        to_ep = counts.unflatten(0, (-1, len(mine))).sum(1).tolist()
        of_ep = all_gather(counts.unsqueeze(0), dim=0, group=self.ep_group)[
            :, mine.start : mine.stop
        ]
        # [etp, ep, local experts]: how many come from where, for which expert.
        table = all_gather(of_ep.unsqueeze(0), dim=0, group=self.etp_group)
        from_ep, from_etp = of_ep.sum(1).tolist(), table.sum((1, 2)).tolist()

        received = _exchange(permutation.spread(tokens), to_ep, from_ep, self.ep_group)
        arrived = _gather_unequal(received, from_etp, self.etp_group)
        order = _expert_order(table)

        def combine(outputs: Tensor, probabilities: Tensor) -> Tensor:
            as_arrived = outputs.index_select(0, order.argsort())
            summed = _sum_scatter_unequal(as_arrived, from_etp, self.etp_group)
            home = _exchange(summed, from_ep, to_ep, self.ep_group)
            weights = probabilities.t()[chosen.t()]
            return permutation.gather(home * weights.unsqueeze(-1))

        sorted_ = arrived.index_select(0, order)
        return Dispatched(sorted_, table.sum((0, 1)).tolist(), combine)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], group: ProcessGroup
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return all_to_all_unequal(x, send=send, receive=receive, group=group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        back = all_to_all_unequal(gradient, send=ctx.receive, receive=ctx.send, group=ctx.group)
        return back, None, None, None


def _exchange(x: Tensor, send: list[int], receive: list[int], group: ProcessGroup) -> Tensor:
    """Rows of `x` in runs to each rank, for runs of each; the gradient takes the way back."""
    return _Exchange.apply(x, send, receive, group)


def _gather_unequal(x: Tensor, lengths: Sequence[int], group: ProcessGroup) -> Tensor:
    """All rows of all ranks, of which rank i has `lengths[i]`; the gradient, Partial, is summed
    and scattered. An all-to-all of copies, as all-gathers want equal parts."""
    size = dist.get_world_size(group)
    return _exchange(x.repeat(size, 1), [x.shape[0]] * size, list(lengths), group)


def _sum_scatter_unequal(x: Tensor, lengths: Sequence[int], group: ProcessGroup) -> Tensor:
    """The conjugate of `_gather_unequal`: sums over the group, each rank getting its rows."""
    size, own = dist.get_world_size(group), lengths[dist.get_rank(group)]
    return _exchange(x, list(lengths), [own] * size, group).unflatten(0, (size, own)).sum(0)


def _expert_order(table: Tensor) -> Tensor:
    """The rows of chunks [etp, ep, local experts] of these lengths, one after another, in the order
    of their experts."""
    sources, experts = table.shape[0] * table.shape[1], table.shape[2]
    expert = torch.arange(experts, device=table.device).repeat(sources)
    return expert.repeat_interleave(table.flatten()).argsort(stable=True)
