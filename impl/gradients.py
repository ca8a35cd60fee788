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
    """Make the gradients of replicated parameters complete under tensor parallelism.

    A parameter marked `sequence_parallel` was applied to this rank's tokens only, or, a norm of
    queries or keys, to its heads only, with sequence parallelism or without. So its gradient is
    Partial over the tensor-parallel `group` and becomes Replicate, in place. Collective where
    there is such a gradient: all ranks give the same parameters in the same order. One all-reduce
    for each dtype. Call it once after the last backward of a step: a second call would sum sums.
    """
    partial = [
        parameter for parameter in parameters if getattr(parameter, "sequence_parallel", False)
    ]
    sum_gradients(partial, group=group)


def sum_gradients(parameters: Iterable[Parameter], *, group: ProcessGroup) -> None:
    """Sum the gradients of parameters over a group of ranks that hold copies of them, in place.

    Each rank's gradient is of its own part of the data: its chunks of the sequence over `cp`, also
    its batches over `dp_cp`. Collective where there is a gradient: all ranks give the same
    parameters in the same order. One all-reduce for each dtype. Call it once a step.
    """
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        total = all_reduce(flat, group=group)
        for gradient, part in zip(
            gradients, total.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))
