"""The router: which experts a token goes to, and how much of each it gets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module

from impl.moe.balance import (
    LEVELS,
    ExpertBias,
    attach_loss,
    load_balancing_loss,
    router_z_loss,
)
from impl.parameters import Initialiser, replicated_parameter
from impl.weight_pass import linear

SCORES = ("softmax", "sigmoid")
DROPS = ("probability", "position")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How experts are chosen and weighed.

    `score` softmax: weights are the softmax of the chosen logits, or with `pre_softmax` the chosen
    of the softmax of all. `score` sigmoid: weights are the chosen sigmoids divided by their sum
    (undivided for `top_k` 1). `scaling` multiplies them. With `groups`, the experts are as many
    runs of equal length; a token goes to the `group_top_k` of them whose best top_k / group_top_k
    scores have the largest sum. `expert_bias` adds a bias to sigmoids when they are ranked.

    With `capacity`, an expert takes ceil(tokens * top_k / experts * capacity) of a rank's tokens:
    those that weigh it most, or (`drop` position) the first. Weights of the others stay as they are
    and do not then sum to one. GShard, arXiv:2006.16668; groups and bias, arXiv:2412.19437.
    """

    top_k: int
    score: str = "softmax"
    pre_softmax: bool = False
    scaling: float = 1.0
    groups: int = 1
    group_top_k: int = 1
    expert_bias: bool = False
    capacity: float | None = None
    drop: str = "probability"

    def check(self, num_experts: int) -> None:
        """Raise ValueError for what does not go together, or not with so many experts."""
        if not 1 <= self.top_k <= num_experts:
            raise ValueError(f"top_k: {self.top_k} is not from 1 to the {num_experts} experts")
        for name, value, allowed in (("score", self.score, SCORES), ("drop", self.drop, DROPS)):
            if value not in allowed:
                raise ValueError(f"{name}: {value!r} is not one of {', '.join(allowed)}")
        if self.score != "sigmoid" and self.expert_bias:
            raise ValueError("expert_bias: True needs score='sigmoid'; a softmax has no use for it")
        if self.score != "softmax" and self.pre_softmax:
            raise ValueError("pre_softmax: True needs score='softmax'; leave it out")
        alike = self.score == "softmax" and not self.pre_softmax and self.top_k == 1
        if self.capacity is not None and self.drop == "probability" and alike:
            raise ValueError(
                "capacity: the probability of an only choice is 1, so none is the smallest to drop;"
                " set pre_softmax, or drop='position'"
            )
        if self.capacity is not None and self.capacity <= 0:
            raise ValueError(f"capacity: {self.capacity} is not above 0; None drops nothing")
        if self.groups < 1 or num_experts % self.groups:
            raise ValueError(f"groups: {self.groups} does not divide the {num_experts} experts")
        if not 1 <= self.group_top_k <= self.groups or self.top_k % self.group_top_k:
            raise ValueError(
                f"group_top_k: {self.group_top_k} must be from 1 to groups={self.groups} and divide"
                f" top_k={self.top_k}"
            )
        if self.top_k // self.group_top_k > num_experts // self.groups:
            raise ValueError(
                f"group_top_k: {self.group_top_k} groups of {num_experts // self.groups} experts"
                f" do not have the top_k={self.top_k} of a token"
            )


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The coefficients of the auxiliary losses (`level` is one of `impl.moe.balance.LEVELS`, None
    for no load balancing), and `scale`, which multiplies their gradients: see `attach_loss`."""

    level: str | None = None
    balance: float = 1e-2
    z: float = 0.0
    scale: float = 1.0

    def check(self) -> None:
        """Raise ValueError for an unknown level."""
        if self.level is not None and self.level not in LEVELS:
            raise ValueError(f"level: {self.level!r} is not one of {', '.join(LEVELS)}")


@dataclass(frozen=True)
class Routing:
    """Where each of a rank's tokens goes. `probabilities` [tokens, experts], zero where `chosen`,
    bool, is False. `losses` are this rank's summands, detached: they are attached already."""

    probabilities: Tensor
    chosen: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)


