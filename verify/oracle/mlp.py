"""The two-layer perceptron split over tp: y = gelu(x fc1^T + b1) fc2^T + b2, the exact gelu.

Section 3 of arXiv:1909.08053: a column-parallel layer, an activation, a row-parallel layer.
"""

from __future__ import annotations

from torch.nn import functional as F

from verify.case import Case
from verify.errors import BadArgument
from verify.oracle.contract import Contract, Tensors, TensorSpec
from verify.oracle.terms import known_options, sizes, switches
from verify.placement import Placements, Replicate, Shard

ACTIVATIONS = ("gelu",)


def tp_mlp(case: Case) -> Contract:
    """fc1.weight [ffn, hidden] and fc1.bias Shard(0), fc2.weight [hidden, ffn] Shard(1), fc2.bias
    Replicate over tp.

    x, y and both gradients Replicate, or Shard(0) with sequence parallelism. Forward all-reduces
    the output and backward the gradient of x; with sequence parallelism an all-gather and a
    reduce-scatter take the place of each.
    """
    known_options(case, "bias", "activation")
    sequence, batch, hidden, ffn = sizes(case, "sequence", "batch", "hidden", "ffn")
    bias = switches(case, {"bias": True})["bias"]
    activation = case.options.get("activation", "gelu")
    if activation not in ACTIVATIONS:
        raise BadArgument(
            f"case.options.activation: {activation!r} is not one of {', '.join(ACTIVATIONS)}"
        )
    shape = (sequence, batch, hidden)
    placed: Placements = {"tp": Shard(0) if case.layout.sequence_parallel else Replicate()}
    weights = {"fc1.weight": (ffn, hidden), "fc2.weight": (hidden, ffn)}
    biases = {"fc1.bias": (ffn,), "fc2.bias": (hidden,)} if bias else {}
    return Contract(
        inputs={"x": TensorSpec(shape, placed, placed)},
        parameters={**weights, **biases},
        outputs={"y": TensorSpec(shape, placed, placed)},
        reference=_reference,
        divided={"ffn": ffn},
    )


def _reference(inputs: Tensors, parameters: Tensors) -> Tensors:
    fc1 = F.linear(inputs["x"], parameters["fc1.weight"], parameters.get("fc1.bias"))
    y = F.linear(F.gelu(fc1), parameters["fc2.weight"], parameters.get("fc2.bias"))
    return {"y": y}
