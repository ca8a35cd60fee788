"""Placements read from the attributes that Megatron and its forks set on a parameter."""

from __future__ import annotations

from torch.nn import Parameter

from verify.errors import Mismatch
from verify.placement import Placements, Shard


def placements_of(parameter: Parameter, *, axis: str = "tp") -> Placements:
    """The placement of `parameter` over `axis`.

    `tensor_model_parallel` says that it is sharded, along `partition_dim`, in `partition_stride`
    blocks. A parameter without the attributes is replicated. Raises Mismatch for a dimension that
    it does not have; to Megatron, -1 is none.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        return {}
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    if not 0 <= dim < parameter.dim():
        raise Mismatch(
            f"partition_dim: {dim} is no dimension of a parameter of shape"
            f" {list(parameter.shape)}; give 0 to {parameter.dim() - 1}"
        )
    return {axis: Shard(dim, stride)}
