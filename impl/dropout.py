"""Dropout whose mask is alike on ranks that hold copies, and independent on ranks that hold parts.

The stream decides (see `impl.random`): where an activation is replicated, all ranks must draw the
same numbers; where it is split over tp (features in a tensor-parallel region, tokens under sequence
parallelism) or over cp, each draws its own. Nothing is communicated, forward or backward.
"""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor
from torch.nn import functional as F

from impl.random import Stream


def check_probability(p: float, *, name: str = "dropout, p") -> None:
    """Raise ValueError unless `p`, called `name`, is a probability below 1."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name}: {p} is not a probability from 0 to below 1")


def dropout(x: Tensor, *, p: float, stream: Stream = nullcontext, training: bool = True) -> Tensor:
    """Zeros with probability `p`, and x / (1 - p) else. Placed as `x`, and so is the gradient.

    `stream` is a context to draw in: that of `RandomTracker.stream(stream_of(...))` for the axes
    that x is split over, or none for the default stream, where x is replicated. Without `training`
    it is x, and no number is drawn. Raises ValueError for `p` outside [0, 1).
    """
    check_probability(p)
    if not (training and p):
        return x
    with stream():
        return F.dropout(x, p)


def bias_dropout_add(
    x: Tensor,
    *,
    bias: Tensor | None,
    residual: Tensor,
    p: float,
    stream: Stream = nullcontext,
    training: bool = True,
) -> Tensor:
    """residual + dropout(x + bias), in the dtype of `x`: what follows each half of a layer.

    `x` and `residual` [sequence, ..., features] are placed alike, and so are the result and all
    gradients. `bias` [features] is what a linear layer with `skip_bias_add` returns. Where the
    sequence is split, the gradient of a bias is Partial, of this rank's tokens. Raises ValueError
    for `p` outside [0, 1), and for a residual or a bias of another shape, which addition would
    broadcast.
    """
    if residual.shape != x.shape:
        raise ValueError(f"residual: {list(residual.shape)} is not the shape of x, {list(x.shape)}")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"bias: {list(bias.shape)} is not one for each of {x.shape[-1]} features")
    biased = x if bias is None else x + bias
    return residual.to(x.dtype) + dropout(biased, p=p, stream=stream, training=training)
