"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """p <- (1 - lr * decay) p - lr * m' / (sqrt(v') + eps), with m' and v' unbiased.

    m and v are running means of gradients and their squares. Loshchilov and Hutter,
    arXiv:1711.05101, algorithm 2. A constant factor of all gradients all but cancels.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def state(self, values: Tensor) -> dict[str, Tensor]:
        """The state before the first update, by name."""
        return {"exp_avg": torch.zeros_like(values), "exp_avg_sq": torch.zeros_like(values)}

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
        """Update `values` and `state` in place, all of one dtype; `step` counts from 1."""
        mean = state["exp_avg"]
        square = state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - self.beta1)
        square.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        unbiased = (square / (1 - self.beta2**step)).sqrt_().add_(self.eps)
        values.mul_(1 - lr * weight_decay)
        values.addcdiv_(mean, unbiased, value=-lr / (1 - self.beta1**step))
