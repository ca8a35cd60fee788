"""Normalisation of features: layer norm (arXiv:1607.06450) and RMS norm (arXiv:1910.07467).

    y = (x - mean) / sqrt(variance + eps) * weight + bias
    y = x / sqrt(mean of squares + eps) * weight

A weight that is `zero_centered` stands for 1 + weight. All of it is computed in float32 at least.
Ranks hold whole rows, and the same weight: of its gradient each has the part of its own rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from verify.case import Case
from verify.disturbance import of_mean
from verify.oracle.contract import Contract, Step, Tensors, TensorSpec
from verify.oracle.terms import exclude, fit, known_options, one_of, sizes, switches
from verify.placement import Partial, Placements, Replicate, Shard

KINDS = ("layer", "rms")
OPTIONS = ("kind", "bias", "zero_centered")
EPSILON = 1e-5


def normalised(
    x: Tensor, parameters: Tensors, prefix: str, *, kind: str, zero_centered: bool
) -> Tensor:
    """`x` [..., features] normalised by `prefix`weight and, where there is one, `prefix`bias."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    weight, bias = parameters[f"{prefix}weight"], parameters.get(f"{prefix}bias")
    fit("x", x, (*x.shape[:-1], *weight.shape))
    mean = wide.mean(-1, keepdim=True) if kind == "layer" else None
    centred = wide if mean is None else wide - mean
    root = torch.sqrt((centred * centred).mean(-1, keepdim=True) + EPSILON)
    normal = centred / root
    if mean is not None:
        normal = of_mean(normal, wide, mean=mean, root=root)
    y = normal * (weight.to(wide.dtype) + (1.0 if zero_centered else 0.0))
    return (y if bias is None else y + bias.to(wide.dtype)).to(x.dtype)


def norm_parameters(case: Case, prefix: str, features: int) -> dict[str, tuple[int, ...]]:
    """The parameters of one norm by the options of a case.

    Raises BadArgument for a bias of an RMS norm.
    """
    kind = one_of(case, "kind", KINDS)
    bias = switches(case, {"bias": kind == "layer"})["bias"]
    if bias and kind == "rms":
        exclude(case, "bias", True, why="an RMS norm has none")
    weights: dict[str, tuple[int, ...]] = {f"{prefix}weight": (features,)}
    return weights | ({f"{prefix}bias": (features,)} if bias else {})


def norm(case: Case) -> Contract:
    """x, y [sequence, batch, hidden] and gradients Shard(0) over cp; over tp Replicate, or Shard(0)
    with sequence parallelism. weight and bias [hidden] Replicate, gradients complete after
    finish_gradients: summed over cp, and over tp with sequence parallelism only.

    Options: `kind` layer or rms; `bias`, of a layer norm; `zero_centered`. Keeps x and two numbers
    a row, one for rms.
    """
    known_options(case, *OPTIONS)
    sequence, batch, hidden = shape = sizes(case, "sequence", "batch", "hidden")
    kind, layout = one_of(case, "kind", KINDS), case.layout
    zero_centered = switches(case, {"zero_centered": False})["zero_centered"]
    parameters = norm_parameters(case, "", hidden)
    over_tp = Shard(0) if layout.sequence_parallel else Replicate()
    placed: Placements = {"cp": Shard(0), "tp": over_tp}
    elements = hidden * len(parameters)
    finish = [Step("all_reduce", "cp", elements)]
    finish += [Step("all_reduce", "tp", elements)] if layout.sequence_parallel else []
    rows = sequence * batch // (layout.cp * (layout.tp if layout.sequence_parallel else 1))

    def reference(inputs: Tensors, given: Tensors) -> Tensors:
        return {"y": normalised(inputs["x"], given, "", kind=kind, zero_centered=zero_centered)}

    return Contract(
        axes=("tp", "cp"),
        inputs={"x": TensorSpec(shape, placed, placed, terms=_terms(case))},
        parameters=parameters,
        outputs={"y": TensorSpec(shape, placed, placed)},
        reference=reference,
        forward=(),
        backward=(),
        finish=tuple(finish),
        kept=rows * (hidden + (2 if kind == "layer" else 1)),
    )


def qk_norm(case: Case) -> Contract:
    """Queries q [sequence, batch, heads, head_size] and keys k [..., groups, head_size], each head
    normalised by itself, to `query` and `key`: Shard(0) over cp and Shard(2) over tp, with sequence
    parallelism too; keys of one group, of which every rank has a copy, Replicate over tp, with
    Partial gradients. `query_norm` and `key_norm` weights and biases [head_size] Replicate, their
    gradients complete after finish_gradients: summed over cp and, always, over tp.
    """
    known_options(case, *OPTIONS)
    names = ("sequence", "batch", "heads", "groups", "head_size")
    sequence, batch, heads, groups, size = sizes(case, *names)
    kind = one_of(case, "kind", KINDS)
    zero_centered = switches(case, {"zero_centered": False})["zero_centered"]
    parameters = norm_parameters(case, "query_norm.", size)
    parameters |= norm_parameters(case, "key_norm.", size)
    split: Placements = {"cp": Shard(0), "tp": Shard(2)}
    shared = groups == 1
    key: Placements = {"cp": Shard(0), "tp": Replicate()} if shared else split
    grad_key: Placements = {"cp": Shard(0), "tp": Partial()} if shared else split
    elements = size * len(parameters)

    def reference(inputs: Tensors, given: Tensors) -> Tensors:
        common: dict[str, Any] = {"kind": kind, "zero_centered": zero_centered}
        return {
            "query": normalised(inputs["q"], given, "query_norm.", **common),
            "key": normalised(inputs["k"], given, "key_norm.", **common),
        }

    q, k = (sequence, batch, heads, size), (sequence, batch, groups, size)
    return Contract(
        axes=("tp", "cp"),
        inputs={
            "q": TensorSpec(q, split, split, terms=_terms(case)),
            "k": TensorSpec(k, key, grad_key, terms=_terms(case)),
        },
        parameters=parameters,
        outputs={"query": TensorSpec(q, split, split), "key": TensorSpec(k, key, grad_key)},
        reference=reference,
        forward=(),
        backward=(),
        finish=(Step("all_reduce", "tp", elements), Step("all_reduce", "cp", elements)),
    )


def _terms(case: Case) -> float:
    """A gradient is what is left of one over the size of x, when its mean and its part along x are
    taken off."""
    return 1.0 / float(case.options.get("magnitude") or 1)
