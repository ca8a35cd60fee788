"""Placements read from the attributes that Megatron and its forks set on a parameter."""

from __future__ import annotations

from torch.nn import Parameter

from verify.placement import Placements, Shard


def placements_of(parameter: Parameter, *, axis: str = "tp") -> Placements:
    """The placement of `parameter` over `axis`.

    `tensor_model_parallel` says that it is sharded, along `partition_dim`, in `partition_stride`
    blocks. A parameter without the attributes is replicated.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        return {}
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    return {axis: Shard(dim, stride)}
