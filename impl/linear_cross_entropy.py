"""The output linear and the cross entropy of its logits in one, a part of the sequence at a time.

Logits [sequence, batch, vocabulary] are the largest tensor of a training step. Here only those of
`chunk` rows of the sequence are ever there: forward makes them, takes from each token's the loss
and two numbers, and throws them away; backward makes them again, and of their gradient at once what
it adds to the gradients of the hidden states and of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn.functional import linear

from impl.collectives import all_gather, all_reduce, reduce_scatter
from impl.cross_entropy import Classes, classes_of, slope_of, token_losses


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps the hidden states as they came in, their targets, and two numbers a token."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        classes: Classes,
        group: ProcessGroup,
        chunk: int,
        sequence_parallel: bool,
    ) -> Tensor:
        full = all_gather(hidden, dim=0, group=group) if sequence_parallel else hidden
        found = [
            token_losses(linear(full[rows], weight), targets[rows], classes, group)
            for rows in _chunks(full, chunk)
        ]
        loss, maximum, total = (torch.cat(each) for each in zip(*found, strict=True))
        ctx.classes, ctx.group, ctx.chunk = classes, group, chunk
        ctx.sequence_parallel = sequence_parallel
        ctx.save_for_backward(hidden, weight, targets, maximum, total)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, maximum, total = ctx.saved_tensors
        group, parallel = ctx.group, ctx.sequence_parallel
        full = all_gather(hidden, dim=0, group=group) if parallel else hidden
        of_hidden = torch.empty_like(full, memory_format=torch.contiguous_format)
        wide = torch.promote_types(weight.dtype, torch.float32)
        of_weight = torch.zeros_like(weight, dtype=wide)
        for rows in _chunks(full, ctx.chunk):
            slope = slope_of(
                linear(full[rows], weight),
                targets[rows],
                gradient[rows],
                maximum=maximum[rows],
                total=total[rows],
                classes=ctx.classes,
            )
            # Each rank has the part of its own classes: Partial.
            of_hidden[rows] = slope @ weight
            of_weight += slope.flatten(0, -2).t() @ full[rows].flatten(0, -2)
        if parallel:
            of_hidden = reduce_scatter(of_hidden, dim=0, group=group)
        else:
            of_hidden = all_reduce(of_hidden, group=group)
        return of_hidden, of_weight.to(weight.dtype), None, None, None, None, None


def _chunks(full: Tensor, chunk: int) -> Iterator[slice]:
    """Rows of the sequence, `chunk` at a time, at the end perhaps fewer."""
    for start in range(0, full.shape[0], chunk):
        yield slice(start, start + chunk)


def linear_cross_entropy(
    hidden: Tensor,
    *,
    weight: Tensor,
    targets: Tensor,
    group: ProcessGroup,
    chunk: int,
    loss_mask: Tensor | None = None,
    label_smoothing: float,
    real_vocabulary: int | None = None,
    z_loss: float,
    ignore_index: int = -100,
    sequence_parallel: bool,
) -> Tensor:
    """`vocab_parallel_cross_entropy` of hidden weight^T, its logits for `chunk` rows at a time.

    `hidden` [sequence, batch, hidden] and its gradient, complete, are Replicate, or Shard(0) with
    `sequence_parallel`; `weight` [vocabulary, hidden] is Shard(0). `targets` [sequence, batch], the
    loss, and `loss_mask`, which multiplies it, are of the whole sequence, Replicate. Dtypes,
    options and errors are those of `vocab_parallel_cross_entropy`; the gradient of the weight is
    summed over chunks in float32.

    Forward: for each chunk the two all-reduces of a cross entropy (sequence_parallel: an all-gather
    of hidden before). Backward: an all-reduce of the gradient of hidden (sequence_parallel: an
    all-gather of hidden, a reduce-scatter). Raises ValueError also for a chunk below 1 and shapes
    that do not fit.
    """
    if chunk < 1:
        raise ValueError(f"chunk: {chunk} rows of the sequence are too few; give at least 1")
    length = hidden.shape[0] * (dist.get_world_size(group) if sequence_parallel else 1)
    for name, given in {"targets": targets, "loss_mask": loss_mask}.items():
        if given is not None and given.shape != (length, *hidden.shape[1:-1]):
            raise ValueError(
                f"{name}: {list(given.shape)} is not {[length, *hidden.shape[1:-1]]}, the tokens of"
                " hidden on all ranks of the group"
            )
    classes = classes_of(
        padded=weight.shape[0] * dist.get_world_size(group),
        real=real_vocabulary,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        ignore_index=ignore_index,
        group=group,
    )
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden, weight, targets, classes, group, chunk, sequence_parallel
    )
    return loss if loss_mask is None else loss * loss_mask
