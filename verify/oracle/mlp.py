"""The feed-forward block split over tp, and its activations.

    y = activation(x fc1^T + b1) fc2^T + b2               gelu (the exact one), squared_relu
    y = (activation(gate) * up) fc2^T + b2                swiglu (silu), geglu (gelu)

Section 3 of arXiv:1909.08053: a column-parallel layer, an activation, a row-parallel layer. Gates:
arXiv:2002.05202; squared relu: arXiv:2109.08668.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import functional as F

from verify.case import Case
from verify.oracle.contract import Contract, Step, Tensors, TensorSpec
from verify.oracle.terms import exclude, known_options, one_of, sizes, switches
from verify.placement import Placements, Replicate, Shard


def _squared_relu(x: Tensor) -> Tensor:
    return x.clamp_min(0) * x.clamp_min(0)


_PLAIN: Mapping[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "squared_relu": _squared_relu}
_GATES: Mapping[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu}
ACTIVATIONS = (*_PLAIN, *_GATES)
OPTIONS = ("bias", "activation", "packed")


def tp_mlp(case: Case) -> Contract:
    """fc1.weight [ffn, hidden] and fc1.bias Shard(0), fc2.weight [hidden, ffn] Shard(1), fc2.bias
    Replicate over tp. With a gate fc1 has 2 ffn rows, [gate | up], and each rank its part of either
    (stride 2); with packed=False fc1 is up, and gate.weight and gate.bias are like it.

    x, y and both gradients Replicate, or Shard(0) with sequence parallelism. Forward all-reduces
    the output and backward the gradient of x, once for each layer that takes x; with sequence
    parallelism an all-gather and a reduce-scatter take the place of each, and x is gathered again
    for the gradient of the weights.

    Raises BadArgument for packed=False without a gate.
    """
    known_options(case, *OPTIONS)
    sequence, batch, hidden, ffn = sizes(case, "sequence", "batch", "hidden", "ffn")
    activation = one_of(case, "activation", ACTIVATIONS)
    given = switches(case, {"bias": True, "packed": True})
    if not given["packed"] and activation not in _GATES:
        exclude(case, "packed", False, why="without a gate there is nothing to pack")
    parameters = mlp_parameters("", hidden=hidden, ffn=ffn, activation=activation, **given)
    layers = 1 if given["packed"] else 2
    shape, parallel = (sequence, batch, hidden), case.layout.sequence_parallel
    placed: Placements = {"tp": Shard(0) if parallel else Replicate()}
    forward, backward = mlp_steps(case, sequence * batch * hidden, layers=layers)
    finish = (Step("all_reduce", "tp", hidden),) if parallel and "fc2.bias" in parameters else ()
    x = sequence * batch * hidden // (case.layout.tp if parallel else 1)
    return Contract(
        inputs={"x": TensorSpec(shape, placed, placed)},
        parameters=parameters,
        outputs={"y": TensorSpec(shape, placed, placed)},
        reference=lambda inputs, given: {"y": mlp_of(inputs["x"], given, "", activation)},
        divided={"ffn": ffn},
        forward=forward,
        backward=backward,
        finish=finish,
        kept=x + sequence * batch * mlp_kept(case),
    )


def mlp_parameters(
    prefix: str, *, hidden: int, ffn: int, activation: str, bias: bool, packed: bool = True
) -> dict[str, tuple[int, ...]]:
    """The full shapes of the block's parameters, named with `prefix`."""
    rows = {"fc1": 2 * ffn if activation in _GATES and packed else ffn}
    rows |= {} if packed else {"gate": ffn}
    found: dict[str, tuple[int, ...]] = {
        f"{prefix}{n}.weight": (count, hidden) for n, count in rows.items()
    }
    found[f"{prefix}fc2.weight"] = (hidden, ffn)
    if bias:
        found |= {f"{prefix}{n}.bias": (count,) for n, count in rows.items()}
        found[f"{prefix}fc2.bias"] = (hidden,)
    return found


def mlp_of(x: Tensor, parameters: Tensors, prefix: str, activation: str) -> Tensor:
    """The block of `x`, its parameters named with `prefix`."""

    def layer(name: str, given: Tensor) -> Tensor:
        bias = parameters.get(f"{prefix}{name}.bias")
        return F.linear(given, parameters[f"{prefix}{name}.weight"], bias)

    inner = layer("fc1", x)
    if activation in _PLAIN:
        return layer("fc2", _PLAIN[activation](inner))
    if f"{prefix}gate.weight" in parameters:
        gate, up = layer("gate", x), inner
    else:
        ffn = parameters[f"{prefix}fc2.weight"].shape[1]
        gate, up = inner[..., :ffn], inner[..., ffn:]
    return layer("fc2", _GATES[activation](gate) * up)


def mlp_steps(
    case: Case, elements: int, *, layers: int = 1
) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """Forward and backward of a block, `layers` of which take an x of so many `elements` (all those
    of a tensor-parallel group)."""
    if not case.layout.sequence_parallel:
        reduce = Step("all_reduce", "tp", elements)
        return (reduce,), (reduce,) * layers
    gather = Step("all_gather", "tp", elements // case.layout.tp)
    scatter = Step("reduce_scatter", "tp", elements)
    return (*(gather,) * layers, scatter), (gather, *(gather, scatter) * layers)


def mlp_kept(case: Case) -> int:
    """The elements that a rank keeps for a token inside of the block: what fc1 gives and what fc2
    is given; with a gate, what either gives, the activation, and what fc2 is given."""
    gated = one_of(case, "activation", ACTIVATIONS) in _GATES
    return (4 if gated else 2) * case.shape["ffn"] // case.layout.tp
