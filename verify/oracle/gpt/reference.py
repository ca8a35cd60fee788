"""A GPT on one device, and steps of its training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from verify.oracle.context import Sequences, attention_mask
from verify.oracle.contract import Tensors
from verify.oracle.dropout import dropped
from verify.oracle.gpt.dropouts import kept_of
from verify.oracle.gpt.model import Model, layer_case
from verify.oracle.gpt.parameters import Stack
from verify.oracle.gpt.routers import Routers
from verify.oracle.layer import attention_of
from verify.oracle.mlp import mlp_of
from verify.oracle.moe.layer import experts_of, shared_of
from verify.oracle.moe.router import sum_of_products
from verify.oracle.training_plan import FACTORS, Plan, Scale, clipped, optimizer_of


@dataclass(frozen=True)
class ModelPlan(Plan):
    """A plan whose parameter groups are those of a whole model. Frozen is every stack with the word
    in its name."""

    def group_of(self, name: str) -> int:
        """Of several groups: the second linears, then biases and norms, then the rest."""
        if self.groups == "one":
            return 0
        if name.endswith("fc2.weight"):
            return 1
        return 2 if name.endswith("bias") or "norm" in name else 0

    def is_frozen(self, name: str) -> bool:
        """Whether a stack is not trained."""
        return bool(self.frozen) and self.frozen in name


@dataclass(frozen=True)
class Training:
    """A model, its stacks of parameters, and how it is trained."""

    model: Model
    stacks: Mapping[str, Stack]
    plan: ModelPlan
    rates: list[float]

    def run(self, inputs: Tensors, given: Tensors) -> Tensors:
        """All steps: what is told of each, stacked."""
        return self._run(inputs, given, Routers())

    def is_in_doubt(self, inputs: Tensors, given: Tensors) -> bool:
        """Whether rounding might turn what a router decides, in any step."""
        routers = Routers(asked=True)
        self._run(inputs, given, routers)
        return routers.in_doubt

    def _run(self, inputs: Tensors, given: Tensors, routers: Routers) -> Tensors:
        wide = torch.promote_types(next(iter(given.values())).dtype, torch.float32)
        frozen = {name: each for name, each in given.items() if self.plan.is_frozen(name)}
        main = {n: each.to(wide, copy=True) for n, each in given.items() if n not in frozen}
        optimizer, scale, updates = optimizer_of(self.plan, main), Scale(self.plan), 0
        told: dict[str, list[Tensor]] = {}
        for step in range(len(inputs["tokens"])):
            model = {n: main.get(n, each).to(each.dtype, copy=True) for n, each in given.items()}
            losses, gradients = self._gradients(step, inputs, model, main, scale, routers)
            factors = [self.rates[updates] * factor for factor, _ in FACTORS[self.plan.groups]]
            skipped = step + 1 == self.plan.overflow
            if skipped:
                gradients = {name: torch.zeros_like(each) for name, each in gradients.items()}
            found = {f"gradient {name}": each.clone() for name, each in gradients.items()}
            norm = clipped(list(gradients.values()), self.plan)
            if not skipped:
                _update(optimizer, main, gradients, factors)
                updates += 1
            found |= {f"new {n}": main.get(n, p).to(p.dtype, copy=True) for n, p in given.items()}
            report = {"loss": losses[0], "scale": scale.value, "rates": factors}
            report |= {"further": losses[1:]} if self.model.depths else {}
            found |= {n: torch.as_tensor(v, dtype=torch.float64) for n, v in report.items()}
            found["norm"] = norm
            if self.model.case.options.get("evaluated", False):
                found["evaluation"] = self._evaluated(step, inputs, found, routers)
            found["skipped"] = torch.tensor(float(skipped), dtype=torch.float64)
            scale.after(overflow=skipped)
            for name, value in found.items():
                told.setdefault(name, []).append(value)
        return {name: torch.stack(values) for name, values in told.items()}

    def _gradients(
        self,
        step: int,
        inputs: Tensors,
        model: dict[str, Tensor],
        main: Tensors,
        scale: Scale,
        routers: Routers,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss and those of further tokens, in float64, and the gradients of what is
        trained, wide and unscaled."""
        leaves = {name: model[name].requires_grad_() for name in main}
        sums = {name: torch.zeros_like(main[name]) for name in leaves}
        losses = torch.zeros(1 + self.model.depths, dtype=torch.float64)
        count, microbatches = _count(inputs, step), inputs["tokens"].shape[1]
        for microbatch in range(microbatches):
            own = self._losses((step, microbatch), inputs, model, routers, training=True)
            total = own[0]
            if self.model.depths:
                total = total + self.model.scaling * own[1:].mean()
            # The mean over microbatches, beside a sum over tokens that is to be divided.
            total = total + routers.added_losses() * count / microbatches
            found = torch.autograd.grad(total * scale.value, list(leaves.values()))
            for name, each in zip(leaves, found, strict=True):
                sums[name] += each
            losses += own.detach().double()
        return losses / count, {name: each / (count * scale.value) for name, each in sums.items()}

    def _evaluated(self, step: int, inputs: Tensors, found: Tensors, routers: Routers) -> Tensor:
        """The mean loss of the same data after the step, without dropout."""
        model = {name: found[f"new {name}"] for name in self.stacks}
        with torch.no_grad():
            losses = [
                self._losses((step, m), inputs, model, routers, training=False)[0].double()
                for m in range(inputs["tokens"].shape[1])
            ]
        # Of those nothing is told.
        routers.added_losses()
        return torch.stack(losses).sum() / _count(inputs, step)

    def _losses(
        self,
        at: tuple[int, int],
        inputs: Tensors,
        weights: Tensors,
        routers: Routers,
        *,
        training: bool,
    ) -> Tensor:
        """Sums over the tokens of a microbatch that count: of the loss, and in training of that of
        the token 1, 2, ... further on. What `routers` add is left with them."""
        kept = kept_of(inputs, at) if training else {}
        tokens, targets, mask = (
            inputs[n][at].transpose(0, 1) for n in ("tokens", "targets", "mask")
        )
        sequences = self.model.sequences_in(at[1])
        h = self._hidden(tokens, weights, kept, routers, sequences)
        last = {n: each[0] for n, each in weights.items() if n.startswith("final_norm.")}
        states = self.model.layer.normalised(h, last, "final_norm.")
        sums = [self._sum(states, weights, targets, mask)]
        for depth in range(self.model.depths if training else 0):
            own = _members(weights, self.stacks, "multi_token.", depth)
            before = states if self.model.normalised else h
            h = self._further(before, tokens, depth, own, weights, kept, routers, sequences)
            places, inside = sequences.ahead(depth + 1)
            states = self.model.layer.normalised(h, own, "final_norm.")
            counts = mask[places] * inside[:, None]
            sums.append(self._sum(states, weights, targets[places], counts))
        return torch.stack(sums)

    def _hidden(
        self,
        tokens: Tensor,
        weights: Tensors,
        kept: Tensors,
        routers: Routers,
        sequences: Sequences,
    ) -> Tensor:
        """[sequence, batch, hidden] of tokens [sequence, batch], after the last layer."""
        model = self.model
        x = F.embedding(tokens, weights["embedding.tokens.weight"][0])
        if model.positions == "learned":
            x = x + weights["embedding.positions.weight"][0, sequences.positions, None]
        x = dropped(x, kept.get("embedding"), model.layer.hidden_dropout)
        for layer in range(model.case.shape["layers"]):
            own = _members(weights, self.stacks, "layers.", layer)
            x = _layer(x, model, own, _masks(kept, layer), routers, sequences)
        return x

    def _further(
        self,
        h: Tensor,
        tokens: Tensor,
        depth: int,
        own: Tensors,
        weights: Tensors,
        kept: Tensors,
        routers: Routers,
        sequences: Sequences,
    ) -> Tensor:
        """The hidden states of a depth, counted from 0, of those before it: arXiv:2412.19437,
        equations 21 and 22. At the end of a sequence there is no token to look up, and zeros
        instead."""
        model, (places, inside) = self.model, sequences.ahead(depth + 1)
        embedded = F.embedding(tokens[places], weights["embedding.tokens.weight"][0])
        embedded = embedded.masked_fill(~inside[:, None, None], 0.0)
        embedded = model.layer.normalised(embedded, own, "embedding_norm.")
        normal = model.layer.normalised(h, own, "hidden_norm.")
        x = F.linear(torch.cat([normal, embedded], dim=-1), own["weight"])
        inner = {n.removeprefix("layer."): w for n, w in own.items() if n.startswith("layer.")}
        masks = _masks(kept, model.case.shape["layers"] + depth)
        return _layer(x, model, inner, masks, routers, sequences)

    def _sum(self, states: Tensor, weights: Tensors, targets: Tensor, mask: Tensor) -> Tensor:
        """The sum of the cross entropies of normalised states, each times its mask."""
        name = "embedding.tokens.weight" if self.model.tied else "output.weight"
        logits = F.linear(states, weights[name][0])
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        real = self.model.case.shape["vocabulary"]
        losses = F.cross_entropy(wide[..., :real].movedim(-1, 1), targets, reduction="none")
        return (losses * mask).sum()


