"""Routing in a mixture of experts on one device: scores, choices, capacity, auxiliary losses.

Scores are computed in float32, or float64 for float64 inputs, from router logits x weight^T.
Tensors are [sequence, batch, experts].
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import ceil
from typing import Any

import torch
from torch import Tensor

from verify.oracle.moe.rules import Rules


def logits_of(x: Tensor, weight: Tensor) -> Tensor:
    """Router logits [..., experts] of `x` [..., hidden], in float32 or float64."""
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    return x.to(wide) @ weight.to(wide).t()


def route(logits: Tensor, rule: Rules, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Who goes where, bool, and how much it weighs: both [sequence, batch, experts]."""
    chosen = choose(ranked_by(logits.detach(), rule, bias), rule)
    weights = weigh(logits, chosen, rule)
    if rule.capacity is None:
        return chosen, weights
    kept = _kept(chosen, weights.detach(), rule)
    return kept, torch.where(kept, weights, torch.zeros_like(weights))


def losses(logits: Tensor, rule: Rules) -> dict[str, Tensor]:
    """The auxiliary losses of all tokens, by the names of `rule.loses`: the mean over sets of
    tokens (sequences, micro-batches or all) of experts * sum of f * P, and the mean of logsumexp
    squared. arXiv:2101.03961, equations 4 to 6; arXiv:2202.08906, equation 5."""
    found = {}
    if rule.balance != "none":
        scores = _normalised(logits, rule)
        used = largest(scores.detach(), rule.top_k).to(scores.dtype) / rule.top_k
        parts = {"sequence": logits.shape[1], "batch": rule.blocks[1], "global": 1}[rule.balance]

        def mean(values: Tensor) -> Tensor:
            return values.unflatten(1, (parts, -1)).mean((0, 2))

        balance = rule.experts * (mean(used) * mean(scores)).sum(-1).mean()
        found["balance_loss"] = rule.coefficient * balance
    if rule.z_loss:
        found["z_loss"] = rule.z_loss * torch.logsumexp(logits, -1).square().mean()
    return found


class _With(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.loss = scale, loss
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], torch.full_like(ctx.loss, ctx.scale), None


def with_losses(weights: Tensor, found: Mapping[str, Tensor], rule: Rules) -> Tensor:
    """The weights, whose backward gives each loss the gradient `loss_scale`."""
    for loss in found.values():
        weights = _With.apply(weights, loss, rule.loss_scale)
    return weights


def ranked_by(logits: Tensor, rule: Rules, bias: Tensor | None) -> Tensor:
    """The scores by which experts are ranked."""
    if rule.score == "softmax":
        return torch.softmax(logits, -1) if rule.pre_softmax else logits
    scores = torch.sigmoid(logits)
    return scores if bias is None else scores + bias.to(scores.dtype)


def weigh(logits: Tensor, chosen: Tensor, rule: Rules) -> Tensor:
    """How much each choice weighs, before any is dropped."""
    nothing = torch.zeros_like(logits)
    if rule.score == "sigmoid":
        weights = torch.where(chosen, torch.sigmoid(logits), nothing)
        weights = weights / weights.sum(-1, keepdim=True) if rule.top_k > 1 else weights
    else:
        powers = torch.exp(logits - logits.detach().amax(-1, keepdim=True))
        own = torch.where(chosen, powers, nothing)
        weights = own / (powers if rule.pre_softmax else own).sum(-1, keepdim=True)
    return weights * rule.scaling


def _normalised(logits: Tensor, rule: Rules) -> Tensor:
    if rule.score == "softmax":
        return torch.softmax(logits, -1)
    scores = torch.sigmoid(logits)
    return scores / scores.sum(-1, keepdim=True)


def largest(scores: Tensor, count: int, dim: int = -1) -> Tensor:
    """True at the `count` largest along a dimension; of equal ones, at the first."""
    places = scores.argsort(dim=dim, descending=True, stable=True).argsort(dim=dim)
    return places < count


def group_scores(scores: Tensor, rule: Rules) -> Tensor:
    """[..., groups]: the sum of a group's best scores, as many as a token takes of it."""
    ordered = scores.unflatten(-1, (rule.groups, -1)).sort(-1, descending=True).values
    return ordered[..., : rule.top_k // rule.group_top_k].sum(-1)


def admitted(scores: Tensor, rule: Rules) -> Tensor:
    """The scores, minus infinity in groups of experts that a token may not go to."""
    allowed = largest(group_scores(scores, rule), rule.group_top_k)
    allowed = allowed.repeat_interleave(rule.experts // rule.groups, dim=-1)
    return scores.masked_fill(~allowed, -torch.inf)


def choose(scores: Tensor, rule: Rules) -> Tensor:
    """The experts that each token chooses by these scores."""
    return largest(admitted(scores, rule) if rule.groups > 1 else scores, rule.top_k)


def by_rank(full: Tensor, rule: Rules) -> Tensor:
    """[sequence, batch, ...] to [ranks, tokens of one, ...], in a rank's own order."""
    parts = full.unflatten(1, (rule.blocks[1], -1)).unflatten(0, (rule.blocks[0], -1))
    return parts.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def of_ranks(parts: Tensor, shape: torch.Size, rule: Rules) -> Tensor:
    """The inverse of `by_rank`."""
    rows, columns = shape[0] // rule.blocks[0], shape[1] // rule.blocks[1]
    split = parts.unflatten(1, (rows, columns)).unflatten(0, rule.blocks)
    return split.transpose(1, 2).reshape(shape)


def room_of(tokens: int, rule: Rules) -> int:
    """How many of a rank's tokens an expert takes."""
    return ceil(Fraction(rule.capacity or 0.0) * tokens * rule.top_k / rule.experts)


def _kept(chosen: Tensor, weights: Tensor, rule: Rules) -> Tensor:
    """The choices that experts have room for, among each rank's tokens."""
    mine, room = by_rank(chosen, rule), room_of(chosen[..., 0].numel() // _ranks(rule), rule)
    if rule.drop == "position":
        kept = mine & (mine.long().cumsum(1) <= room)
    else:
        kept = mine & largest(by_rank(weights, rule).masked_fill(~mine, -1.0), room, dim=1)
    return of_ranks(kept, chosen.shape, rule)


def _ranks(rule: Rules) -> int:
    return rule.blocks[0] * rule.blocks[1]
