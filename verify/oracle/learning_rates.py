"""The contract of learning rates, and the formulas of them.

Of update t, counted from 0, with w updates of warm-up, from the largest rate M to the least m at T:

    t < w                   M t / w
    constant                M
    linear                  m + (M - m) (T - t) / (T - w)
    cosine                  m + (M - m) cos^2(pi/2 (t - w) / (T - w))             arXiv:1608.03983
    wsd                     M up to T - a, then m + (M - m) (T - t) / a           arXiv:2404.06395
    inverse_square_root     max(m, M sqrt(v / max(t, v))), v = max(w, 1)
    t > T, but constant     m

Megatron-LM's OptimizerParamScheduler, its first rate 0 and its annealing linear.
"""

from __future__ import annotations

import math

import torch

from verify.case import Case
from verify.errors import BadArgument
from verify.oracle.contract import Contract, TensorSpec
from verify.oracle.terms import known_options, number, one_of, sizes, whole_number

STYLES = ("constant", "linear", "cosine", "wsd", "inverse_square_root")
OPTIONS = ("schedule", "warmup", "decay", "annealing", "minimum")
MAXIMUM = 2.0**-8


def learning_rates(case: Case) -> Contract:
    """`rates` [steps], float64: the rate of each update, the same on every rank.

    Options `step`, the number of updates before the first of them; `schedule`, `warmup`, `decay`
    (T), `annealing` (a, of wsd) and `minimum`, a share of the maximum 1/256. Raises BadArgument
    where the phases do not come one after the other.
    """
    known_options(case, *OPTIONS, "step")
    (steps,) = sizes(case, "steps")
    before = whole_number(case, "step", least=0) or 0
    rates = rates_of(case, before + steps)[before:]
    return Contract(
        axes=("tp", "cp", "dp"),
        inputs={},
        parameters={},
        # At its end a course is a difference of numbers near the maximum.
        outputs={"rates": TensorSpec((steps,), grad_placements=None, terms=MAXIMUM)},
        reference=lambda inputs, parameters: {"rates": torch.tensor(rates, dtype=torch.float64)},
    )


def rates_of(case: Case, steps: int) -> list[float]:
    """The rates of the first updates by the options of a case. Raises as `learning_rates`."""
    style, minimum = one_of(case, "schedule", STYLES), number(case, "minimum", least=0.0) or 0.0
    warm, end, fall = (
        whole_number(case, name, least=0) or 0 for name in ("warmup", "decay", "annealing")
    )
    if minimum > 1:
        raise BadArgument(f"case.options.minimum: {minimum} of the maximum is above it")
    if style != "constant" and not (warm <= end - fall and end >= 1):
        raise BadArgument(
            f"case.options.decay: {end} updates have no room for warmup={warm}, annealing={fall}"
        )
    return [MAXIMUM * _share(style, t, warm, end, fall, minimum) for t in range(steps)]


def _share(style: str, t: int, warm: int, end: int, fall: int, least: float) -> float:
    """The rate of update t as a share of the maximum."""
    if t < warm:
        return t / warm
    if style == "constant":
        return 1.0
    if t > end:
        return least
    if style == "inverse_square_root":
        return max(least, (max(warm, 1) / max(t, warm, 1)) ** 0.5)
    start = end - fall if style == "wsd" else warm
    if t <= start:
        return 1.0
    past = (t - start) / (end - start)
    high = math.cos(math.pi / 2 * past) ** 2 if style == "cosine" else 1.0 - past
    return least + (1.0 - least) * high
