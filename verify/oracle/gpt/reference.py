"""A GPT on one device, and steps of its training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from verify.oracle.context import attention_mask
from verify.oracle.contract import Tensors
from verify.oracle.dropout import dropped
from verify.oracle.gpt.dropouts import kept_of
from verify.oracle.gpt.model import Model, layer_case
from verify.oracle.gpt.parameters import Stack
from verify.oracle.mlp import mlp_of
from verify.oracle.moe.layer import experts_of, shared_of
from verify.oracle.moe.router import sum_of_products
from verify.oracle.moe.routing import logits_of, route
from verify.oracle.training_plan import FACTORS, Plan, Scale, clipped, optimizer_of
from verify.oracle.transformer import attention_of


@dataclass(frozen=True)
class ModelPlan(Plan):
    """A plan whose parameter groups are those of a whole model."""

    def group_of(self, name: str) -> int:
        """Of several groups: the second linears, then biases and norms, then the rest."""
        if self.groups == "one":
            return 0
        if name.endswith("fc2.weight"):
            return 1
        return 2 if name.endswith("bias") or "norm" in name else 0


@dataclass(frozen=True)
class Training:
    """A model, its stacks of parameters, and how it is trained."""

    model: Model
    stacks: Mapping[str, Stack]
    plan: ModelPlan
    rates: list[float]

    def run(self, inputs: Tensors, given: Tensors) -> Tensors:
        """All steps: what is told of each, stacked."""
        wide = torch.promote_types(next(iter(given.values())).dtype, torch.float32)
        main = {name: each.to(wide, copy=True) for name, each in given.items()}
        optimizer, scale = optimizer_of(self.plan, main), Scale(self.plan)
        told: dict[str, list[Tensor]] = {}
        for step in range(len(inputs["tokens"])):
            model = {name: main[name].to(each.dtype, copy=True) for name, each in given.items()}
            loss, gradients = self._gradients(step, inputs, model, main, scale)
            factors = [self.rates[step] * factor for factor, _ in FACTORS[self.plan.groups]]
            found = {f"gradient {name}": each.clone() for name, each in gradients.items()}
            norm = clipped(list(gradients.values()), self.plan)
            for name, leaf in main.items():
                leaf.grad = gradients[name]
            for group, rate in zip(optimizer.param_groups, factors, strict=True):
                group["lr"] = rate
            optimizer.step()
            found |= {f"new {n}": main[n].to(p.dtype, copy=True) for n, p in given.items()}
            report = {"loss": loss, "scale": scale.value, "rates": factors}
            found |= {n: torch.as_tensor(v, dtype=torch.float64) for n, v in report.items()}
            found["norm"] = norm
            if self.model.case.options.get("evaluated", False):
                found["evaluation"] = self._evaluated(step, inputs, found)
            scale.after(overflow=False)
            for name, value in found.items():
                told.setdefault(name, []).append(value)
        return {name: torch.stack(values) for name, values in told.items()}

    def _gradients(
        self, step: int, inputs: Tensors, model: dict[str, Tensor], main: Tensors, scale: Scale
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss in float64, and its gradients, wide and unscaled."""
        leaves = {name: each.requires_grad_() for name, each in model.items()}
        sums = {name: torch.zeros_like(main[name]) for name in leaves}
        loss, count = torch.zeros((), dtype=torch.float64), _count(inputs, step)
        for microbatch in range(inputs["tokens"].shape[1]):
            total = self._loss((step, microbatch), inputs, leaves, training=True)
            found = torch.autograd.grad(total * scale.value, list(leaves.values()))
            for name, each in zip(leaves, found, strict=True):
                sums[name] += each
            loss = loss + total.detach().double()
        return loss / count, {n: each / (count * scale.value) for n, each in sums.items()}

    def _evaluated(self, step: int, inputs: Tensors, found: Tensors) -> Tensor:
        """The mean loss of the same data after the step, without dropout."""
        model = {name: found[f"new {name}"] for name in self.stacks}
        with torch.no_grad():
            losses = [
                self._loss((step, m), inputs, model, training=False).double()
                for m in range(inputs["tokens"].shape[1])
            ]
        return torch.stack(losses).sum() / _count(inputs, step)

    def _loss(
        self, at: tuple[int, int], inputs: Tensors, weights: Tensors, *, training: bool
    ) -> Tensor:
        """The sum of the losses of a microbatch's tokens that count."""
        kept = kept_of(inputs, at) if training else {}
        real = self.model.case.shape["vocabulary"]
        logits = _logits(inputs["tokens"][at], self.model, self.stacks, weights, kept)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = inputs["targets"][at].transpose(0, 1)
        losses = F.cross_entropy(wide[..., :real].movedim(-1, 1), targets, reduction="none")
        return (losses * inputs["mask"][at].transpose(0, 1)).sum()


def _count(inputs: Tensors, step: int) -> Tensor:
    return inputs["mask"][step].sum().clamp_min(1)


def _logits(
    tokens: Tensor, model: Model, stacks: Mapping[str, Stack], weights: Tensors, kept: Tensors
) -> Tensor:
    """[sequence, batch, padded vocabulary] of tokens [batch, sequence]."""
    p = model.layer.hidden_dropout
    table = weights["embedding.tokens.weight"][0]
    x = F.embedding(tokens.transpose(0, 1), table)
    if model.positions == "learned":
        x = x + weights["embedding.positions.weight"][0, : len(x), None]
    x = dropped(x, kept.get("embedding"), p)
    for layer in range(model.case.shape["layers"]):
        own = {
            name.removeprefix("layers."): weights[name][stack.members.index(layer)]
            for name, stack in stacks.items()
            if name.startswith("layers.") and layer in stack.members
        }
        prefix = f"{layer}."
        masks = {n.removeprefix(prefix): m for n, m in kept.items() if n.startswith(prefix)}
        x = _layer(x, model, own, masks)
    last = {n: each[0] for n, each in weights.items() if n.startswith("final_norm.")}
    x = model.layer.normalised(x, last, "final_norm.")
    return F.linear(x, table if model.tied else weights["output.weight"][0])


def _layer(x: Tensor, model: Model, weights: Tensors, masks: Tensors) -> Tensor:
    layer, p = model.layer, model.layer.hidden_dropout
    normal = layer.normalised(x, weights, "input_norm.")
    mask = attention_mask(layer_case(model.case))
    out = attention_of(normal, masks, weights, layer, model.sequences, mask)
    h = x + dropped(out, masks.get("attended"), p)
    normal = layer.normalised(h, weights, "mlp_norm.")
    if "mlp.router.weight" in weights:
        fed = _routed(normal, model, weights)
    else:
        fed = mlp_of(normal, weights, "mlp.", layer.activation)
    return h + dropped(fed, masks.get("fed"), p)


def _routed(x: Tensor, model: Model, weights: Tensors) -> Tensor:
    assert model.rule is not None
    own = {n.removeprefix("mlp."): w for n, w in weights.items() if n.startswith("mlp.")}
    gated = model.layer.activation == "swiglu"
    _, shares = route(logits_of(x, own["router.weight"]), model.rule)
    y = sum_of_products(shares, experts_of(x, own, gated=gated), x)
    return y + shared_of(x, own, gated=gated) if "shared.fc1.weight" in own else y
