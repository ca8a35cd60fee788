"""What adapters of `pipeline` have in common: the stack of layers of a stage, and its rounds.

A pipeline goes forward and back within one call, before the harness knows the gradient of the loss.
So the whole of it runs in forward, for a gradient of one, and backward multiplies with the
harness' number what was found.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from verify.case import Case
from verify.oracle.pipeline import lengths_of
from verify.placement import Placements, Shard

Tensors = Mapping[str, Tensor]
ByMicrobatch = Mapping[int, Tensor]
Linear = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Chunk:
    """Layers x + tanh(x weight^T + bias) / 2, the bias and the diagonal of a weight that is
    `shared`."""

    weights: Sequence[Parameter]
    biases: Sequence[Parameter]
    shared: bool

    def forward(self, x: Tensor, linear: Linear = F.linear) -> Tensor:
        """All layers of x [sequence, batch, hidden]; `linear` multiplies it with a weight."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            added = bias + weight.diagonal() if self.shared else bias
            x = x + (linear(x, weight) + added).tanh() / 2
        return x

    def gradients(self) -> dict[str, Tensor]:
        """Those of the layers, stacked, by the name of the stack; a frozen stack has none unless
        one of its parameters was given one."""
        found = {}
        for name, stack in (("weight", self.weights), ("bias", self.biases)):
            if any(each.requires_grad or each.grad is not None for each in stack):
                found[name] = torch.stack([_gradient(each) for each in stack])
        return found


@dataclass(frozen=True)
class Round:
    """Some microbatches of the chunks of a stage: `inputs` [tokens, batch, hidden] of each, which
    require gradients, and `loss` of what comes out of the last layer and the microbatch. Gradients
    are those of `scale` times the sum of the losses."""

    chunks: Sequence[Chunk]
    inputs: Sequence[Tensor]
    loss: Callable[[Tensor, int], Tensor]
    scale: float


class PipelineSubject(ABC):
    """The chunks of one stage; their layers lie in `weight` and `bias`, chunk after chunk."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rounds = int(case.options.get("rounds", 1) or 1)
        layers, hidden = case.shape["layers"] // case.layout.pp, case.shape["hidden"]
        self.each, dtype = layers // case.layout.vpp, getattr(torch, case.dtype)
        weight = torch.full((layers, hidden, hidden), torch.nan, dtype=dtype)
        self.weight = Parameter(weight, not case.options.get("frozen_weight", False))
        self.bias = Parameter(torch.full((layers, hidden), torch.nan, dtype=dtype))
        self._of_frozen: Tensor | None = None

    @abstractmethod
    def run(self, round_: Round, *, forward_only: bool) -> tuple[ByMicrobatch, ByMicrobatch]:
        """Run the schedule of a round, and add up gradients with its parameters unless it is
        forward only. The losses on the last stage, and the gradients of inputs on the first."""

    def parameters(self) -> Mapping[str, tuple[Parameter, Placements]]:
        """Both stacks, of which a stage has vpp blocks."""
        placements: Placements = {"pp": Shard(0, self.case.layout.vpp)}
        return {"weight": (self.weight, placements), "bias": (self.bias, placements)}

    def forward(self, inputs: Tensors) -> Tensors:
        """The losses, on the last stage, and zeros on the others."""
        found: dict[str, Tensor] = {}
        loss = _Trained.apply(inputs["x"], self.weight, self.bias, self, inputs["targets"], found)
        return {"loss": loss, **found}

    def finish_gradients(self) -> None:
        """No stage has a part of another's gradients. What a frozen stack was given is shown too,
        which autograd would drop."""
        if not self.weight.requires_grad:
            self.weight.grad = self._of_frozen

    def train(self, x: Tensor, targets: Tensor) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """All rounds: outputs by name, and the gradients of x, weight and bias for a gradient of
        one of the mean of all losses; None for one that nobody has."""
        chunks = [self._chunk(chunk) for chunk in range(self.case.layout.vpp)]
        count = x.shape[0] // self.rounds
        grad_x = torch.zeros_like(x)
        names = ("evaluation", "losses") if self.case.options.get("evaluated") else ("losses",)
        outputs = {name: x.new_zeros(x.shape[0]) for name in names}
        for first in range(0, x.shape[0], count):
            round_ = self._round(chunks, x, targets, first)
            for name in names:
                losses, gradients = self.run(round_, forward_only=name == "evaluation")
                for i, loss in losses.items():
                    outputs[name][first + i] = loss
                for i, gradient in gradients.items():
                    grad_x[first + i, : gradient.shape[0]] = gradient
        complete = self.gradients(chunks)
        stacks = {
            name: torch.cat([own[name] for own in complete])
            for name in ("weight", "bias")
            if all(name in own for own in complete)
        }
        self._of_frozen = stacks.get("weight")
        return outputs, [grad_x, stacks.get("weight"), stacks.get("bias")]

    def gradients(self, chunks: Sequence[Chunk]) -> Sequence[Tensors]:
        """Those of every chunk after all rounds."""
        return [chunk.gradients() for chunk in chunks]

    def _chunk(self, chunk: int) -> Chunk:
        """The layers of one chunk, in the memory of the stacks."""
        own = slice(chunk * self.each, (chunk + 1) * self.each)
        weights = [Parameter(each, self.weight.requires_grad) for each in self.weight.detach()[own]]
        biases = [Parameter(each) for each in self.bias.detach()[own]]
        return Chunk(weights, biases, bool(self.case.options.get("shared", False)))

    def _round(self, chunks: Sequence[Chunk], x: Tensor, targets: Tensor, first: int) -> Round:
        """That of the microbatches from `first`."""
        lengths = lengths_of(self.case)[first : first + x.shape[0] // self.rounds]
        taken = [x[first + i, :length].detach() for i, length in enumerate(lengths)]

        def loss(y: Tensor, microbatch: int) -> Tensor:
            target = targets[first + microbatch, : lengths[microbatch]]
            return (y - target).square().mean()

        inputs = [each.requires_grad_() for each in taken]
        return Round(chunks=chunks, inputs=inputs, loss=loss, scale=1 / x.shape[0])


class _Trained(torch.autograd.Function):
    """The mean of the losses. Backward communicates nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        subject: PipelineSubject,
        targets: Tensor,
        found: dict[str, Tensor],
    ) -> Tensor:
        outputs, ctx.gradients = subject.train(x, targets)
        found.update(outputs)
        return outputs["losses"].mean()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        found = (None if each is None else grad_loss * each for each in ctx.gradients)
        return (*found, None, None, None)


def _gradient(parameter: Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