class TopKRouter(Module):
    """Scores = x weight^T, and of these the top k of each token.

    `x` [sequence, batch, hidden] are this rank's tokens; the probabilities, [sequence * batch,
    experts], are theirs in that order. `weight` [experts, hidden] is Replicate; its gradient is
    Partial over the ranks that hold other tokens, over tp as its mark `sequence_parallel` says.
    Scores and probabilities are float32 (float64 for a float64 `x`), as rounding decides who wins.

    The ranks of `microbatch_group` hold the tokens of one micro-batch, those of `global_group` of
    all; ranks that hold copies of tokens must not both be in them. Forward: one all-reduce of
    counts with a load-balancing loss. Backward: none. Raises ValueError: see `Choice.check`.
    """

    def __init__(
        self,
        hidden: int,
        *,
        num_experts: int,
        choice: Choice,
        microbatch_group: ProcessGroup,
        global_group: ProcessGroup,
        init: Initialiser,
        losses: Losses | None = None,
        sequence_parallel: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.losses = Losses() if losses is None else losses
        choice.check(num_experts)
        self.losses.check()
        self.choice, self.num_experts = choice, num_experts
        self.microbatch_group, self.global_group = microbatch_group, global_group
        self.weight = replicated_parameter(
            num_experts,
            hidden,
            init=init,
            sequence_parallel=sequence_parallel,
            dtype=dtype,
            device=device,
        )
        self.expert_bias = (
            ExpertBias(
                num_experts, group=global_group, dtype=_wide(self.weight.dtype), device=device
            )
            if choice.expert_bias
            else None
        )

    def forward(self, x: Tensor) -> Routing:
        """The routing of the tokens of `x`; in training, with the auxiliary losses attached."""
        wide = _wide(x.dtype)
        logits = linear(x.to(wide), self.weight.to(wide))
        flat = logits.flatten(0, -2)
        bias = None if self.expert_bias is None else self.expert_bias.bias
        chosen, probabilities = choose(flat, self.choice, bias=bias)
        if self.expert_bias is not None:
            self.expert_bias.count(chosen)
        if self.choice.capacity is not None:
            chosen = within_capacity(probabilities, chosen, self.choice)
            probabilities = probabilities.where(chosen, 0.0)
        losses = self._losses(logits) if self.training else {}
        for loss in losses.values():
            probabilities = attach_loss(probabilities, loss, scale=self.losses.scale)
        return Routing(probabilities, chosen, {n: loss.detach() for n, loss in losses.items()})

    def _losses(self, logits: Tensor) -> dict[str, Tensor]:
        found = {}
        if self.losses.level is not None:
            scores = _normalised(logits, self.choice.score)
            balance = load_balancing_loss(
                scores,
                top_k_of(scores, self.choice.top_k),
                top_k=self.choice.top_k,
                level=self.losses.level,
                microbatch_group=self.microbatch_group,
                global_group=self.global_group,
            )
            found["balance"] = self.losses.balance * balance
        if self.losses.z:
            found["z"] = self.losses.z * router_z_loss(logits, global_group=self.global_group)
        return found


def choose(logits: Tensor, choice: Choice, *, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which experts each token chooses, bool, and their probabilities; both [tokens, experts].

    `bias` [experts] counts when they are ranked only. Nothing is dropped here.
    """
    if choice.score == "sigmoid":
        scores = logits.sigmoid()
        chosen = _ranked(scores if bias is None else scores + bias, choice)
        probabilities = scores.where(chosen, 0.0)
        if choice.top_k > 1:
            # The smallest normal number, against sigmoids that all underflow.
            least = torch.finfo(scores.dtype).tiny
            probabilities = probabilities / (probabilities.sum(-1, keepdim=True) + least)
    elif choice.pre_softmax:
        scores = logits.softmax(-1)
        chosen = _ranked(scores, choice)
        probabilities = scores.where(chosen, 0.0)
    else:
        chosen = _ranked(logits, choice)
        probabilities = logits.masked_fill(~chosen, -torch.inf).softmax(-1)
    return chosen, probabilities * choice.scaling


def within_capacity(probabilities: Tensor, chosen: Tensor, choice: Choice) -> Tensor:
    """The choices, of those in `chosen` [tokens, experts], that the experts have room for."""
    tokens, experts = chosen.shape
    assert choice.capacity is not None
    room = min(tokens, math.ceil(tokens * choice.top_k * choice.capacity / experts))
    if choice.drop == "position":
        return chosen & (chosen.cumsum(0) <= room)
    ranked = probabilities.masked_fill(~chosen, -1.0)
    return chosen & top_k_of(ranked.t(), room).t()


def top_k_of(scores: Tensor, top_k: int) -> Tensor:
    """True at the `top_k` largest of the last dimension."""
    best = scores.topk(top_k, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def _ranked(scores: Tensor, choice: Choice) -> Tensor:
    if choice.groups == 1:
        return top_k_of(scores, choice.top_k)
    grouped = scores.unflatten(-1, (choice.groups, -1))
    best = grouped.topk(choice.top_k // choice.group_top_k, dim=-1).values
    admitted = top_k_of(best.sum(-1), choice.group_top_k).unsqueeze(-1)
    return top_k_of(grouped.masked_fill(~admitted, -torch.inf).flatten(-2), choice.top_k)


def _normalised(logits: Tensor, score: str) -> Tensor:
    """Scores that sum to one over all experts."""
    if score == "softmax":
        return logits.softmax(-1)
    scores = logits.sigmoid()
    return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype is torch.float64 else torch.float32
