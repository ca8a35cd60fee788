"""What is left to do to gradients after backward."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from impl.collectives import all_reduce


def finish_sequence_parallel_gradients(
    parameters: Iterable[Parameter], *, group: ProcessGroup
) -> None:
    """Make the gradients of replicated parameters complete under sequence parallelism.

    A parameter marked `sequence_parallel` was applied to this rank's tokens only, so its gradient
    is Partial over the tensor-parallel `group` and becomes Replicate, in place. Collective where
    there is such a gradient: all ranks give the same parameters in the same order. One all-reduce
    for each dtype. Call it once after the last backward of a step: a second call would sum sums.
    """
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter in parameters:
        if getattr(parameter, "sequence_parallel", False) and parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        total = all_reduce(flat, group=group)
        for gradient, part in zip(
            gradients, total.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))
