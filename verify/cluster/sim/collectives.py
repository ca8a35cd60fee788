"""What each collective computes, on the calls of all members at once, by group rank.

A `Kind` says which calls fit each other and what is written where. Reductions add in the order of
group ranks, in the dtype of the tensors, as a chain of additions rounds after each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from verify.cluster.sim.exchange import Call

Calls = Sequence["Call"]


class Misfit(Exception):
    """The calls of two members (by group rank) do not fit each other."""

    def __init__(self, one: int, other: int, text: str) -> None:
        super().__init__(text)
        self.one, self.other, self.text = one, other, text


@dataclass(frozen=True)
class Reduction:
    """A reduction by name; `factor` multiplies every summand of a premultiplied sum."""

    name: str
    factor: float | None = None

    def __str__(self) -> str:
        return self.name if self.factor is None else f"{self.name}({self.factor})"

    @staticmethod
    def of(op: Any) -> Reduction:
        """The reduction that a torch.distributed ReduceOp stands for."""
        kind = getattr(op, "op", op).value
        if kind == dist.ReduceOp.PREMUL_SUM.value:
            return Reduction("premul_sum", op.__getstate__()[1])
        return _REDUCTIONS[kind]

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """The reduction of tensors of one shape, in their order."""
        total = tensors[0].clone()
        if self.factor is not None:
            total.mul_(self.factor)
        step = _STEPS[self.name]
        for tensor in tensors[1:]:
            step(total, tensor if self.factor is None else tensor * self.factor)
        return total.div_(len(tensors)) if self.name == "avg" else total


def _into(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], object]:
    return lambda total, tensor: total.copy_(function(total, tensor))


_REDUCTIONS = {
    getattr(dist.ReduceOp, name.upper()).value: Reduction(name)
    for name in ("sum", "avg", "product", "min", "max", "band", "bor", "bxor")
}
_STEPS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sum": Tensor.add_,
    "avg": Tensor.add_,
    "premul_sum": Tensor.add_,
    "product": Tensor.mul_,
    "min": _into(torch.minimum),
    "max": _into(torch.maximum),
    "band": Tensor.bitwise_and_,
    "bor": Tensor.bitwise_or_,
    "bxor": Tensor.bitwise_xor_,
}


@dataclass(frozen=True)
class Kind:
    """A collective. `perform` writes all outputs; `fit` raises Misfit where the calls of two
    members do not go together; `alike`: whether all members' inputs have one shape; `symmetric`:
    whether all members do the same, so that a program calls it from one place on all of them."""

    perform: Callable[[Calls], None]
    fit: Callable[[Calls], None] = lambda calls: None
    alike: bool = True
    symmetric: bool = True

    def apart(self, one: Call, other: Call) -> str | None:
        """In what the inputs of two members differ that must not."""
        if not self.alike:
            return None
        mine, theirs = one.inputs, other.inputs
        if len(mine) != len(theirs):
            return "the numbers of tensors differ"
        for a, b in zip(mine, theirs, strict=True):
            if a.shape != b.shape:
                return "the shapes differ"
            if a.dtype is not b.dtype:
                return "the dtypes differ"
        return None


def write(output: Tensor, value: Tensor) -> None:
    """Write a result. As in a real backend, autograd does not see it."""
    output.data.copy_(value)


def write_everywhere(outputs: Sequence[Tensor], value: Tensor) -> None:
    """Write one result to several tensors of its shape, in one operation."""
    torch._foreach_copy_([output.data for output in outputs], [value] * len(outputs))


def _all_reduce(calls: Calls) -> None:
    reduction = calls[0].settings[0]
    for i in range(len(calls[0].inputs)):
        total = reduction([call.inputs[i] for call in calls])
        write_everywhere([call.outputs[i] for call in calls], total)


def _reduce(calls: Calls) -> None:
    reduction, root = calls[0].settings
    for i, output in enumerate(calls[root].outputs):
        write(output, reduction([call.inputs[i] for call in calls]))


def _broadcast(calls: Calls) -> None:
    (root,) = calls[0].settings
    for member, call in enumerate(calls):
        if member != root:
            for output, value in zip(call.outputs, calls[root].inputs, strict=True):
                write(output, value)


def _all_gather(calls: Calls) -> None:
    values = [call.inputs[0] for call in calls]
    for call in calls:
        for output, value in zip(call.outputs, values, strict=True):
            write(output, value)


def _all_gather_into_tensor(calls: Calls) -> None:
    for i in range(len(calls[0].inputs)):
        whole = torch.cat([call.inputs[i].reshape(-1) for call in calls])
        write_everywhere([call.outputs[i].view(-1) for call in calls], whole)


def _reduce_scatter(calls: Calls) -> None:
    reduction = calls[0].settings[0]
    for member, call in enumerate(calls):
        write(call.outputs[0], reduction([each.inputs[member] for each in calls]))


def _reduce_scatter_tensor(calls: Calls) -> None:
    reduction, size = calls[0].settings[0], len(calls)
    for i in range(len(calls[0].inputs)):
        parts = reduction([call.inputs[i].reshape(-1) for call in calls]).view(size, -1)
        for member, call in enumerate(calls):
            write(call.outputs[i], parts[member].view(call.outputs[i].shape))


def _all_to_all(calls: Calls) -> None:
    for target, call in enumerate(calls):
        for source, output in enumerate(call.outputs):
            write(output, calls[source].inputs[target].reshape(output.shape))


def _all_to_all_single(calls: Calls) -> None:
    """Split sizes are along dimension 0 and the calls' own; None for equal parts."""
    sent = [split(call.inputs[0], call.own[0], len(calls)) for call in calls]
    arrived = [torch.cat([parts[i].reshape(-1) for parts in sent]) for i in range(len(calls))]
    for call, value in zip(calls, arrived, strict=True):
        write(call.outputs[0], value.view(call.outputs[0].shape))