def _update(
    optimizer: torch.optim.Optimizer, main: Tensors, gradients: Tensors, rates: list[float]
) -> None:
    for name, leaf in main.items():
        leaf.grad = gradients[name]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.step()


def _count(inputs: Tensors, step: int) -> Tensor:
    return inputs["mask"][step].sum().clamp_min(1)


def _members(
    weights: Tensors, stacks: Mapping[str, Stack], prefix: str, member: int
) -> dict[str, Tensor]:
    """What one layer, or one depth, has of the stacks that begin with a prefix."""
    return {
        name.removeprefix(prefix): weights[name][stack.members.index(member)]
        for name, stack in stacks.items()
        if name.startswith(prefix) and member in stack.members
    }


def _masks(kept: Tensors, layer: int) -> dict[str, Tensor]:
    prefix = f"{layer}."
    return {n.removeprefix(prefix): m for n, m in kept.items() if n.startswith(prefix)}


def _layer(
    x: Tensor,
    model: Model,
    weights: Tensors,
    masks: Tensors,
    routers: Routers,
    sequences: Sequences,
) -> Tensor:
    layer, p = model.layer, model.layer.hidden_dropout
    normal = layer.normalised(x, weights, "input_norm.")
    mask = attention_mask(layer_case(model.case))
    out = attention_of(normal, masks, weights, layer, sequences, mask)
    h = x + dropped(out, masks.get("attended"), p)
    normal = layer.normalised(h, weights, "mlp_norm.")
    if "mlp.router.weight" in weights:
        fed = _routed(normal, model, weights, routers)
    else:
        fed = mlp_of(normal, weights, "mlp.", layer.activation)
    return h + dropped(fed, masks.get("fed"), p)


def _routed(x: Tensor, model: Model, weights: Tensors, routers: Routers) -> Tensor:
    assert model.rule is not None
    own = {n.removeprefix("mlp."): w for n, w in weights.items() if n.startswith("mlp.")}
    gated = model.layer.activation == "swiglu"
    shares = routers.shares(x, own["router.weight"], model.rule)
    y = sum_of_products(shares, experts_of(x, own, gated=gated), x)
    return y + shared_of(x, own, gated=gated) if "shared.fc1.weight" in own else y
