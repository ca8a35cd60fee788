"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SGD:
    """p <- p - lr * b, where b <- momentum * b + g + decay * p starts at zero; as torch's SGD."""

    momentum: float = 0.0

    def state(self, values: Tensor) -> dict[str, Tensor]:
        """The state before the first update, by name; none without momentum."""
        return {"momentum": torch.zeros_like(values)} if self.momentum else {}

    def update(
        self,
        values: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        *,
        step: int,
        lr: float,
        weight_decay: float,
    ) -> None:
        """Update `values` and `state` in place, all of one dtype."""
        change = gradient.add(values, alpha=weight_decay)
        if self.momentum:
            change = state["momentum"].mul_(self.momentum).add_(change)
        values.sub_(change, alpha=lr)
