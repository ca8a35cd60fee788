"""The contract of training: steps of accumulated gradients, clipped, applied by an optimizer.

The model is y = z + experts(z) with z = x + mlp(rmsnorm(x)), the loss of a token half the mean
square of y - wanted, and that of a step the mean over the tokens of all rounds and ranks that the
mask lets count; of none, zero. Means of means would be something else where ranks or rounds have
unequal numbers of them. z may have a second rmsnorm(x), the spare one, in some rounds only: from
the others its gradient is zero, and every step updates it.

Whatever the dtype of the model, losses and what becomes of gradients are computed in float32, of
float64 in float64: gradients add up there, and parameters are rounded copies of ones kept there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from verify.case import Case
from verify.errors import BadArgument
from verify.oracle.contract import Contract, Tensors, TensorSpec
from verify.oracle.learning_rates import rates_of
from verify.oracle.mlp import mlp_of
from verify.oracle.moe.rules import AXES
from verify.oracle.norm import normalised
from verify.oracle.terms import sizes, whole_number
from verify.oracle.training_plan import FACTORS, Plan, Scale, clipped, optimizer_of, plan_of
from verify.placement import Partial, Placements, Shard

_PLACED: Mapping[str, Placements] = {
    "norm.weight": {},
    "spare.weight": {},
    "mlp.fc1.weight": {"tp": Shard(1)},
    "mlp.fc1.bias": {"tp": Shard(1)},
    "mlp.fc2.weight": {"tp": Shard(2)},
    "mlp.fc2.bias": {},
    "experts.fc1.weight": {"ep": Shard(1), "etp": Shard(2)},
    "experts.fc2.weight": {"ep": Shard(1), "etp": Shard(3)},
}


def training_steps(case: Case) -> Contract:
    """x, wanted [steps, rounds, sequence, batch, hidden] and mask [steps, rounds, sequence, batch]:
    tokens Shard over cp along the sequence and over dp along the batch; of x also over tp along the
    sequence with sequence parallelism. With `experts` in the shape, choice (like x) is the expert
    of every token. `overflow` [steps, dp, cp, tp] is 1 for a rank that multiplies its scaled loss,
    not the reported one, by infinity.

    Of every step: `loss`, `norm` of all gradients before clipping, `scale` of the loss, `skipped`,
    and the learning `rates` of all parameter groups, on every rank; `gradient NAME` of every
    trained parameter after finalisation, before clipping and without the loss scale, and `new NAME`
    after the step; of the spare norm after the last step only, because nothing has to wait for it
    until it is read or training ends. A skipped step reports a norm and gradients of zero, and
    leaves everything but the scale as it was. A gradient lies as its parameter does, the first
    dimension being the step; with `distributed` it is the sum over dp and cp, of experts over edp,
    of shards with zeros around them. Afterwards no parameter has a `grad`.

    Options: those of `learning_rates`; `optimizer`, sgd or adam (torch's SGD and AdamW), its
    `momentum` and `weight_decay`; `clip`, the largest norm, and its order `norm`; `groups`, one or
    several with learning rates and decay of their own; `frozen`, the beginning of the names that
    are; `spare`: there is a second norm, read never, in the first_round of every step, or in all
    rounds of odd_steps, counted from 1; `loss_scale` static or dynamic, its `hysteresis` and
    `minimum_scale`, and the step that is to `overflow`. What changes no number: `distributed`;
    `overlap`, with which reductions of gradients over dp begin within backward passes, from the
    second step on; `bucket`, in elements. Without `distributed` and experts, a bucket has fewer
    than that and those of the largest gradient together, and a step at most twice as many buckets
    as its elements fill, and two more for each optimizer group each time that it reduces. See
    `verify.checks.traffic`.
    """
    names = ("steps", "rounds", "sequence", "batch", "hidden", "ffn")
    steps, rounds, sequence, batch, hidden, ffn = sizes(case, *names, optional=("experts",))
    experts, layout = case.shape.get("experts", 0), case.layout
    _check(case, sequence * batch, experts)
    plan = plan_of(case, steps)
    rates = rates_of(case, steps)
    shapes = _shapes(hidden, ffn, experts, spare=bool(plan.spare))
    tokens: Placements = {"cp": Shard(2), "dp": Shard(3)}
    placed = {**tokens, "tp": Shard(2)} if layout.sequence_parallel else tokens
    shape = (steps, rounds, sequence, batch)
    marked = (steps, layout.dp, layout.cp, layout.tp)
    at = [0] * (steps * layout.dp * layout.cp * layout.tp)
    if plan.overflow:
        at[plan.overflow * (len(at) // steps) - 1] = 1
    inputs = {
        "x": TensorSpec((*shape, hidden), placed, None),
        "wanted": TensorSpec((*shape, hidden), tokens, None),
        "mask": TensorSpec(shape, tokens, None, high=2),
        "overflow": TensorSpec(
            marked,
            {"dp": Shard(1), "cp": Shard(2), "tp": Shard(3)},
            None,
            values=tuple(at),
        ),
    }
    if experts:
        inputs["choice"] = TensorSpec(shape, placed, None, high=experts)
    return Contract(
        axes=AXES,
        inputs=inputs,
        parameters=shapes,
        outputs=_outputs(plan, steps, shapes),
        reference=lambda inputs, parameters: _train(inputs, parameters, plan, rates),
        frozen=frozenset(shapes),
        abrupt=plan.optimizer == "adam",
        bucket=None if experts or plan.distributed else whole_number(case, "bucket", least=1),
    )


def _check(case: Case, tokens: int, experts: int) -> None:
    layout = case.layout
    if layout.pp > 1:
        raise BadArgument(f"case.layout: {layout} has pp={layout.pp}; training_steps has one stage")
    if not experts and (layout.ep > 1 or layout.expert_tp != layout.tp):
        raise BadArgument(f"case.layout: {layout} splits experts, of which the case has none")
    if experts and not layout.sequence_parallel and tokens % (layout.dp * layout.cp * layout.tp):
        raise BadArgument(
            f"case.shape.sequence: {tokens} tokens do not divide by {layout.dp * layout.cp} ranks"
            f" of dp and cp, and these by tp={layout.tp} to be given to experts"
        )


def _shapes(hidden: int, ffn: int, experts: int, *, spare: bool) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "norm.weight": (hidden,),
        "mlp.fc1.weight": (ffn, hidden),
        "mlp.fc1.bias": (ffn,),
        "mlp.fc2.weight": (hidden, ffn),
        "mlp.fc2.bias": (hidden,),
    }
    if spare:
        found["spare.weight"] = (hidden,)
    if experts:
        found["experts.fc1.weight"] = (experts, ffn, hidden)
        found["experts.fc2.weight"] = (experts, hidden, ffn)
    return found


def _outputs(
    plan: Plan, steps: int, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorSpec]:
    """Causes first: the losses of all steps but the first depend on all the rest."""
    told = TensorSpec((steps,), grad_placements=None)
    found = {"scale": told, "skipped": told}
    found["rates"] = TensorSpec((steps, len(FACTORS[plan.groups])), grad_placements=None)
    for name, shape in shapes.items():
        if plan.is_frozen(name):
            continue
        copies = ("edp",) if name.startswith("experts") else ("dp", "cp")
        summed = {axis: Partial() for axis in copies} if plan.distributed else {}
        placed = {**_PLACED[name], **summed}
        found[f"gradient {name}"] = TensorSpec((steps, *shape), placed, None)
    for name, shape in shapes.items():
        times = 1 if name == "spare.weight" else steps
        found[f"new {name}"] = TensorSpec((times, *shape), _PLACED[name], None)
    return {**found, "norm": told, "loss": told}


def _train(inputs: Tensors, given: Tensors, plan: Plan, rates: list[float]) -> Tensors:
    """All steps on one device."""
    wide = torch.promote_types(inputs["x"].dtype, torch.float32)
    main = {n: p.to(wide, copy=True) for n, p in given.items() if not plan.is_frozen(n)}
    optimizer, scale, updates = optimizer_of(plan, main), Scale(plan), 0
    told: dict[str, list[Tensor]] = {}
    for step in range(len(inputs["x"])):
        model = {n: main[n].to(p.dtype, copy=True) if n in main else p for n, p in given.items()}
        mine = {name: each[step] for name, each in inputs.items()}
        read = [plan.reads_spare(step, round_) for round_ in range(len(mine["x"]))]
        loss, gradients = _gradients(mine, model, main, scale, read)
        skipped = step + 1 == plan.overflow
        factors = [rates[updates] * factor for factor, _ in FACTORS[plan.groups]]
        report = {"loss": loss, "scale": scale.value, "skipped": skipped, "rates": factors}
        if skipped:
            gradients = {name: torch.zeros_like(each) for name, each in gradients.items()}
        found = {f"gradient {name}": each.clone() for name, each in gradients.items()}
        norm = clipped(list(gradients.values()), plan)
        if not skipped:
            for name, leaf in main.items():
                leaf.grad = gradients[name]
            for group, rate in zip(optimizer.param_groups, factors, strict=True):
                group["lr"] = rate
            optimizer.step()
            updates += 1
        scale.after(overflow=skipped)
        found |= {f"new {n}": main.get(n, p).to(p.dtype, copy=True) for n, p in given.items()}
        found |= {n: torch.as_tensor(v, dtype=torch.float64) for n, v in report.items()}
        for name, value in {**found, "norm": norm}.items():
            told.setdefault(name, []).append(value)
    if plan.spare:
        del told["new spare.weight"][:-1]
    return {name: torch.stack(values) for name, values in told.items()}


def _gradients(
    inputs: Tensors, model: dict[str, Tensor], main: Tensors, scale: Scale, read: list[bool]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step in float64, and the gradients of what is trained, wide and unscaled.
    `read` tells which rounds read the spare norm."""
    leaves = {name: model[name].requires_grad_() for name in main}
    sums = {name: torch.zeros_like(each) for name, each in main.items()}
    loss, count = torch.zeros((), dtype=torch.float64), inputs["mask"].sum().clamp_min(1)
    for round_ in range(len(inputs["x"])):
        mine = {n: t[round_] for n, t in inputs.items() if n != "overflow"}
        y = _model(mine, model, spare=read[round_])
        away = (y - mine["wanted"]).to(next(iter(sums.values())).dtype)
        total = (0.5 * away.square().mean(-1) * mine["mask"]).sum()
        found = torch.autograd.grad(
            total * scale.value, list(leaves.values()), materialize_grads=True
        )
        for name, each in zip(leaves, found, strict=True):
            sums[name] += each
        loss = loss + total.detach().double()
    return loss / count, {name: each / (count * scale.value) for name, each in sums.items()}


def _model(inputs: Tensors, model: Tensors, *, spare: bool) -> Tensor:
    x, norm = inputs["x"], partial(normalised, kind="rms", zero_centered=False)
    y = x + mlp_of(norm(x, model, "norm."), model, "mlp.", "gelu")
    if spare:
        y = y + norm(x, model, "spare.")
    if "choice" not in inputs:
        return y
    out = torch.zeros_like(y)
    for expert in range(len(model["experts.fc1.weight"])):
        weights = {f"{n}.weight": model[f"experts.{n}.weight"][expert] for n in ("fc1", "fc2")}
        chosen = (inputs["choice"] == expert).unsqueeze(-1)
        out = out + mlp_of(y, weights, "", "gelu") * chosen
    return y + out
