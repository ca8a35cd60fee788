"""The conjugate operations of tensor and sequence parallelism: identities of the full tensor.

x and y are one full tensor [sequence, batch, hidden]; an operation changes only how it lies on the
tp ranks, and its backward changes the gradient back. arXiv:1909.08053 (f and g) and, with sequence
parallelism, arXiv:2205.05198 (g and g-bar) define them. R is Replicate, S(d) Shard(d), P Partial:

| concept | x -> y | forward | upstream -> gradient | backward |
|---|---|---|---|---|
| copy_to_tp | R -> R | none | P -> R | all-reduce |
| reduce_from_tp | P -> R | all-reduce | R -> R | none |
| scatter_to_tp | R -> S(-1) | split | S(-1) -> R | all-gather |
| gather_from_tp | S(-1) -> R | all-gather | R -> S(-1) | split |
| scatter_to_sp | R -> S(0) | split | S(0) -> R | all-gather |
| gather_from_sp | S(0) -> R | all-gather | P -> S(0) | reduce-scatter |
| reduce_scatter_to_sp | P -> S(0) | reduce-scatter | S(0) -> R | all-gather |
| all_gather_last_dim | S(-1) -> R | all-gather | P -> S(-1) | reduce-scatter |
| reduce_scatter_last_dim | P -> S(-1) | reduce-scatter | S(-1) -> R | all-gather |
| all_to_all_sp_to_hp | S(0) -> S(-1) | all-to-all | S(-1) -> S(0) | all-to-all |
| all_to_all_hp_to_sp | S(-1) -> S(0) | all-to-all | S(0) -> S(-1) | all-to-all |

`gather_from_sp` with tensor_parallel_output_grad False has a Replicate upstream, which it splits.
No operation communicates more than its one collective, or keeps anything for backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from verify.case import Case
from verify.oracle.contract import Contract, Step, Tensors, TensorSpec
from verify.oracle.terms import known_options, sizes, switches
from verify.placement import Partial, Placement, Replicate, Shard

# Of x, of its gradient, of y, and of y's upstream gradient.
Way = tuple[Placement, Placement, Placement, Placement]

_SEQUENCE, _LAST, _WHOLE, _SUMMANDS = Shard(0), Shard(-1), Replicate(), Partial()
_WAYS: dict[str, Way] = {
    "copy_to_tp": (_WHOLE, _WHOLE, _WHOLE, _SUMMANDS),
    "reduce_from_tp": (_SUMMANDS, _WHOLE, _WHOLE, _WHOLE),
    "scatter_to_tp": (_WHOLE, _WHOLE, _LAST, _LAST),
    "gather_from_tp": (_LAST, _LAST, _WHOLE, _WHOLE),
    "scatter_to_sp": (_WHOLE, _WHOLE, _SEQUENCE, _SEQUENCE),
    "gather_from_sp": (_SEQUENCE, _SEQUENCE, _WHOLE, _SUMMANDS),
    "reduce_scatter_to_sp": (_SUMMANDS, _WHOLE, _SEQUENCE, _SEQUENCE),
    "all_gather_last_dim": (_LAST, _LAST, _WHOLE, _SUMMANDS),
    "reduce_scatter_last_dim": (_SUMMANDS, _WHOLE, _LAST, _LAST),
    "all_to_all_sp_to_hp": (_SEQUENCE, _SEQUENCE, _LAST, _LAST),
    "all_to_all_hp_to_sp": (_LAST, _LAST, _SEQUENCE, _SEQUENCE),
}


def _contract(case: Case, *, way: Way) -> Contract:
    """y is x; the gradient of x is the upstream gradient of y."""
    shape = sizes(case, "sequence", "batch", "hidden")
    defaults = {"tensor_parallel_output_grad": True} if case.concept == "gather_from_sp" else {}
    known_options(case, *defaults)
    options = switches(case, defaults)
    x, grad_x, y, grad_y = way
    if not options.get("tensor_parallel_output_grad", True):
        grad_y = _WHOLE
    elements, tp = math.prod(shape), case.layout.tp
    return Contract(
        inputs={"x": TensorSpec(shape, {"tp": x}, {"tp": grad_x})},
        parameters={},
        outputs={"y": TensorSpec(shape, {"tp": y}, {"tp": grad_y})},
        reference=_identity,
        linear=True,
        forward=movement(x, y, elements=elements, tp=tp),
        backward=movement(grad_y, grad_x, elements=elements, tp=tp),
        kept=0,
    )


def movement(before: Placement, after: Placement, *, elements: int, tp: int) -> tuple[Step, ...]:
    """What a rank communicates so that a tensor of so many elements, of which tp ranks hold their
    part, lies otherwise: one collective, or nothing where it has what it needs."""
    whole, split = isinstance(after, Replicate), isinstance(before, Shard)
    if isinstance(before, Partial):
        return (Step("all_reduce" if whole else "reduce_scatter", "tp", elements),)
    if not split or before == after:
        return ()
    return (Step("all_gather" if whole else "all_to_all", "tp", elements // tp),)


def _identity(inputs: Tensors, parameters: Tensors) -> Tensors:
    return {"y": inputs["x"].clone()}


MAPPINGS: dict[str, Callable[[Case], Contract]] = {
    concept: partial(_contract, way=way) for concept, way in _WAYS.items()
}
