"""Loss scaling, so that small gradients do not vanish in float16 (arXiv:1710.03740, section 3.2).

The loss is multiplied before backward, gradients are divided before anything is made of them, and a
step whose gradients are not finite is skipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class LossScale(Protocol):
    """A factor of the loss, which may change from step to step."""

    value: float

    def update(self, *, overflow: bool) -> None:
        """After a step: whether its gradients were not finite on any rank."""
        ...


@dataclass(kw_only=True)
class StaticLossScale:
    """Always the same."""

    value: float

    def update(self, *, overflow: bool) -> None:
        """Nothing changes."""


@dataclass(kw_only=True)
class DynamicLossScale:
    """As large as it goes: doubles after `growth_interval` steps without overflow, and halves at
    the `hysteresis`-th overflow since it last grew and at each one after that, down to `minimum`.

    As Megatron-LM's DynamicGradScaler. ValueError for a minimum above the value, or intervals below
    one.
    """

    value: float = 2.0**32
    minimum: float = 1.0
    growth: float = 2.0
    backoff: float = 0.5
    growth_interval: int = 1000
    hysteresis: int = 2
    steps: int = 0
    overflows: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.minimum <= self.value:
            raise ValueError(
                f"minimum: {self.minimum} is no minimum scale; give one above 0, and at most"
                f" {self.value}, where it begins"
            )
        for name in ("growth_interval", "hysteresis"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is less than 1; give 1 or more")

    def update(self, *, overflow: bool) -> None:
        """Count a step; grow or shrink."""
        if overflow:
            self.steps, self.overflows = 0, self.overflows + 1
            if self.overflows >= self.hysteresis:
                self.value = max(self.value * self.backoff, self.minimum)
            return
        self.steps += 1
        if self.steps == self.growth_interval:
            self.steps, self.overflows = 0, 0
            self.value *= self.growth
