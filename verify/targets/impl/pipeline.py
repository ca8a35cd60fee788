"""impl's pipeline as a subject: a stack of layers that `Executor` trains, and its schedules.

A pipeline goes forward and back within one call, before the harness knows the gradient of the loss.
So the whole of it runs in forward, for a gradient of one, and backward multiplies with the
harness' number what `finished` handed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from impl.groups import Groups
from impl.pipeline.executor import Executor, Stage
from impl.pipeline.p2p import Link
from impl.pipeline.schedules import Schedule, build_schedule, forward_only
from impl.weight_pass import linear
from verify.case import Case
from verify.layout import Layout
from verify.oracle.pipeline import OPTIONS as _OPTIONS
from verify.oracle.pipeline import lengths_of
from verify.placement import Placements, Shard
from verify.targets.impl.subject import Tensors

OPTIONS: Mapping[str, tuple[str, ...]] = {"pipeline": _OPTIONS}


def schedule(kind: str, layout: Layout, microbatches: int) -> list[list[list[object]]]:
    """The table of a kind as plain data. Raises ValueError where impl refuses."""
    found = build_schedule(kind, pp=layout.pp, vpp=layout.vpp, microbatches=microbatches)
    return found.to_plain()


@dataclass(frozen=True)
class _Chunk:
    """Layers x + tanh(x weight^T + bias) / 2."""

    weights: Sequence[Parameter]
    biases: Sequence[Parameter]

    def __call__(self, x: Tensor, microbatch: int) -> Tensor:
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = x + (linear(x, weight) + bias).tanh() / 2
        return x

    def gradients(self) -> dict[str, Tensor]:
        """Those of the layers, stacked, by the name of the stack; a frozen stack has none unless
        one of its parameters was given one."""
        found = {}
        for name, stack in (("weight", self.weights), ("bias", self.biases)):
            if any(each.requires_grad or each.grad is not None for each in stack):
                found[name] = torch.stack([_gradient(each) for each in stack])
        return found


class PipelineSubject:
    """The chunks of one stage; their layers lie in `weight` and `bias`, chunk after chunk."""

    def __init__(self, case: Case, groups: Groups) -> None:
        pp, vpp = groups.size("pp"), case.layout.vpp
        layers, hidden = case.shape["layers"], case.shape["hidden"]
        if layers % (pp * vpp):
            raise ValueError(
                f"layers: {layers} do not divide by the {pp * vpp} chunks of pp={pp} and vpp={vpp}"
            )
        self.case, self.groups, self.each = case, groups, layers // (pp * vpp)
        dtype = getattr(torch, case.dtype)
        self.link = Link(groups.pp, dtype=dtype)
        self.rounds = int(case.options.get("rounds", 1) or 1)
        self.schedule = self._schedule(case.shape["microbatches"])
        local = layers // pp
        weight = torch.full((local, hidden, hidden), torch.nan, dtype=dtype)
        self.weight = Parameter(weight, not case.options.get("frozen_weight", False))
        self.bias = Parameter(torch.full((local, hidden), torch.nan, dtype=dtype))
        self._of_frozen: Tensor | None = None

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
        complete: list[dict[str, Tensor]] = [{} for _ in chunks]
        count = x.shape[0] // self.rounds
        grad_x = torch.zeros_like(x)
        outputs = {"losses": x.new_zeros(x.shape[0])}
        tables = {"losses": self.schedule}
        if self.case.options.get("evaluated", False):
            outputs["evaluation"] = x.new_zeros(x.shape[0])
            sizes = {"pp": self.schedule.pp, "vpp": self.schedule.vpp}
            tables = {"evaluation": forward_only(**sizes, microbatches=count), **tables}

        def finished(chunk: int) -> None:
            complete[chunk] = chunks[chunk].gradients()

        for first in range(0, x.shape[0], count):
            run = self._run_of(chunks, x, targets, first)
            for name, table in tables.items():
                outcome = Executor(table, finished=finished, **run).run()
                for i, loss in outcome.losses.items():
                    outputs[name][first + i] = loss
                for i, gradient in outcome.input_gradients.items():
                    grad_x[first + i, : gradient.shape[0]] = gradient
        names = [name for name in ("weight", "bias") if all(name in each for each in complete)]
        own = {name: torch.cat([each[name] for each in complete]) for name in names}
        self._of_frozen = own.get("weight")
        return outputs, [grad_x, own.get("weight"), own.get("bias")]

    def _schedule(self, microbatches: int) -> Schedule:
        vpp = self.case.layout.vpp
        kind = str(self.case.options.get("schedule", "default"))
        if kind == "default":
            kind = "interleaved" if vpp > 1 else "1f1b"
        if microbatches % self.rounds:
            raise ValueError(f"rounds: {self.rounds} do not divide {microbatches} microbatches")
        count = microbatches // self.rounds
        return build_schedule(kind, pp=self.groups.size("pp"), vpp=vpp, microbatches=count)

    def _chunk(self, chunk: int) -> _Chunk:
        """The layers of one chunk, in the memory of the stacks."""
        own = slice(chunk * self.each, (chunk + 1) * self.each)
        weights = [Parameter(each, self.weight.requires_grad) for each in self.weight.detach()[own]]
        return _Chunk(weights, [Parameter(each) for each in self.bias.detach()[own]])

    def _run_of(
        self, chunks: Sequence[_Chunk], x: Tensor, targets: Tensor, first: int
    ) -> dict[str, Any]:
        """The arguments of `Executor` for the microbatches from `first`."""
        lengths = lengths_of(self.case)[first : first + x.shape[0] // self.rounds]
        taken = [x[first + i, :length].detach() for i, length in enumerate(lengths)]
        variable = self.case.options.get("variable", False)

        def loss(y: Tensor, microbatch: int) -> Tensor:
            target = targets[first + microbatch, : lengths[microbatch]]
            return (y - target).square().mean()

        return {
            "stage": Stage(
                chunks=chunks,
                parameters=[(*chunk.weights, *chunk.biases) for chunk in chunks],
                loss=loss,
            ),
            "link": self.link,
            "inputs": [each.requires_grad_() for each in taken],
            "scale": 1 / x.shape[0],
            "shape": None if variable else tuple(x.shape[1:]),
            "overlap": bool(self.case.options.get("overlap", True)),
        }


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


def pipeline(case: Case, groups: Groups) -> PipelineSubject:
    """A stack of layers over the pipeline group."""
    return PipelineSubject(case, groups)


BUILDERS: Mapping[str, Any] = {"pipeline": pipeline}
