"""The norm of all gradients, each parameter counted once wherever it lies, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from impl.collectives import all_reduce
from impl.data_parallel import Share
from impl.groups import Groups
from impl.parameters import is_shard, of_expert

_SMALL = 1e-6


def gradient_norm(
    shares: Sequence[Share], *, zero: Tensor, groups: Groups, distributed: bool, order: float
) -> Tensor:
    """The p-norm of the gradients of the whole model, of no dimension, the same on every rank.

    `order` is p, math.inf for the largest absolute value. A parameter that is replicated over tp,
    or an expert's over etp, counts on the first rank only, and a tied embedding on the first stage
    only (`shared` marks its copy). With `distributed` the `shares` of ranks that hold copies of a
    parameter are parts of it, which add up; else they are alike, and one counts. Collective over
    the whole world, in two or four all-reduces of one number, also of a rank that has no gradients:
    `zero` says in which dtype and on which device. ValueError for an order that is not positive.
    """
    if not order > 0:
        raise ValueError(f"order: {order} is no norm; give a positive number, or math.inf")
    total = zero
    for expert in (False, True):
        mine = [
            s.gradient for s in shares if of_expert(s.parameter) is expert and _counts(s, groups)
        ]
        part = _power(mine, order, zero)
        if distributed:
            part = _reduce(part, order, groups.edp if expert else groups.dp_cp)
        part = _reduce(part, order, groups.etp_ep_pp if expert else groups.tp_pp)
        total = torch.maximum(total, part) if math.isinf(order) else total + part
    return total if math.isinf(order) else total ** (1.0 / order)


def clip_gradients(gradients: Iterable[Tensor], *, norm: Tensor, max_norm: float) -> None:
    """Scale all gradients in place by max_norm / norm where that is below one: every rank its own,
    whether or not they counted for the norm. ValueError for a threshold that is not positive."""
    if not max_norm > 0:
        raise ValueError(f"max_norm: {max_norm} would clip everything away; give a positive number")
    factor = (max_norm / (norm + _SMALL)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)


def _counts(share: Share, groups: Groups) -> bool:
    if getattr(share.parameter, "shared", False):
        return False
    if is_shard(share.parameter):
        return True
    return groups.rank("etp" if of_expert(share.parameter) else "tp") == 0


def _power(gradients: Sequence[Tensor], order: float, zero: Tensor) -> Tensor:
    """This rank's summand: the sum of the absolute values to the power of p, or the largest."""
    norms = torch.stack([zero, *(torch.linalg.vector_norm(each, order) for each in gradients)])
    return norms.amax() if math.isinf(order) else (norms**order).sum()


def _reduce(part: Tensor, order: float, group: ProcessGroup) -> Tensor:
    op = dist.ReduceOp.MAX if math.isinf(order) else dist.ReduceOp.SUM
    return all_reduce(part.reshape(1), op=op, group=group).reshape(())
