"""What is left to do to gradients after backward."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from impl.collectives import all_reduce
from impl.data_parallel import DataParallel, of_tied_embedding


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
    for gradient in map(gradient_of, parameters):
        if gradient is not None:
            by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        total = all_reduce(flat, group=group)
        for gradient, part in zip(
            gradients, total.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))


def gradient_of(parameter: Parameter) -> torch.Tensor | None:
    """The gradient that the optimizer will see: `main_grad`, where data parallelism made one."""
    found: torch.Tensor | None = getattr(parameter, "main_grad", parameter.grad)
    return found


def finish_tied_gradients(parameters: Iterable[Parameter], *, group: ProcessGroup | None) -> None:
    """Sum the gradients of both copies of a tied embedding, on the first and on the last stage.

    The first has that of the look-up, the last that of the logits. A parameter is a copy if it is
    marked `shared_embedding`. `group` is `groups.embedding`, None on the stages between, which have
    none. Collective over it where there is a copy: one all-reduce. Once a step.
    """
    copies = [each for each in parameters if of_tied_embedding(each)]
    if copies and group is not None:
        sum_gradients(copies, group=group)


def finalise_gradients(
    data_parallel: DataParallel,
    *,
    tp_group: ProcessGroup,
    tokens: torch.Tensor,
    embedding_group: ProcessGroup | None = None,
) -> None:
    """Make the main gradients of a step those of the mean over all `tokens` that count.

    After the last backward of a step, each of a sum over this rank's tokens. Where no token counts
    on any rank, all gradients are zero already. Collective: data parallelism's reductions, then one
    all-reduce over tp of what is Partial there, and one of tied embeddings over their group. With a
    distributed optimizer only this rank's shards are final; they lie alike on all ranks of a tp
    group.
    """
    data_parallel.finish()
    finish_sequence_parallel_gradients(data_parallel.parameters, group=tp_group)
    finish_tied_gradients(data_parallel.parameters, group=embedding_group)
    data_parallel.scale(1.0 / tokens.clamp_min(1))