def split(tensor: Tensor, sizes: Sequence[int] | None, count: int) -> Sequence[Tensor]:
    """The parts of a tensor by sizes along dimension 0, or `count` equal ones."""
    length = tensor.shape[0] if tensor.dim() else 0
    return tensor.split(list(sizes) if sizes else [length // count] * count)


def _gather(calls: Calls) -> None:
    (root,) = calls[0].settings
    for output, call in zip(calls[root].outputs, calls, strict=True):
        write(output, call.inputs[0])


def _scatter(calls: Calls) -> None:
    (root,) = calls[0].settings
    for call, value in zip(calls, calls[root].inputs, strict=True):
        write(call.outputs[0], value)


def _nothing(calls: Calls) -> None:
    pass


def _same(receiver: int, output: Tensor, sender: int, value: Tensor) -> None:
    if output.shape != value.shape:
        raise Misfit(
            sender,
            receiver,
            f"what is received is {list(output.shape)}, what is sent is {list(value.shape)}",
        )
    if output.dtype is not value.dtype:
        raise Misfit(sender, receiver, f"{output.dtype} is received, {value.dtype} is sent")


def _fit_all_gather(calls: Calls) -> None:
    for receiver, call in enumerate(calls):
        for sender, output in enumerate(call.outputs):
            _same(receiver, output, sender, calls[sender].inputs[0])


def _fit_reduce_scatter(calls: Calls) -> None:
    for receiver, call in enumerate(calls):
        for sender, other in enumerate(calls):
            _same(receiver, call.outputs[0], sender, other.inputs[receiver])


def _fit_all_to_all(calls: Calls) -> None:
    for receiver, call in enumerate(calls):
        for sender, output in enumerate(call.outputs):
            value = calls[sender].inputs[receiver]
            if output.numel() != value.numel() or output.dtype is not value.dtype:
                _same(receiver, output, sender, value)


def _fit_all_to_all_single(calls: Calls) -> None:
    size = len(calls)
    sent = [split(call.inputs[0], call.own[0], size) for call in calls]
    for receiver, call in enumerate(calls):
        for sender, output in enumerate(split(call.outputs[0], call.own[1], size)):
            _same(receiver, output, sender, sent[sender][receiver])


def _fit_gather(calls: Calls) -> None:
    (root,) = calls[0].settings
    for sender, (output, call) in enumerate(zip(calls[root].outputs, calls, strict=True)):
        _same(root, output, sender, call.inputs[0])


def _fit_scatter(calls: Calls) -> None:
    (root,) = calls[0].settings
    for receiver, (call, value) in enumerate(zip(calls, calls[root].inputs, strict=True)):
        _same(receiver, call.outputs[0], root, value)


KINDS = {
    "all_reduce": Kind(_all_reduce),
    "reduce": Kind(_reduce, symmetric=False),
    "broadcast": Kind(_broadcast, symmetric=False),
    "all_gather": Kind(_all_gather, _fit_all_gather, alike=False),
    "all_gather_into_tensor": Kind(_all_gather_into_tensor),
    "reduce_scatter": Kind(_reduce_scatter, _fit_reduce_scatter, alike=False),
    "reduce_scatter_tensor": Kind(_reduce_scatter_tensor),
    "all_to_all": Kind(_all_to_all, _fit_all_to_all, alike=False),
    "all_to_all_single": Kind(_all_to_all_single, _fit_all_to_all_single, alike=False),
    "gather": Kind(_gather, _fit_gather, alike=False, symmetric=False),
    "scatter": Kind(_scatter, _fit_scatter, alike=False, symmetric=False),
    "barrier": Kind(_nothing),
}
