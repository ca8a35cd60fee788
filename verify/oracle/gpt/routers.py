"""What the routers of a whole model add to its loss, and data at which none of them is in doubt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from verify.errors import BadArgument
from verify.oracle.contract import Tensors
from verify.oracle.moe.doubt import Doubt
from verify.oracle.moe.routing import logits_of, losses, route
from verify.oracle.moe.rules import Rules

# A router of a model is given what layers and steps of training have made of the data, and their
# errors with it.
TIMES = 16.0
_ATTEMPTS = 100


@dataclass
class Routers:
    """The routers of a model. Where it is `asked`, `in_doubt` says whether any of them has decided
    what rounding might turn."""

    asked: bool = False
    in_doubt: bool = False
    _added: list[Tensor] = field(default_factory=list)

    def shares(self, x: Tensor, weight: Tensor, rule: Rules) -> Tensor:
        """How much each expert weighs for each token, [sequence, batch, experts]."""
        logits = logits_of(x, weight)
        self._added += losses(logits, rule).values()
        if self.asked:
            doubt = Doubt(x.detach(), weight.detach(), None, rule, times=TIMES)
            self.in_doubt |= bool(doubt.tokens().any())
        _, shares = route(logits, rule)
        return shares

    def added_losses(self) -> Tensor:
        """The sum of the auxiliary losses since it was asked for last."""
        total = sum(self._added, torch.zeros(()))
        self._added = []
        return total


def settled(
    inputs: Tensors, parameters: Tensors, in_doubt: Callable[[Tensors, Tensors], bool]
) -> Tensors:
    """The inputs with other tokens, of those that there are, where a decision is in doubt. Raises
    BadArgument where that does not help."""
    tokens = inputs["tokens"]
    for attempt in range(_ATTEMPTS):
        if not in_doubt(inputs, parameters):
            return inputs
        generator = torch.Generator().manual_seed(attempt)
        places = torch.randint(0, tokens.numel(), tokens.shape, generator=generator)
        inputs = {**inputs, "tokens": tokens.flatten()[places]}
    raise BadArgument(
        f"case: {_ATTEMPTS} draws of tokens left what routers decide in doubt; take a wider dtype"
        " or other sizes"
    )
