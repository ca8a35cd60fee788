"""Layer and RMS normalisation of the last dimension, with the same weight on every rank.

    y = (x - mean) / sqrt(variance + eps) * weight + bias            LayerNorm, arXiv:1607.06450
    y = x / sqrt(mean of squares + eps) * weight                     RMSNorm, arXiv:1910.07467

A rank normalises what it has, whole rows of features, and communicates nothing. But where it has a
part of the rows only, the gradient of a weight is a sum over the ranks that have the others:

- under sequence parallelism and context parallelism, tokens;
- of queries and keys that are normalised head by head, the heads of other tensor-parallel ranks,
  with sequence parallelism and without.

For tensor parallelism the parameters are marked; `impl.gradients` completes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Module
from torch.nn.init import ones_, zeros_

from impl.parameters import replicated_parameter


class _Normalise(torch.autograd.Function):
    """Keeps x as it came in and one or two numbers a row; what is normalised is computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        centred: bool,
        zero_centered: bool,
    ) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = wide.mean(-1, keepdim=True) if centred else None
        wide = wide if mean is None else wide - mean
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.zero_centered, ctx.bias_dtype = zero_centered, None if bias is None else bias.dtype
        ctx.save_for_backward(x, mean, scale, weight)
        y = wide * scale * _factor(weight, wide.dtype, zero_centered)
        return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale, weight = ctx.saved_tensors
        wide, given = x.to(scale.dtype), gradient.to(scale.dtype)
        normal = (wide if mean is None else wide - mean) * scale
        of_weight = (given * normal).flatten(0, -2).sum(0).to(weight.dtype)
        of_bias = None
        if ctx.bias_dtype is not None:
            of_bias = given.flatten(0, -2).sum(0).to(ctx.bias_dtype)
        of_normal = given * _factor(weight, scale.dtype, ctx.zero_centered)
        of_x = of_normal - normal * (of_normal * normal).mean(-1, keepdim=True)
        if mean is not None:
            of_x = of_x - of_normal.mean(-1, keepdim=True)
        return (of_x * scale).to(x.dtype), of_weight, of_bias, None, None, None


def _factor(weight: Tensor, dtype: torch.dtype, zero_centered: bool) -> Tensor:
    return weight.to(dtype) + 1.0 if zero_centered else weight.to(dtype)


class _Norm(Module):
    centred: bool

    def __init__(
        self,
        features: int,
        *,
        bias: bool,
        eps: float = 1e-5,
        zero_centered: bool = False,
        sequence_parallel: bool = False,
        sharded_heads: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.features, self.eps, self.zero_centered = features, eps, zero_centered
        common: dict[str, Any] = {
            "sequence_parallel": sequence_parallel or sharded_heads,
            "dtype": dtype,
            "device": device,
        }
        init = zeros_ if zero_centered else ones_
        self.weight = replicated_parameter(features, init=init, **common)
        self.bias = replicated_parameter(features, init=zeros_, **common) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`x` normalised."""
        if x.shape[-1] != self.features:
            raise ValueError(
                f"x: {list(x.shape)} is not [..., {self.features}], the features of this norm"
            )
        return _Normalise.apply(
            x, self.weight, self.bias, self.eps, self.centred, self.zero_centered
        )


class LayerNorm(_Norm):
    """(x - mean) / sqrt(variance + eps) * weight + bias, over the last dimension, in x's dtype.

    `x` [..., features] and its gradient may lie in any way that leaves rows whole. `weight` and
    `bias` [features] are Replicate. Their gradients are of this rank's rows: with
    `sequence_parallel` (x is Shard(0) over tp), or with `sharded_heads` (x is [sequence, batch,
    heads, features], its heads split over tp), they are Partial over tp until
    `impl.gradients.finish_sequence_parallel_gradients`.

    Statistics and products are in float32, of float64 in float64. `zero_centered`: the factor is 1
    + weight, so that weight decay draws it to 1 (Megatron-LM's layernorm_1p). No collectives.
    """

    centred = True

    def __init__(self, features: int, *, bias: bool = True, **arguments: Any) -> None:
        super().__init__(features, bias=bias, **arguments)


class RMSNorm(_Norm):
    """x / sqrt(mean of squares + eps) * weight, over the last dimension; else as `LayerNorm`."""

    centred = False

    def __init__(self, features: int, **arguments: Any) -> None:
        super().__init__(features, bias=False, **arguments)


NORMS: Mapping[str, Callable[..., LayerNorm | RMSNorm]] = {"layer": LayerNorm, "rms": RMSNorm}
