"""Dropout between the halves of a transformer layer: y = residual + dropout(x + bias).

What is dropped depends on where the activation is: ranks that hold copies drop the same elements,
ranks that hold parts drop independently (Korthikanti et al., arXiv:2205.05198, section 4.2.2, for
sequence parallelism). What is kept is divided by 1 - dropout. Nothing is communicated.
"""

from __future__ import annotations

from torch import Tensor

from verify.case import Case
from verify.errors import BadArgument
from verify.oracle.contract import Contract, Mask, Tensors, TensorSpec
from verify.oracle.terms import fit, in_training, known_options, number, sizes, switches
from verify.placement import Partial, Placements, Shard

REGIONS = ("replicated", "tensor-parallel")
PROBABILITY = 0.25
# Halves and quarters, whose scale is a power of two.
_EXACT = (0.0, 0.5, 0.75)


def dropout(case: Case) -> Contract:
    """x, residual and y [sequence, batch, hidden] and their gradients: Shard(0) over cp; over tp
    Replicate in the region `replicated`, Shard(0) there with sequence parallelism, and Shard(-1) in
    the region `tensor-parallel`. bias [hidden] lies as the features do; its gradient is Partial
    wherever the sequence is split.

    Options: `region`; `dropout`, the probability; `bias`; `training`, without which nothing is
    dropped. Raises BadArgument for another region, and a probability outside [0, 1).
    """
    known_options(case, "region", "dropout", "bias", "training")
    shape = sizes(case, "sequence", "batch", "hidden")
    biased = switches(case, {"bias": True})["bias"]
    region = case.options.get("region", REGIONS[0])
    if region not in REGIONS:
        raise BadArgument(f"case.options.region: {region!r} is not one of {', '.join(REGIONS)}")
    p = probability(case, "dropout", PROBABILITY)
    tensor_parallel = region == "tensor-parallel"
    sequence_parallel = case.layout.sequence_parallel and not tensor_parallel
    placed: Placements = {"cp": Shard(0)}
    bias: Placements = {}
    grad_bias: Placements = {"cp": Partial()}
    if tensor_parallel:
        placed = {**placed, "tp": Shard(-1)}
        bias, grad_bias = {"tp": Shard(-1)}, {"cp": Partial(), "tp": Shard(-1)}
    elif sequence_parallel:
        placed = {**placed, "tp": Shard(0)}
        grad_bias = {"cp": Partial(), "tp": Partial()}
    tensor = TensorSpec(shape, placed, placed)
    inputs = {"x": tensor, "residual": tensor}
    inputs |= {"bias": TensorSpec(shape[-1:], bias, grad_bias)} if biased else {}
    drops = in_training(case) and p > 0
    return Contract(
        axes=("tp", "cp"),
        inputs=inputs,
        parameters={},
        outputs={"y": tensor},
        reference=lambda tensors, parameters: _reference(tensors, p),
        linear=p in _EXACT,
        masks={"mask": Mask(shape, placed, p)} if drops else {},
        forward=(),
        backward=(),
        finish=(),
    )


def probability(case: Case, name: str, default: float) -> float:
    """An option that is a probability below 1."""
    given = number(case, name, least=0.0, below=1.0)
    return default if given is None else given


def dropped(x: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """`x` with what the mask does not keep set to zero, and the rest divided by 1 - p."""
    return x if mask is None else x * mask / (1 - p)


def _reference(tensors: Tensors, p: float) -> Tensors:
    x, residual, bias = tensors["x"], tensors["residual"], tensors.get("bias")
    fit("residual", residual, x.shape)
    if bias is not None:
        fit("bias", bias, (*bias.shape[:-1], x.shape[-1]))
        x = x + bias
    return {"y": residual + dropped(x, tensors.get("mask"), p)}
