"""Learning rates by the number of updates that were made before."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_DECAYS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}
SCHEDULES = ("constant", *_DECAYS, "wsd", "inverse_square_root")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate at update t, counted from 0.

    Up to `warmup_steps` it rises from 0 to `maximum` in a straight line. Then

    | style | until decay_steps |
    |---|---|
    | constant | maximum, for ever |
    | linear | a straight line down to minimum |
    | cosine | half a cosine down to minimum (arXiv:1608.03983) |
    | wsd | maximum, and over the last `annealing_steps` a straight line (arXiv:2404.06395) |
    | inverse_square_root | maximum * sqrt(w / t), not below minimum, w = max(warmup_steps, 1) |

    and minimum after `decay_steps`. These are the formulas of Megatron-LM's OptimizerParamScheduler
    with an initial rate of 0 and linear annealing. ValueError for an unknown style, a minimum that
    is negative or above the maximum, and steps that do not come one after the other.
    """

    style: str = "constant"
    maximum: float
    minimum: float = 0.0
    warmup_steps: int = 0
    decay_steps: int | None = None
    annealing_steps: int = 0

    def __post_init__(self) -> None:
        if self.style not in SCHEDULES:
            raise ValueError(
                f"style: {self.style!r} is no schedule; take one of {', '.join(SCHEDULES)}"
            )
        if not 0 <= self.minimum <= self.maximum:
            raise ValueError(
                f"minimum: {self.minimum} is not from 0 to {self.maximum}, the maximum"
            )
        if self.style == "constant":
            return
        if self.decay_steps is None:
            raise ValueError(f"decay_steps: None, and {self.style} has to end; give a number")
        first = self.decay_steps - self.annealing_steps
        if not 0 <= self.warmup_steps <= first <= self.decay_steps or self.decay_steps < 1:
            raise ValueError(
                f"decay_steps: {self.decay_steps} updates have no room for a warmup of"
                f" {self.warmup_steps} and an annealing of {self.annealing_steps}"
            )

    def rate(self, step: int) -> float:
        """The learning rate of the update after `step` others."""
        if step < 0:
            raise ValueError(f"step: {step} is negative; give the number of updates made before")
        if step < self.warmup_steps:
            return self.maximum * step / self.warmup_steps
        if self.style == "constant":
            return self.maximum
        assert self.decay_steps is not None
        if step > self.decay_steps:
            return self.minimum
        if self.style == "inverse_square_root":
            start = max(self.warmup_steps, 1)
            return max(self.minimum, self.maximum * math.sqrt(start / max(step, start)))
        first, decay = self.warmup_steps, _DECAYS["linear"]
        if self.style == "wsd":
            first = self.decay_steps - self.annealing_steps
        else:
            decay = _DECAYS[self.style]
        if step <= first:
            return self.maximum
        left = decay((step - first) / (self.decay_steps - first))
        return self.minimum + left * (self.maximum - self.minimum)
