"""A function for a target to compute again: it makes a note of all that it can tell of each run.

    y = tanh((exp(sin((x @ A) @ B)) * mask) @ C)

A and C are multiplied in the arithmetic of autocast, where there is one, B in full, with autocast
turned off inside. What `CHANGES` names is done instead of the tanh from the second run on: y has
the same shape and dtype, and of what autograd saves for backward the last is something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Last = Callable[[Tensor], Tensor]


def _more(z: Tensor) -> Tensor:
    """saves one tensor more"""
    return z.tanh().tanh()


def _fewer(z: Tensor) -> Tensor:
    """saves one tensor fewer"""
    return z


def _of_another_shape(z: Tensor) -> Tensor:
    """saves a tensor of another shape"""
    return z.unsqueeze(-1).tanh().squeeze(-1)


def _of_another_dtype(z: Tensor) -> Tensor:
    """saves a tensor of another dtype"""
    return z.double().tanh().to(z.dtype)


CHANGES: Mapping[str, Last] = {
    "more": _more,
    "fewer": _fewer,
    "shape": _of_another_shape,
    "dtype": _of_another_dtype,
}


@dataclass(frozen=True)
class Given:
    """An argument as the function was given it."""

    value: Tensor
    strides: tuple[int, ...]
    requires_grad: bool

    @staticmethod
    def of(tensor: Tensor) -> Given:
        """A note of a tensor."""
        return Given(tensor.detach().clone(), tensor.stride(), tensor.requires_grad)

    def differs(self, first: Given) -> str:
        """How this is not what was given the first time; empty where it is.

        Along a dimension of one element strides mean nothing, and an input that overlaps itself in
        memory, as an expanded one does, may come back in full.
        """
        one, other = first.value, self.value
        if one.shape != other.shape or one.dtype is not other.dtype:
            return f"is {list(other.shape)} {other.dtype}, and was {list(one.shape)} {one.dtype}"
        if not torch.equal(one, other):
            return "has other values than in forward"
        if self.requires_grad != first.requires_grad:
            return f"has requires_grad={self.requires_grad}, and had {first.requires_grad}"
        long = [dim for dim, size in enumerate(one.shape) if size > 1]
        before, now = ([each.strides[dim] for dim in long] for each in (first, self))
        if before != now and 0 not in before:
            return f"has strides {self.strides} in memory, and had {first.strides}"
        return ""


@dataclass
class Run:
    """What one run of the function was given, under what, and the memory that it made."""

    given: Mapping[str, Given]
    autocast: str
    made: list[StorageWeakRef] = field(default_factory=list)

    def differs(self, first: Run) -> Iterator[str]:
        """How this run is not the first one again."""
        for name, each in self.given.items():
            if text := each.differs(first.given[name]):
                yield f"{name} {text}"
        if self.autocast != first.autocast:
            yield f"it runs under {self.autocast}, and ran under {first.autocast}"

    @property
    def held(self) -> int:
        """How many of the tensors that it made inside are still in memory."""
        return sum(not each.expired() for each in self.made)


class Noted:
    """The function, with its weights A, B and C [hidden, hidden], and its runs so far."""

    def __init__(self, weights: Mapping[str, Tensor], change: str | None = None) -> None:
        self.weights, self._change = weights, change
        self.runs: list[Run] = []

    def __call__(self, x: Tensor, mask: Tensor) -> Tensor:
        """y, of x and mask [sequence, batch, hidden]."""
        run = Run({"x": Given.of(x), "mask": Given.of(mask)}, _autocast(x.device.type))
        self.runs.append(run)
        low = x @ self.weights["A"]
        with torch.autocast(x.device.type, enabled=False):
            inner = (low.float() @ self.weights["B"]).sin().exp()
            masked = inner * mask
        run.made += [StorageWeakRef(each.untyped_storage()) for each in (low, inner, masked)]
        return self._last(masked @ self.weights["C"])

    def _last(self, z: Tensor) -> Tensor:
        if self._change is None or len(self.runs) < 2:
            return z.tanh()
        return CHANGES[self._change](z)


def _autocast(device: str) -> str:
    if not torch.is_autocast_enabled(device):
        return "no autocast"
    return f"autocast to {str(torch.get_autocast_dtype(device)).removeprefix('torch.')}"
