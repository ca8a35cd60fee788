"""A stack of perceptron layers with dropout, whose activations may be computed again in backward.

    layer(x) = x + dropout(fc2(inner_dropout(gelu(fc1(x)))) + fc2.bias)

Recomputation changes no result: option `recompute` says what is computed again, as words joined by
dashes (`uniform-2-distributed`):

| first | what is computed again |
|---|---|
| `uniform-N` | all layers, N at a time |
| `block-N` | the first N layers, each for itself |
| `nested-N` | as `uniform-N`, and each layer of the N for itself again |
| `selective` | in each layer, what is between fc1 and fc2 |

`distributed` at the end: each rank keeps its part of every input that is kept. Section 5 of
arXiv:2205.05198 for selective and full recomputation; uniform, block and distributed are
Megatron-LM's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch.nn import functional as F

from verify.case import Case
from verify.errors import BadArgument
from verify.oracle.contract import Contract, Mask, Step, Tensors, TensorSpec
from verify.oracle.dropout import PROBABILITY, dropped, probability
from verify.oracle.terms import exclude, known_options, sizes
from verify.placement import Placements, Replicate, Shard

METHODS = ("uniform", "block", "nested", "selective")


@dataclass(frozen=True)
class Plan:
    """The words of option `recompute`, which may be none that mean anything."""

    method: str
    layers: int = 0
    distributed: bool = False


def plan_of(case: Case) -> Plan | None:
    """The case's plan of recomputation; None where nothing is computed again."""
    text = case.options.get("recompute")
    if text is None:
        return None
    words = str(text).split("-")
    distributed = words[-1] == "distributed"
    words = words[: len(words) - distributed]
    number = words[1] if len(words) > 1 else ""
    return Plan(words[0], int(number) if number.isdecimal() else 0, distributed)


def recomputed_block(case: Case) -> Contract:
    """Parameters `I.fc1.weight` [ffn, hidden] and `I.fc1.bias` Shard(0), `I.fc2.weight` [hidden,
    ffn] Shard(1) and `I.fc2.bias` Replicate over tp, of layer I from 0. x, y [sequence, batch,
    hidden] and gradients Replicate, or Shard(0) with sequence parallelism; the inner activation
    Shard(-1).

    Communicates as the perceptron does, in backward once more for every time that a layer runs
    again, and an all-gather for every input that is distributed. Where all layers are computed
    again autograd keeps their inputs only: one a run of layers, 1/tp of it where it is distributed
    or split by sequence parallelism.

    Raises BadArgument for a plan that is none, for more layers than there are, and for
    `distributed` with sequence parallelism or where the input's elements do not divide by tp.
    """
    known_options(case, "dropout", "inner_dropout", "recompute")
    sequence, batch, hidden, ffn, layers = sizes(
        case, "sequence", "batch", "hidden", "ffn", "layers"
    )
    shape, tp = (sequence, batch, hidden), case.layout.tp
    split = case.layout.sequence_parallel
    placed: Placements = {"tp": Shard(0) if split else Replicate()}
    p, inner = probability(case, "dropout", PROBABILITY), probability(case, "inner_dropout", 0.0)
    plan = plan_of(case)
    if plan is not None:
        _check(case, plan, elements=sequence * batch * hidden, layers=layers)
    parameters: dict[str, tuple[int, ...]] = {}
    masks: dict[str, Mask] = {}
    for i in range(layers):
        parameters |= {f"{i}.fc1.weight": (ffn, hidden), f"{i}.fc1.bias": (ffn,)}
        parameters |= {f"{i}.fc2.weight": (hidden, ffn), f"{i}.fc2.bias": (hidden,)}
        inside = Mask((sequence, batch, ffn), {"tp": Shard(-1)}, inner)
        masks |= {f"{i}.inner": inside} if inner else {}
        masks |= {f"{i}.hidden": Mask(shape, placed, p)} if p else {}
    elements = sequence * batch * hidden
    forward, backward = _steps(elements, tp=tp, split=split)
    again, kept = _recomputed(plan, layers)
    part = elements // tp
    gathers = kept if plan is not None and plan.distributed else 0
    return Contract(
        inputs={"x": TensorSpec(shape, placed, placed)},
        parameters=parameters,
        outputs={"y": TensorSpec(shape, placed, placed)},
        reference=partial(_reference, layers=layers, p=p, inner=inner),
        divided={"ffn": ffn},
        masks=masks,
        forward=forward * layers,
        backward=(
            *(backward * layers),
            *(forward * again),
            *((Step("all_gather", "tp", part),) * gathers),
        ),
        kept=kept * (part if split or gathers else elements) if again >= layers else None,
    )


def _steps(elements: int, *, tp: int, split: bool) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """What a layer communicates in forward and in backward."""
    if not split:
        return (Step("all_reduce", "tp", elements),), (Step("all_reduce", "tp", elements),)
    gather = Step("all_gather", "tp", elements // tp)
    scatter = Step("reduce_scatter", "tp", elements)
    # The gradient of y and, for the gradient of fc1.weight, x again are gathered.
    return (gather, scatter), (gather, gather, scatter)


def _recomputed(plan: Plan | None, layers: int) -> tuple[int, int]:
    """How often backward runs a layer again, and how many inputs are kept for that."""
    if plan is None or plan.method == "selective":
        return 0, 0
    if plan.method == "block":
        return plan.layers, plan.layers
    runs = -(-layers // plan.layers)
    return layers * (2 if plan.method == "nested" else 1), runs


def _check(case: Case, plan: Plan, *, elements: int, layers: int) -> None:
    text = case.options["recompute"]
    if plan.method not in METHODS:
        raise BadArgument(f"case.options.recompute: {text!r} is not one of {', '.join(METHODS)}")
    if plan.method == "selective":
        if plan.layers or plan.distributed:
            raise BadArgument(f"case.options.recompute: {text!r}; selective has no further words")
        return
    if not 1 <= plan.layers <= layers:
        raise BadArgument(
            f"case.options.recompute: {text!r} of layers={layers}, give 1 to {layers}"
        )
    if plan.distributed and case.layout.sequence_parallel:
        exclude(case, "recompute", text, why="sequence parallelism splits the inputs already")
    if plan.distributed and elements % case.layout.tp:
        exclude(case, "recompute", text, why=f"inputs of {elements} elements do not divide by tp")


def _reference(
    inputs: Tensors, parameters: Tensors, *, layers: int, p: float, inner: float
) -> Tensors:
    x = inputs["x"]
    for i in range(layers):
        own = {name: parameters[f"{i}.{name}"] for name in ("fc1.weight", "fc1.bias")}
        middle = F.gelu(F.linear(x, own["fc1.weight"], own["fc1.bias"]))
        middle = dropped(middle, inputs.get(f"{i}.inner"), inner)
        out = F.linear(middle, parameters[f"{i}.fc2.weight"]) + parameters[f"{i}.fc2.bias"]
        x = x + dropped(out, inputs.get(f"{i}.hidden"), p)
    return {"y": x}
