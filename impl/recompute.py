"""Activations that are not kept from forward to backward, but computed again when they are needed.

Forward keeps the inputs of a function instead of what autograd would keep inside it; the first
gradient that asks for any of that runs the function again, on the same random numbers, and takes
what it needs from there. Selective recomputation is to wrap core attention alone (Korthikanti et
al., arXiv:2205.05198, section 5); full recomputation wraps layers, in the two ways of Megatron-LM.

The graph that backward walks is the one that forward built: gradients of parameters, of several
outputs and of inputs that need none are autograd's own. What is kept and given back is decided by
torch's hooks for saved tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import ProcessGroup

from impl.collectives import all_gather
from impl.partition import split
from impl.random import RandomTracker

Method = Literal["uniform", "block"]
METHODS = get_args(Method)
Layer = Callable[..., Tensor]


def checkpoint(
    function: Callable[..., Any],
    x: Tensor,
    *args: Any,
    tracker: RandomTracker,
    group: ProcessGroup | None = None,
) -> Any:
    """`function(x, *args)`: autograd keeps x, the tensors among `args` and nothing inside.

    Bits, gradients and random states are those of the function alone. In backward it runs once
    more, collectives included, with the streams of `tracker`, the CPU's generator and autocast as
    they were in forward; afterwards every stream is where it was. Checkpoints may be nested, and
    results may be several tensors or other things. As without it, torch refuses a second backward,
    unless the first had `retain_graph`. What the function computes must depend on its arguments,
    parameters and random numbers alone, and it must not change its arguments.

    With `group`, over which x must be Replicate, each rank keeps its part of it, 1/tp, and backward
    gathers them (one all-gather). Raises ValueError where its elements do not divide, and
    RuntimeError in backward where the function saves other tensors than in forward.
    """
    if not torch.is_grad_enabled():
        return function(x, *args)
    frame = _Frame(function, _Inputs(x, args, group), tracker)
    with saved_tensors_hooks(frame.pack, _unpack):
        return function(x, *args)


def recompute_layers(
    layers: Sequence[Layer],
    x: Tensor,
    *,
    method: Method,
    num_layers: int,
    tracker: RandomTracker,
    group: ProcessGroup | None = None,
    sequence_parallel: bool,
) -> Tensor:
    """`x` through all layers of this rank, with full recomputation of some.

    `uniform` keeps the input of every run of `num_layers` layers, the last run being shorter where
    they do not divide; `block` keeps that of each of the first `num_layers` layers, and all
    activations of the others. `group` is as in `checkpoint`; with `sequence_parallel` the inputs
    are split over it already. Raises ValueError for another method, a number that is not from 1 to
    the number of layers, and a group together with sequence parallelism.
    """
    if method not in METHODS:
        raise ValueError(f"recompute: {method!r} is not one of {', '.join(METHODS)}")
    if not 1 <= num_layers <= len(layers):
        raise ValueError(
            f"recompute: {num_layers} layers at a time, of {len(layers)};"
            f" give num_layers from 1 to {len(layers)}"
        )
    if group is not None and sequence_parallel:
        raise ValueError(
            "recompute: inputs cannot be distributed with sequence_parallel=True, which splits them"
            " already; give no group"
        )
    length = num_layers if method == "uniform" else 1
    recomputed = len(layers) if method == "uniform" else num_layers
    for start in range(0, recomputed, length):
        run = _Run(layers[start : min(start + length, recomputed)])
        x = checkpoint(run, x, tracker=tracker, group=group)
    return _Run(layers[recomputed:])(x)


@dataclass(frozen=True)
class _Run:
    layers: Sequence[Layer]

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _Saved:
    """Stands for a tensor that autograd saved; has it after the function ran again.

    It lives as long as the node that saved it keeps it, and the frame as long as one of its own.
    """

    def __init__(self, frame: _Frame, like: Tensor) -> None:
        self.frame, self.like = frame, _likeness(like)
        self.tensor: Tensor | None = None


def _unpack(saved: _Saved) -> Tensor:
    if saved.tensor is None:
        saved.frame.recompute()
    assert saved.tensor is not None
    return saved.tensor


class _Frame:
    """One call of a function: how to run it again, and where to put what autograd saves then."""

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: _Inputs,
        tracker: RandomTracker,
    ) -> None:
        self._function, self._inputs, self._tracker = function, inputs, tracker
        self._snapshot = tracker.snapshot()
        self._cpu_state = torch.get_rng_state()
        devices = {"cpu", tracker.device.type}
        self._autocasts = tuple(_Autocast.now(device) for device in devices)
        self._saved: list[weakref.ref[_Saved]] = []

    def pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(self, tensor)
        self._saved.append(weakref.ref(saved))
        return saved

    def recompute(self) -> None:
        """Run the function again, and fill every `_Saved` that is still wanted."""
        args = self._inputs.get()
        found: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(self._replaying())
            for autocast in self._autocasts:
                stack.enter_context(autocast.again())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(saved_tensors_hooks(_into(found), _unchanged))
            self._function(*args)
        if len(found) != len(self._saved):
            raise RuntimeError(
                f"recompute: the function saves {len(found)} tensors for backward and saved"
                f" {len(self._saved)} in forward; it must do the same both times"
            )
        for reference, tensor in zip(self._saved, found, strict=True):
            saved = reference()
            if saved is None:
                continue
            if _likeness(tensor) != saved.like:
                raise RuntimeError(
                    f"recompute: the function saves {_likeness(tensor)} and saved {saved.like} in"
                    " forward; it must do the same both times"
                )
            saved.tensor = tensor

    @contextmanager
    def _replaying(self) -> Iterator[None]:
        """The random numbers of forward; afterwards all generators are as they were."""
        cpu_state = torch.get_rng_state()
        with self._tracker.replaying(self._snapshot):
            if self._tracker.device.type == "cpu":
                yield
                return
            torch.set_rng_state(self._cpu_state)
            try:
                yield
            finally:
                torch.set_rng_state(cpu_state)


class _Inputs:
    """The arguments of a function. Autograd keeps the tensors, as it keeps what any node saves, so
    that an outer checkpoint can do without them."""

    def __init__(self, x: Tensor, args: tuple[Any, ...], group: ProcessGroup | None) -> None:
        self._group, self._shape, self._strides = group, x.shape, x.stride()
        self._others = [None if isinstance(arg, Tensor) else arg for arg in args]
        self._places = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
        tensors = [args[place] for place in self._places]
        self._needs = [tensor.requires_grad for tensor in (x, *tensors)]
        part = x if group is None else split(x.detach().reshape(-1), dim=0, group=group)
        anchor = torch.empty(0, requires_grad=True)
        self._node: Any = _Keep.apply(anchor, part, *tensors).grad_fn

    def get(self) -> list[Any]:
        """The arguments, tensors apart from the graph that they came from."""
        x, *tensors = (tensor.detach() for tensor in self._node.saved_tensors)
        if self._group is not None:
            x = self._whole(all_gather(x, dim=0, group=self._group))
        args = [x, *self._others]
        for place, tensor in zip(self._places, tensors, strict=True):
            args[1 + place] = tensor
        for tensor, needs in zip((x, *tensors), self._needs, strict=True):
            tensor.requires_grad_(needs)
        return args

    def _whole(self, gathered: Tensor) -> Tensor:
        """The full tensor, in memory as it was, because that can decide the order of sums."""
        full = gathered.view(self._shape)
        if full.stride() == self._strides or 0 in self._strides:
            return full
        return full.new_empty_strided(self._shape, self._strides).copy_(full)


class _Keep(torch.autograd.Function):
    """Saves tensors, and has no other effect."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        return torch.empty_like(anchor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError("recompute: nothing depends on this node")


@dataclass(frozen=True)
class _Autocast:
    """The state of autocast for one type of device."""

    device: str
    enabled: bool
    dtype: torch.dtype
    cache: bool

    @staticmethod
    def now(device: str) -> _Autocast:
        return _Autocast(
            device,
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
            torch.is_autocast_cache_enabled(),
        )

    def again(self) -> torch.autocast:
        return torch.autocast(
            self.device, dtype=self.dtype, enabled=self.enabled, cache_enabled=self.cache
        )


def _likeness(tensor: Tensor) -> tuple[list[int], torch.dtype, torch.device]:
    return list(tensor.shape), tensor.dtype, tensor.device


def _into(found: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def pack(tensor: Tensor) -> Tensor:
        # Without the graph of this run: the one that forward built is in use.
        found.append(tensor.detach())
        return found[-1]

    return pack


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
