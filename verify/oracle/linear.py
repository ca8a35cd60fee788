"""Linear layers split over tp: y = x weight^T + bias, weight [out, in], x [sequence, batch, in].

Section 3 of arXiv:1909.08053; with sequence parallelism section 4.2.2 of arXiv:2205.05198. With
skip_bias_add the layer leaves the addition to its caller: y has no bias, and `bias` is an output.
With flat, x and y are [sequence, features], of a batch of one. For backward a layer keeps this
rank's x, and not even that if its weight is frozen.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor
from torch.nn import functional as F

from verify.case import Case
from verify.oracle.contract import Contract, Step, Tensors, TensorSpec
from verify.oracle.mappings import movement
from verify.oracle.terms import exclude, known_options, sizes, switches
from verify.placement import Partial, Placements, Replicate, Shard

_OWN_SWITCH = {"column_linear": {"gather_output": False}, "row_linear": {"input_is_parallel": True}}


def column_linear(case: Case) -> Contract:
    """weight Shard(0), bias Shard(0) over tp.

    x and its gradient Replicate, or Shard(0) with sequence parallelism (forward all-gather;
    backward all-reduce, or reduce-scatter); y and its upstream gradient Shard(-1), or Replicate
    with gather_output (forward all-gather, backward split). The output `bias` is Shard(0).

    Raises BadArgument for gather_output with sequence parallelism: a whole output beside a split
    input has no next layer to go to.
    """
    given = _switches(case)
    if given["gather_output"] and case.layout.sequence_parallel:
        exclude(case, "gather_output", True, why="it does not go with sequence parallelism")
    x: Placements = {"tp": Shard(0) if case.layout.sequence_parallel else Replicate()}
    y: Placements = {"tp": Replicate() if given["gather_output"] else Shard(-1)}
    bias: Placements = {"tp": Shard(0)}
    contract = _linear(case, given, x=x, y=y, bias=bias, grad_bias=bias, split="out_features")
    elements, tp = _elements(case), case.layout.tp
    into = movement(x["tp"], Replicate(), elements=elements["in_features"], tp=tp)
    out = movement(Shard(-1), y["tp"], elements=elements["out_features"], tp=tp)
    back = movement(Partial(), x["tp"], elements=elements["in_features"], tp=tp)
    again = () if given["frozen_weight"] else into
    return dataclasses.replace(contract, forward=into + out, backward=again + back, finish=())


def row_linear(case: Case) -> Contract:
    """weight Shard(1), bias Replicate over tp.

    x and its gradient Shard(-1), or Replicate without input_is_parallel (forward split, backward
    all-gather); y and its upstream gradient Replicate, or Shard(0) with sequence parallelism
    (forward all-reduce, or reduce-scatter; backward none, or all-gather). The bias is added once,
    after the sum. The output `bias` is Replicate; with sequence parallelism its caller adds it to
    its part of the sequence only, so that its upstream gradient is Partial.

    Raises BadArgument for input_is_parallel=False with sequence parallelism, as Megatron does.
    """
    given = _switches(case)
    parallel_sequence = case.layout.sequence_parallel
    if not given["input_is_parallel"] and parallel_sequence:
        exclude(case, "input_is_parallel", False, why="sequence parallelism needs it to be True")
    x: Placements = {"tp": Shard(-1) if given["input_is_parallel"] else Replicate()}
    y: Placements = {"tp": Shard(0) if parallel_sequence else Replicate()}
    bias: Placements = {"tp": Replicate()}
    grad_bias: Placements = {"tp": Partial()} if parallel_sequence else bias
    contract = _linear(case, given, x=x, y=y, bias=bias, grad_bias=grad_bias, split="in_features")
    elements, tp = _elements(case), case.layout.tp
    finish = (Step("all_reduce", "tp", case.shape["out_features"]),)
    return dataclasses.replace(
        contract,
        forward=movement(Partial(), y["tp"], elements=elements["out_features"], tp=tp),
        backward=(
            *movement(y["tp"], Replicate(), elements=elements["out_features"], tp=tp),
            *movement(Shard(-1), x["tp"], elements=elements["in_features"], tp=tp),
        ),
        finish=finish if parallel_sequence and given["bias"] else (),
    )


def _elements(case: Case) -> dict[str, int]:
    """Those of the full input and of the full output."""
    tokens = case.shape["sequence"] * case.shape["batch"]
    return {name: tokens * case.shape[name] for name in ("in_features", "out_features")}


def _switches(case: Case) -> dict[str, bool]:
    defaults = {"bias": True, "skip_bias_add": False, "frozen_weight": False, "flat": False}
    defaults |= _OWN_SWITCH[case.concept]
    known_options(case, *defaults)
    return switches(case, defaults)


def _linear(
    case: Case,
    given: dict[str, bool],
    *,
    x: Placements,
    y: Placements,
    bias: Placements,
    grad_bias: Placements,
    split: str,
) -> Contract:
    sequence, batch, inside, out = sizes(case, "sequence", "batch", "in_features", "out_features")
    returned = given["bias"] and given["skip_bias_add"]
    if given["flat"] and batch != 1:
        exclude(case, "flat", True, why="it leaves the batch out, which has to be 1")
    tokens = (sequence,) if given["flat"] else (sequence, batch)

    def reference(inputs: Tensors, parameters: Tensors) -> Tensors:
        added: Tensor | None = None if returned else parameters.get("bias")
        found = {"y": F.linear(inputs["x"], parameters["weight"], added)}
        return found | ({"bias": parameters["bias"].clone()} if returned else {})

    # Without a gradient of the weight nothing needs x.
    divided = case.layout.tp if x["tp"] != Replicate() or split == "in_features" else 1
    kept = 0 if given["frozen_weight"] else sequence * batch * inside // divided
    parameters = {"weight": (out, inside)} | ({"bias": (out,)} if given["bias"] else {})
    outputs = {"y": TensorSpec((*tokens, out), y, y)}
    outputs |= {"bias": TensorSpec((out,), bias, grad_bias)} if returned else {}
    return Contract(
        inputs={"x": TensorSpec((*tokens, inside), x, x)},
        parameters=parameters,
        outputs=outputs,
        reference=reference,
        linear=True,
        frozen=frozenset({"weight"} if given["frozen_weight"] else ()),
        divided={split: case.shape[split]},
        kept=kept,
    )
