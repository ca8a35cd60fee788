"""Rotary position embedding (Su et al., arXiv:2104.09864): queries and keys turned by position.

Of each head the first `dim` features are pairs, and pair i at position p is turned by the angle
p * base^(-2 i / dim), so that the product of a query and a key depends on their distance only. The
pairs are the two halves, feature i with i + dim / 2 (GPT-NeoX, Llama), or neighbours if
`interleaved` (the paper). The rest of the features, if any, stay as they are (partial rotary).

A rank turns what it has by the positions in the whole sequence, which it knows:
`impl.context_parallel.zigzag.positions` gives them for context parallelism and packed sequences.
Inside of attention a rank has all tokens of its tensor-parallel group, with sequence parallelism
too, and some heads, which are all turned alike. Nothing is communicated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """Turns tensors of given positions. `cos` and `sin` are [tokens, 1, 1, dim / 2]."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [tokens, batch, heads, features] turned; placed as `x`, and so is the gradient.

        Computes in float32 at least. Keeps nothing of x for backward. ValueError where the tokens
        are not those of the positions, or the features too few.
        """
        tokens, dim = self.cos.shape[0], 2 * self.cos.shape[-1]
        if x.dim() != 4 or x.shape[0] != tokens or x.shape[-1] < dim:
            raise ValueError(
                f"x: {list(x.shape)} is not [{tokens}, batch, heads, features], of {tokens}"
                f" positions and at least {dim} features to turn"
            )
        turned = x[..., :dim].to(self.cos.dtype)
        if self.interleaved:
            first, second = turned[..., ::2], turned[..., 1::2]
        else:
            first, second = turned.chunk(2, dim=-1)
        pair = first * self.cos - second * self.sin, second * self.cos + first * self.sin
        turned = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        return torch.cat((turned.to(x.dtype), x[..., dim:]), -1)


@dataclass(frozen=True, kw_only=True)
class RotaryEmbedding:
    """Rotations of the first `dim` features of a head. ValueError for a `dim` that is not even and
    positive, and a `base` that is not positive."""

    dim: int
    base: float = 10000.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"rotary_dim: {self.dim} features are not pairs; give an even number")
        if not self.base > 0:
            raise ValueError(f"base: {self.base} is not positive; 10000 is the usual base")

    def rotation(self, positions: Tensor, *, dtype: torch.dtype) -> Rotation:
        """The rotation of tokens at `positions`, int [tokens], for queries and keys of `dtype`.

        Angles are computed in float64: of a position in the thousands, a narrower dtype would lose
        the turns.
        """
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float64, device=positions.device)
        angles = positions.double()[:, None] * self.base ** (-exponents / self.dim)
        angles = angles[:, None, None, :]
        wide = torch.promote_types(dtype, torch.float32)
        return Rotation(angles.cos().to(wide), angles.sin().to(wide), self.interleaved)
