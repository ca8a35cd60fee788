"""How a case of `training_steps` trains: its options, each checked once."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from verify.case import Case
from verify.errors import BadArgument
from verify.oracle.contract import Tensors
from verify.oracle.learning_rates import OPTIONS as RATES
from verify.oracle.terms import known_options, number, one_of, switches, whole_number

OPTIMIZERS = ("sgd", "adam")
GROUPS = ("one", "several")
FROZEN = ("", "norm", "mlp.fc1", "mlp")
SPARE = ("", "never", "first_round", "odd_steps")
SCALES = ("none", "static", "dynamic")
OPTIONS = (
    *RATES,
    "optimizer",
    "momentum",
    "weight_decay",
    "clip",
    "norm",
    "groups",
    "frozen",
    "spare",
    "loss_scale",
    "hysteresis",
    "minimum_scale",
    "overflow",
    "bucket",
    "distributed",
    "overlap",
)
STATIC, DYNAMIC, GROWTH_INTERVAL = 2.0, 4.0, 2
# Learning rate and weight decay of a group, as factors.
FACTORS = {"one": ((1.0, 1.0),), "several": ((1.0, 1.0), (0.5, 2.0), (1.0, 0.0), (4.0, 1.0))}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`clip` is the largest norm, of order `norm`; `overflow` the step, from 1, whose gradients are
    not finite, 0 for none; `spare` when the second norm is read, "" if there is none."""

    optimizer: str
    momentum: float
    weight_decay: float
    clip: float | None
    norm: float
    groups: str
    frozen: str
    spare: str
    loss_scale: str
    hysteresis: int
    minimum_scale: float
    overflow: int
    distributed: bool

    def group_of(self, name: str) -> int:
        """The parameter group of a parameter. Of several, the last has none."""
        if self.groups == "one":
            return 0
        if name.endswith("fc2.weight"):
            return 1
        return 2 if name.endswith("bias") or name.startswith("norm") else 0

    def reads_spare(self, step: int, round_: int) -> bool:
        """Whether the forward pass of a round of a step, both from 0, reads the second norm."""
        return {"first_round": round_ == 0, "odd_steps": step % 2 == 0}.get(self.spare, False)

    def is_frozen(self, name: str) -> bool:
        """Whether a parameter is not trained."""
        return bool(self.frozen) and name.startswith(self.frozen)


def plan_of(case: Case, steps: int, *, frozen: tuple[str, ...] = FROZEN) -> Plan:
    """The plan of a case of so many steps, of which what is `frozen` can be. Raises BadArgument for
    an option that is none."""
    known_options(case, *OPTIONS)
    switches(case, {"overlap": False})
    whole_number(case, "bucket", least=1)
    plan = Plan(
        optimizer=one_of(case, "optimizer", OPTIMIZERS),
        momentum=number(case, "momentum", least=0.0, below=1.0) or 0.0,
        weight_decay=number(case, "weight_decay", least=0.0) or 0.0,
        clip=_positive(case, "clip", None),
        norm=inf if case.options.get("norm") == "inf" else _positive(case, "norm", 2.0) or 2.0,
        groups=one_of(case, "groups", GROUPS),
        frozen=one_of(case, "frozen", frozen),
        spare=one_of(case, "spare", SPARE),
        loss_scale=one_of(case, "loss_scale", SCALES),
        hysteresis=whole_number(case, "hysteresis", least=1) or 1,
        minimum_scale=_positive(case, "minimum_scale", 1.0) or 1.0,
        overflow=whole_number(case, "overflow", least=0) or 0,
        distributed=switches(case, {"distributed": False})["distributed"],
    )
    if plan.overflow > steps or (plan.overflow and plan.loss_scale == "none"):
        raise BadArgument(
            f"case.options.overflow: {plan.overflow} is no step of {steps} with a loss scale; give"
            " 0, or one with loss_scale=static or dynamic"
        )
    if plan.minimum_scale > DYNAMIC:
        raise BadArgument(
            f"case.options.minimum_scale: {plan.minimum_scale} is above {DYNAMIC}, the first one"
        )
    if plan.momentum and plan.optimizer == "adam":
        raise BadArgument("case.options.momentum: adam has its own; leave it out")
    return plan


def _positive(case: Case, name: str, default: float | None) -> float | None:
    value = number(case, name, least=0.0)
    if value == 0:
        raise BadArgument(f"case.options.{name}: {value} is not above 0")
    return default if value is None else value


class Scale:
    """The loss scale of every step: static, or doubled after `GROWTH_INTERVAL` good steps in a row
    and halved at each overflow from the `hysteresis`-th on, down to the `minimum_scale`; growth
    forgives."""

    def __init__(self, plan: Plan) -> None:
        self.dynamic = plan.loss_scale == "dynamic"
        self.value = {"none": 1.0, "static": STATIC, "dynamic": DYNAMIC}[plan.loss_scale]
        self._least = plan.minimum_scale
        self._patience, self._left, self._good = plan.hysteresis, plan.hysteresis, 0

    def after(self, *, overflow: bool) -> None:
        """Go on to the next step."""
        if not self.dynamic:
            return
        if overflow:
            self._good, self._left = 0, self._left - 1
            if self._left <= 0:
                self.value = max(self.value / 2, self._least)
            return
        self._good += 1
        if self._good == GROWTH_INTERVAL:
            self._good, self._left, self.value = 0, self._patience, self.value * 2


def optimizer_of(plan: Plan, main: Tensors) -> torch.optim.Optimizer:
    """torch's own optimizer of these leaves, a parameter group for each of the plan's."""
    groups: list[dict[str, object]] = [
        {
            "params": [leaf for name, leaf in main.items() if plan.group_of(name) == index],
            "weight_decay": plan.weight_decay * decay,
        }
        for index, (_, decay) in enumerate(FACTORS[plan.groups])
    ]
    if plan.optimizer == "adam":
        return torch.optim.AdamW(groups, foreach=False)
    return torch.optim.SGD(groups, lr=0.0, momentum=plan.momentum, foreach=False)


def clipped(gradients: list[Tensor], plan: Plan) -> Tensor:
    """Clip gradients in place, and their norm before that."""
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    norm = torch.linalg.vector_norm(flat, plan.norm)
    if plan.clip is not None and float(norm) > plan.clip - 1e-6:
        for gradient in gradients:
            gradient *= plan.clip / (norm + 1e-6)
    return norm
