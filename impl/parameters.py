"""Parameters that know how they lie on the ranks, by the attributes that Megatron gives them.

`tensor_model_parallel` says that a parameter is sharded over the tensor-parallel group, along
`partition_dim` in `partition_stride` blocks. `sequence_parallel` says of a replicated one that each
rank computes its gradient from a part of the tokens or heads, so that the gradients have to be
summed: see `impl.gradients`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from impl.partition import divide, split

Initialiser = Callable[[Tensor], object]
"""Fills a full parameter in place, with the same values on every rank of the group."""


def defer(values: Tensor) -> None:
    """An initialiser that leaves the values, NaN, to `impl.initialise`. With it no rank makes the
    full parameter."""
    values.fill_(torch.nan)


def sharded_parameter(
    *shape: int,
    dim: int,
    name: str,
    group: ProcessGroup,
    init: Initialiser,
    stride: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Parameter:
    """This rank's part of a parameter of full `shape`: of each of `stride` equal blocks of `dim`,
    one after the other. `name` is what the size of `dim` is called.

    The values do not depend on the size of the group, because `init` fills the full parameter. It
    is on every rank for a moment, unless `init` is `defer`. ValueError where the dimension, or a
    block of it, does not divide.
    """
    block = shape[dim] // stride
    length = divide(block, group=group, name=name) * stride
    if block * stride != shape[dim]:
        raise ValueError(f"stride: {name} {shape[dim]} is not {stride} equal blocks")
    if init is defer:
        lengths = list(shape)
        lengths[dim] = length
        part = torch.empty(lengths, dtype=dtype, device=device)
        defer(part)
    else:
        full = torch.empty(shape, dtype=dtype, device=device)
        with torch.no_grad():
            init(full)
            blocks = full.chunk(stride, dim)
            part = torch.cat([split(each, dim=dim, group=group) for each in blocks], dim)
    return _marked(part, tensor_model_parallel=True, partition_dim=dim, partition_stride=stride)


def replicated_parameter(
    *shape: int,
    init: Initialiser,
    sequence_parallel: bool,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Parameter:
    """A parameter that every rank holds in full."""
    full = torch.empty(shape, dtype=dtype, device=device)
    with torch.no_grad():
        init(full)
    return _marked(full, tensor_model_parallel=False, sequence_parallel=sequence_parallel)


def is_shard(parameter: Parameter) -> bool:
    """Whether it is split over a tensor-parallel group."""
    return getattr(parameter, "tensor_model_parallel", False)


def of_expert(parameter: Parameter) -> bool:
    """Whether it is an expert's, whose copies are on the ranks of `edp`."""
    return not getattr(parameter, "allreduce", True)


def _marked(values: Tensor, **attributes: bool | int) -> Parameter:
    parameter = Parameter(values)
    for name, value in attributes.items():
        setattr(parameter, name, value)
    return parameter
