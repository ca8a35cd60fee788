"""The cross entropy of logits whose vocabulary is split over a tensor-parallel group.

    loss = -(1 - a) log p[target] - a / (K - 1) * sum of log p[others],   p = softmax(logits)

With label smoothing a the target keeps 1 - a and the other K - 1 classes share a, as in
Megatron-LM's. A z-loss adds z (log sum of exp(logits))^2, which keeps that sum near 1 (PaLM,
arXiv:2204.02311, section 5).
All of p is never in one place. With the logits x of this rank, shifted by the largest of all, the
ranks exchange three numbers a token, the maximum, the target's x and the sum of exp(x), and with
smoothing the sum of x, which together give

    loss = log sum exp(x) - (1 - a - share) x[target] - share * sum x,   share = a / (K - 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from impl.collectives import all_reduce
from impl.partition import part_of


@dataclass(frozen=True, kw_only=True)
class Classes:
    """This rank's part of the vocabulary, and the weights of the classes in the loss.

    The first `real` of this rank's logits count, the rest are padding. A class weighs `share`, and
    the target `extra` more; `z_loss` multiplies the square of log sum exp.
    """

    part: range
    total: int
    real: int
    share: float
    extra: float
    z_loss: float
    ignore_index: int

    def masked(self, logits: Tensor) -> Tensor:
        """The logits in the dtype of the computation, those of padding minus infinity. A copy."""
        wide = logits.to(_compute_dtype(logits), copy=True)
        wide[..., self.real :] = -torch.inf
        return wide

    def local_targets(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The index of every target in this rank's part, 0 where it is not here; and which are."""
        here = (targets >= self.part.start) & (targets < self.part.stop)
        return (targets - self.part.start).where(here, 0).unsqueeze(-1), here

    def invalid(self, targets: Tensor) -> Tensor:
        """Which targets are no class."""
        return ((targets < 0) | (targets >= self.total)) & (targets != self.ignore_index)


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype is torch.float64 else torch.float32


def token_losses(
    logits: Tensor, targets: Tensor, classes: Classes, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of every target, and what `slope_of` needs: the maximum of its logits and the sum of
    exp(logit - maximum). All [...], Replicate. Two all-reduces. Autograd does not see it."""
    x = classes.masked(logits)
    maximum = all_reduce(x.amax(-1), op=dist.ReduceOp.MAX, group=group)
    x -= maximum.unsqueeze(-1)
    index, here = classes.local_targets(targets)
    of_target = x.gather(-1, index).squeeze(-1).where(here, 0.0)
    terms = [of_target, x.exp().sum(-1)]
    if classes.share:
        terms.append(x[..., : classes.real].sum(-1))
    of_target, total, *sums = all_reduce(torch.stack(terms), group=group)
    loss = total.log() - classes.extra * of_target
    for of_all in sums:
        loss -= classes.share * of_all
    if classes.z_loss:
        loss += classes.z_loss * (maximum + total.log()).square()
    loss = loss.masked_fill(targets == classes.ignore_index, 0.0)
    # A copy, because `total` is a view that would keep all the terms.
    return loss.masked_fill(classes.invalid(targets), torch.nan), maximum, total.clone()


def slope_of(
    logits: Tensor,
    targets: Tensor,
    gradient: Tensor,
    *,
    maximum: Tensor,
    total: Tensor,
    classes: Classes,
) -> Tensor:
    """The gradient of the logits, Shard(-1), of the losses' `gradient`, in the logits' dtype. No
    collectives."""
    x = classes.masked(logits)
    slope = x.sub_(maximum.unsqueeze(-1)).exp_().div_(total.unsqueeze(-1))  # p, so far
    if classes.z_loss:
        slope *= (1.0 + 2.0 * classes.z_loss * (maximum + total.log())).unsqueeze(-1)
    slope[..., : classes.real] -= classes.share
    index, here = classes.local_targets(targets)
    slope.scatter_add_(-1, index, -classes.extra * here.to(slope.dtype).unsqueeze(-1))
    slope *= gradient.masked_fill(targets == classes.ignore_index, 0.0).unsqueeze(-1)
    return slope.to(logits.dtype)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Keeps the logits as they came in and two numbers a token; p is computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, classes: Classes, group: ProcessGroup
    ) -> Tensor:
        loss, maximum, total = token_losses(logits, targets, classes, group)
        ctx.classes = classes
        ctx.save_for_backward(logits, targets, maximum, total)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, maximum, total = ctx.saved_tensors
        found = {"maximum": maximum, "total": total, "classes": ctx.classes}
        return slope_of(logits, targets, gradient, **found), None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor,
    *,
    targets: Tensor,
    group: ProcessGroup,
    label_smoothing: float = 0.0,
    real_vocabulary: int | None = None,
    z_loss: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """The loss of every target; no mean is taken.

    `logits` [..., vocabulary / tp] and their gradient are Shard(-1); `targets` [...], the loss and
    its gradient are Replicate. Computes in float32, float64 logits in float64, and the loss has
    that dtype. The gradient has the logits'.

    `real_vocabulary` says that classes from there on are padding: they count as logits of minus
    infinity, get no gradient and no share of the smoothing. A rank may have nothing but padding.
    Where the target is `ignore_index`, loss and gradient are zero; a target that is no class gives
    a loss of NaN. `z_loss` multiplies the square of the log of the sum of exp(logits).

    Forward: all-reduce of the maximum, then of the sums. Backward: none. Raises ValueError for
    targets of another shape, a real vocabulary that is not within the padded one, and a smoothing
    that is not in [0, 1) or has no second class to go to, and a z_loss below 0.
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets: {list(targets.shape)} do not fit logits {list(logits.shape)};"
            f" give {list(logits.shape[:-1])}"
        )
    classes = classes_of(
        padded=logits.shape[-1] * dist.get_world_size(group),
        real=real_vocabulary,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        ignore_index=ignore_index,
        group=group,
    )
    return _VocabParallelCrossEntropy.apply(logits, targets, classes, group)


def classes_of(
    *,
    padded: int,
    real: int | None,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    group: ProcessGroup,
) -> Classes:
    """This rank's part of a vocabulary of `padded` classes. ValueError as of
    `vocab_parallel_cross_entropy`."""
    total = padded if real is None else real
    if not 1 <= total <= padded:
        raise ValueError(
            f"real_vocabulary: {real} is not within the vocabulary; give 1 to {padded}"
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing: {label_smoothing} is not in [0, 1)")
    if label_smoothing and total == 1:
        raise ValueError(
            f"label_smoothing: {label_smoothing} needs a second class, the vocabulary has 1;"
            " set it to 0"
        )
    if z_loss < 0.0:
        raise ValueError(f"z_loss: {z_loss} is below 0; a weight of 0.0001 is usual")
    part = part_of(padded, group=group, name="vocabulary")
    share = label_smoothing / (total - 1) if label_smoothing else 0.0
    return Classes(
        part=part,
        total=total,
        real=min(max(total - part.start, 0), len(part)),
        share=share,
        extra=1.0 - label_smoothing - share,
        z_loss=z_loss,
        ignore_index=ignore_index,
    )
