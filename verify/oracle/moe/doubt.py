"""Inputs of a router at which no decision is in doubt.

What is chosen, and what is dropped, are decisions: a rounding error turns one wherever two scores
nearly tie, and then an output differs by far more than any tolerance. Nothing is loosened for that.
Instead, `settled` replaces tokens until, at every decision, the two scores that it is between are
further apart than twice the largest error that the case's arithmetic, or a disturbed run of the
reference, can give them; `Doubt` derives it. Then every right computation decides alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from verify.errors import BadArgument
from verify.oracle.moe.routing import (
    admitted,
    by_rank,
    choose,
    group_scores,
    logits_of,
    of_ranks,
    ranked_by,
    room_of,
    weigh,
)
from verify.oracle.moe.rules import SINGLE, Rules

_ATTEMPTS = 400


class Doubt:
    """Which tokens [sequence, batch] take part in a decision that rounding might turn.

    With u the unit roundoff of the case (float32's for float64, whose reference is calibrated in
    float32) and e that of float32, in which all is computed: inputs and weights may be rounded once
    more on their way, by 2 u each, and products are summed. A disturbed run moves every operand, by
    2 e: of the product, of what is done with logits, of what is done with that. So a logit moves by
    at most d = (5 u + (2 hidden + 12) e) sum |x w|, a softmax by a factor within exp(+-2 d), a
    sigmoid by d / 4, each by its own rounding besides, and a bias by 2 u and 4 e of itself. Where
    inputs have errors of their own, d is so many `times` as large.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rule: Rules,
        *,
        times: float = 1.0,
    ) -> None:
        self.rule = rule
        self.logits, terms = logits_of(x, weight), logits_of(x.abs(), weight.abs())
        error = times * (5 * rule.roundoff + (2 * x.shape[-1] + 12) * SINGLE) * terms
        self.worst = error.amax(-1)
        self.relative = torch.expm1(2 * self.worst) + 8 * SINGLE
        self.of_sigmoid = self.worst / 4 + 8 * SINGLE
        self.scores = ranked_by(self.logits, rule, bias)
        if rule.score == "sigmoid":
            of_itself = 2 * rule.roundoff + 4 * SINGLE
            of_bias = 0.0 if bias is None else of_itself * float(bias.abs().max())
            self.doubt = self.of_sigmoid + of_bias
        elif rule.pre_softmax:
            self.doubt = self.relative * self.scores.amax(-1)
        else:
            self.doubt = self.worst

    def tokens(self) -> Tensor:
        """True at tokens to replace."""
        rule = self.rule
        scores, found = self.scores, _near(self.scores, rule.top_k, self.doubt)
        if rule.groups > 1:
            each = rule.top_k // rule.group_top_k
            sums = group_scores(scores, rule)
            found = _near(admitted(scores, rule), rule.top_k, self.doubt)
            found |= _near(sums, rule.group_top_k, each * self.doubt)
        if rule.balance != "none":
            sigmoid = rule.score == "sigmoid"
            plain = torch.sigmoid(self.logits) if sigmoid else self.logits
            found |= _near(plain, rule.top_k, self.of_sigmoid if sigmoid else self.worst)
        if rule.capacity is None or rule.drop == "position" or found.any():
            return found
        return self._at_the_limit()

    def _at_the_limit(self) -> Tensor:
        """Tokens at the edge of an expert's capacity, on either side, that nearly tie."""
        rule, shape = self.rule, self.logits.shape
        chosen = choose(self.scores, rule)
        weights = weigh(self.logits, chosen, rule).masked_fill(~chosen, -1.0)
        error = (weights * self._relative(chosen, weights)).masked_fill(~chosen, 0.0)
        mine, errors = by_rank(weights, rule), by_rank(error, rule)
        room, found = room_of(mine.shape[1], rule), torch.zeros_like(mine, dtype=torch.bool)
        if 0 < room < mine.shape[1]:
            ordered, order = mine.sort(1, descending=True)
            errors = errors.gather(1, order)
            least = (ordered - errors)[:, :room].amin(1)
            most = (ordered + errors)[:, room:].amax(1)
            near = (most >= least) & (ordered[:, room] >= 0)
            found.scatter_(1, order[:, room - 1 : room + 1], near.unsqueeze(1).expand(-1, 2, -1))
        return of_ranks(found, shape, rule).any(-1)

    def _relative(self, chosen: Tensor, weights: Tensor) -> Tensor:
        """The relative error of weights: of a softmax, of all that competes with a choice."""
        if self.rule.score == "sigmoid":
            own = self.of_sigmoid.unsqueeze(-1) / torch.sigmoid(self.logits)
            return 2 * own.where(chosen, 0.0).amax(-1, keepdim=True)
        others = (1 - weights / self.rule.scaling).clamp(0, 1)
        return torch.expm1(2 * self.worst).unsqueeze(-1) * others + 24 * SINGLE


def _near(scores: Tensor, count: int, doubt: Tensor) -> Tensor:
    """Whether the scores on both sides of the cut after `count` are within twice the doubt."""
    if count >= scores.shape[-1]:
        return torch.zeros_like(doubt, dtype=torch.bool)
    ordered = scores.sort(-1, descending=True).values
    return ordered[..., count - 1] - ordered[..., count] <= 2 * doubt


def settled(x: Tensor, weight: Tensor, rule: Rules, bias: Tensor | None = None) -> Tensor:
    """`x` [sequence, batch, hidden] with other tokens where a decision is in doubt.

    Their features are drawn from those of all tokens, with either sign, so that they are numbers of
    the same dtype. Raises BadArgument where that does not help.
    """
    rule.check_sizes()
    pool, x = x.flatten(), x.clone()
    for attempt in range(_ATTEMPTS):
        wrong = Doubt(x, weight, bias, rule).tokens()
        if not wrong.any():
            return x
        generator = torch.Generator().manual_seed(attempt)
        size = (int(wrong.sum()), x.shape[-1])
        drawn = pool[torch.randint(0, pool.numel(), size, generator=generator)]
        x[wrong] = drawn * (torch.randint(0, 2, size, generator=generator) * 2 - 1)
    raise BadArgument(
        f"case: {_ATTEMPTS} draws of tokens left decisions between {rule.experts} experts in doubt;"
        " take a wider dtype or other sizes"
    )


Settle = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Tensor]]


def settles(rule: Rules, weight: str) -> Settle:
    """`Contract.settle` for the input `x`, by the parameter `weight` and the input expert_bias."""

    def settle(
        inputs: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        x = settled(inputs["x"], parameters[weight], rule, inputs.get("expert_bias"))
        return {**inputs, "x": x}

    return settle
