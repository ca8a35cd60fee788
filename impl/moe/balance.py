"""What keeps experts equally busy: auxiliary losses, and a bias that no gradient trains.

The losses are means over all tokens that the ranks of a group hold, whatever the layout: every rank
computes its own summand, so that losses and their gradients are complete once they are summed over
the group. Where gradients are averaged over ranks instead, `scale` has to undo the division.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from impl.collectives import all_reduce

LEVELS = ("sequence", "batch", "global")


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.of_loss = torch.full_like(loss, scale)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, ctx.of_loss, None


def attach_loss(x: Tensor, loss: Tensor, *, scale: float) -> Tensor:
    """`x` unchanged; whenever a gradient passes it, `loss` gets the gradient `scale`.

    So a loss in the middle of a model is trained without being handed to its end. `scale` is what
    the main loss is multiplied by before backward (a loss scale, one over the micro-batches).
    """
    return _Attach.apply(x, loss, scale)


def load_balancing_loss(
    scores: Tensor,
    counted: Tensor,
    *,
    top_k: int,
    level: str,
    microbatch_group: ProcessGroup,
    global_group: ProcessGroup,
) -> Tensor:
    """This rank's summand of the mean, over sets of tokens, of E * sum over experts of f * P.

    `scores` [sequence, batch, experts] sum to one over the experts, `counted`, bool of that shape,
    are the `top_k` experts of each token. Of a set, f is the part of all choices that an expert
    has, without gradient, and P its mean score. A set is one sequence, the micro-batch that the
    ranks of `microbatch_group` share, or (`global`) the tokens of all ranks of `global_group`.
    Forward: all-reduce of the counts. Backward: none.

    Fedus et al., arXiv:2101.03961, equations 4 to 6; by sequence DeepSeek-AI, arXiv:2412.19437,
    equations 17 to 20; global Qiu et al., arXiv:2501.11873.
    """
    microbatch_ranks = dist.get_world_size(microbatch_group)
    ranks = dist.get_world_size(global_group)
    sequence, batch, experts = scores.shape
    dims = (0,) if level == "sequence" else (0, 1)
    group = global_group if level == "global" else microbatch_group
    counts = all_reduce(counted.sum(dims), group=group)
    tokens = sequence * (1 if level == "sequence" else batch) * dist.get_world_size(group)
    sets = 1 if level == "global" else ranks // microbatch_ranks
    sets *= batch if level == "sequence" else 1
    total = (scores.sum(dims) * counts).sum()
    return total * (experts / (top_k * tokens * tokens * sets))


def router_z_loss(logits: Tensor, *, global_group: ProcessGroup) -> Tensor:
    """This rank's summand of the mean over all tokens of logsumexp(logits)^2; no communication.

    `logits` [sequence, batch, experts]. Zoph et al., arXiv:2202.08906, equation 5.
    """
    squares = logits.logsumexp(-1).square()
    return squares.sum() / (squares.numel() * dist.get_world_size(global_group))


class ExpertBias(torch.nn.Module):
    """A bias for each expert that only the choice of experts sees, and that chases equal loads.

    `bias` and `counts` [experts] are buffers: the bias is saved with the model, the counts of a
    step in progress are not. Wang et al., arXiv:2408.15664, algorithm 1.
    """

    bias: Tensor
    counts: Tensor

    def __init__(
        self,
        num_experts: int,
        *,
        group: ProcessGroup,
        rate: float = 1e-3,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.group, self.rate = group, rate
        self.register_buffer("bias", torch.zeros(num_experts, dtype=dtype, device=device))
        counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.register_buffer("counts", counts, persistent=False)

    def count(self, chosen: Tensor) -> None:
        """Add the tokens of each expert in `chosen` [..., experts], bool, to those of the step.

        Only in training and while gradients are recorded: a forward pass that is to be recomputed
        runs without, so that its tokens count once.
        """
        if self.training and torch.is_grad_enabled():
            self.counts.add_(chosen.flatten(0, -2).sum(0))

    def update(self) -> None:
        """After a step: raise the bias of experts below the mean load by `rate`, lower the others.

        The counts are summed over `group`, whose ranks hold different tokens. Collective. Written
        in place, because checkpoints keep the buffer itself.
        """
        counts = all_reduce(self.counts, group=self.group)
        # Compared as whole numbers, because a mean is none.
        behind = counts.sum() - counts * counts.numel()
        self.bias.add_(behind.sign().to(self.bias.dtype), alpha=self.rate)
        self.counts.zero_()
