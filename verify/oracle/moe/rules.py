"""The options of a mixture of experts, read once, and where its tokens lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from verify.case import Case
from verify.errors import BadArgument
from verify.oracle.terms import switches
from verify.placement import Placements, Replicate, Shard

AXES = ("tp", "cp", "dp", "etp", "ep", "edp")
DISPATCHERS = ("all_to_all", "all_gather")
SCORES = ("softmax", "sigmoid")
DROPS = ("probability", "position")
LEVELS = ("none", "sequence", "batch", "global")
OPTIONS = (
    "score",
    "pre_softmax",
    "scaling",
    "expert_bias",
    "capacity",
    "drop",
    "balance",
    "coefficient",
    "z_loss",
    "loss_scale",
)
SINGLE = 2.0**-24


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How tokens choose experts: the options of a case. `blocks` says into how many parts the ranks
    cut the sequence and the batch; each part is one rank's tokens, among which capacity is shared,
    and the parts of the batch are micro-batches."""

    experts: int
    top_k: int
    groups: int
    group_top_k: int
    score: str
    pre_softmax: bool
    scaling: float
    expert_bias: bool
    capacity: float | None
    drop: str
    balance: str
    coefficient: float
    z_loss: float
    loss_scale: float
    blocks: tuple[int, int]
    roundoff: float

    @property
    def loses(self) -> tuple[str, ...]:
        """The names of the losses that are added."""
        names = ("balance",) * (self.balance != "none") + ("z",) * (self.z_loss != 0)
        return tuple(f"{name}_loss" for name in names)

    def check_sizes(self) -> None:
        """Raise BadArgument where a token cannot choose so many experts in so many groups."""
        groups, chosen = self.groups, self.group_top_k
        fits = self.experts % groups == 0 and chosen <= groups and self.top_k % chosen == 0
        if not fits or self.top_k > self.experts // groups * chosen:
            raise BadArgument(
                f"case.shape.top_k: {self.top_k} of {self.experts} experts in {groups} groups,"
                f" {chosen} of them admitted, do not fit"
            )


def rules(case: Case, *, score: str = "", expert_bias: bool = False) -> Rules:
    """The rules of a case, whose concept may fix the score and the bias.

    Raises BadArgument for options that have no meaning, or not together.
    """
    flags = switches(case, {"pre_softmax": False, "expert_bias": False})
    given = case.options
    layout, shape = case.layout, case.shape
    found = Rules(
        experts=shape["experts"],
        top_k=shape["top_k"],
        groups=shape.get("groups", 1),
        group_top_k=shape.get("group_top_k", 1),
        score=score or _one_of(case, "score", SCORES),
        drop=_one_of(case, "drop", DROPS),
        balance=_one_of(case, "balance", LEVELS),
        scaling=_number(case, "scaling", 1.0),
        capacity=None if given.get("capacity") is None else _number(case, "capacity", 1.0),
        coefficient=_number(case, "coefficient", 1.0),
        z_loss=_number(case, "z_loss", 0.0),
        loss_scale=_number(case, "loss_scale", 1.0),
        blocks=(layout.cp * (layout.tp if layout.sequence_parallel else 1), layout.dp),
        roundoff=max(torch.finfo(getattr(torch, case.dtype)).eps / 2, SINGLE),
        pre_softmax=flags["pre_softmax"],
        expert_bias=expert_bias or flags["expert_bias"],
    )
    _check(found)
    return found


def _check(rule: Rules) -> None:
    """Raise BadArgument for options that do not go together."""
    if rule.score != "sigmoid" and rule.expert_bias:
        raise BadArgument("case.options.expert_bias: True needs score=sigmoid")
    if rule.score != "softmax" and rule.pre_softmax:
        raise BadArgument("case.options.pre_softmax: True needs score=softmax")
    if rule.capacity is not None and rule.capacity <= 0:
        raise BadArgument(f"case.options.capacity: {rule.capacity} is not above 0")
    alike = rule.score == "softmax" and not rule.pre_softmax and rule.top_k == 1
    if rule.capacity is not None and rule.drop == "probability" and alike:
        raise BadArgument(
            "case.options.drop: probability with top_k=1 needs pre_softmax or sigmoid; else every"
            " choice has probability 1"
        )


def _one_of(case: Case, option: str, allowed: tuple[str, ...]) -> str:
    value = case.options.get(option, allowed[0])
    if value not in allowed:
        raise BadArgument(f"case.options.{option}: {value!r} is not one of {', '.join(allowed)}")
    return str(value)


def _number(case: Case, option: str, default: float) -> float:
    value: Any = case.options.get(option, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadArgument(f"case.options.{option}: {value!r} is no number")
    return float(value)


def token_placements(case: Case, *, divided: bool = False) -> Placements:
    """Tokens [sequence, batch, ...]: the batch over dp, the sequence over cp and, under sequence
    parallelism or where `divided`, over tp, whose ranks otherwise hold copies."""
    over_tp = divided or case.layout.sequence_parallel
    return {"dp": Shard(1), "cp": Shard(0), "tp": Shard(0) if over_tp else Replicate()}
