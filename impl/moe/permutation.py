"""Copies of tokens in the order of their experts, and back: the local half of every dispatch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Permutation:
    """The pairs of a token and an expert that it goes to, sorted by expert and then by token.

    `tokens` [pairs] is each pair's token. `places` [pairs] gives each a place of its own in a
    buffer with `width` places a token, so that a token's pairs are summed in one order, and no two
    writes meet: the same bits every time, on a GPU too.
    """

    tokens: Tensor
    places: Tensor
    num_tokens: int
    width: int

    def spread(self, x: Tensor) -> Tensor:
        """[tokens, hidden] to [pairs, hidden]; the gradient of a token is the sum of its pairs'."""
        return _Spread.apply(x, self)

    def gather(self, pairs: Tensor) -> Tensor:
        """[pairs, hidden] to [tokens, hidden], the sum of each token's pairs; zero without any."""
        return _Gather.apply(pairs, self)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return x.index_select(0, permutation.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.permutation), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return _summed(pairs, permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(0, ctx.permutation.tokens), None


def by_expert(chosen: Tensor, *, width: int) -> Permutation:
    """The permutation of `chosen` [tokens, experts], bool, in which no token has more than `width`
    experts."""
    pairs = chosen.t().nonzero()
    experts, tokens = pairs[:, 0], pairs[:, 1]
    slots = chosen.cumsum(1)[tokens, experts] - 1
    return Permutation(tokens, tokens * width + slots, chosen.shape[0], width)


def _summed(pairs: Tensor, permutation: Permutation) -> Tensor:
    rows = permutation.num_tokens * permutation.width
    buffer = pairs.new_zeros((rows, *pairs.shape[1:]))
    buffer.index_copy_(0, permutation.places, pairs)
    return buffer.unflatten(0, (permutation.num_tokens, permutation.width)).sum(1)
