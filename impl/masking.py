"""Which keys a query may attend to, and how their distance biases its scores.

Both are functions of positions, given as integer tensors, so that a rank that holds some part of a
sequence, in whatever order, asks for the pairs of its own queries and keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from impl.partition import part_of


def last_positions(queries: int, *, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The positions of queries [queries] and keys [keys] where the queries are the last ones.

    Queries that outnumber the keys begin before position 0.
    """
    positions = torch.arange(keys - queries, keys, device=device)
    return positions, torch.arange(keys, device=device)


def allowed_pairs(
    queries: Tensor, *, keys: Tensor, causal: bool, window: int | None
) -> Tensor | None:
    """Bool [queries, keys], True where the query may attend to the key; None where all may.

    `causal` allows keys up to the query's own position, `window` those less than that far from it.
    """
    if not causal and window is None:
        return None
    distance = queries[:, None] - keys[None, :]
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return allowed if window is None else allowed & (distance.abs() < window)


def alibi_slopes(heads: int, *, group: ProcessGroup) -> Tensor:
    """The slopes of this rank's heads, float64 [heads / ranks]: a head's slope depends on its index
    among the heads of all ranks.

    2**(-8 i / heads) for i from 1 where `heads` is a power of two; else those of the next lower
    power, and then every second one of the next higher. Press et al., arXiv:2108.12409, and their
    published code. ValueError where the heads do not divide.
    """
    part = part_of(heads, group=group, name="heads")
    lower = 2 ** math.floor(math.log2(heads))
    slopes = _geometric(lower) + _geometric(2 * lower)[::2]
    return torch.tensor(slopes[part.start : part.stop], dtype=torch.float64)


def _geometric(heads: int) -> list[float]:
    return [2.0 ** (-8.0 * i / heads) for i in range(1, heads + 1)]


def alibi_bias(slopes: Tensor, *, queries: Tensor, keys: Tensor) -> Tensor:
    """-slope |distance|, [heads, queries, keys], in the dtype of `slopes`."""
    distance = (queries[:, None] - keys[None, :]).abs()
    return -slopes[:, None, None] * distance
