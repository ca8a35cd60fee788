"""Gradients of weights that are computed later than those of activations.

Backward of a linear layer is two products: the gradient of its input, for which the layer below
waits, and that of its weight, for which nobody does until the end of a step. Zero-bubble schedules
(arXiv:2401.10241, 2.1) do them in two passes, of which the second fills bubbles.

The first pass goes back through all layers, as backward does, but a layer whose weight is put off
leaves what its product needs, the gradient of its output and its input, with a `WeightPass`. So
nothing is computed twice, and autograd's graph is freed by the first pass. Gradients that cost no
product (biases, norms) are computed on the way, and kept back. The second pass gives everything to
the parameters, where hooks run as after backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge
from torch.nn import Parameter
from torch.nn import functional as F


class WeightPass:
    """The gradients of `parameters` from one backward, which go to them in `run`.

    ValueError for a parameter with a hook of its gradient (`register_hook`), which would be run of
    parts of it; hooks of what was accumulated (`register_post_accumulate_grad_hook`) are right.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        for parameter in parameters:
            if parameter._backward_hooks:
                raise ValueError(
                    f"parameters: one of shape {list(parameter.shape)} has a hook of its gradient,"
                    " which weight passes do not run; take register_post_accumulate_grad_hook"
                )
        self._parameters = parameters
        self._found: dict[Parameter, Tensor] = {}
        self._left: dict[Parameter, list[Callable[[], Tensor]]] = {}

    def back(self, edge: GradientEdge, *, gradient: Tensor, x: Tensor) -> Tensor | None:
        """Go back from `edge`, which has this gradient, and free the graph: the gradient of `x`, if
        it requires one and has one. Communicates what backward does, but for what put-off products
        need."""
        leaves = [*self._parameters, *([x] if x.requires_grad else [])]
        if not leaves:
            return None
        with self._marked():
            found = torch.autograd.grad([edge], leaves, [gradient], allow_unused=True)
        own = zip(self._parameters, found, strict=False)
        self._found = {each: gradient for each, gradient in own if gradient is not None}
        return found[-1] if x.requires_grad else None

    def put_off(self, parameter: Parameter, compute: Callable[[], Tensor]) -> None:
        """Leave a summand of a parameter's gradient to be computed in `run`."""
        self._left.setdefault(parameter, []).append(compute)

    def run(self) -> None:
        """Compute what was put off, in the order of backward, and add all gradients to the
        parameters', each once. Communicates what the products need."""
        found, left = self._found, self._left
        self._found, self._left = {}, {}
        for parameter in dict.fromkeys([*(each for each in found if each not in left), *left]):
            total = None
            for compute in left.pop(parameter, []):
                total = compute() if total is None else total + compute()
            if parameter in found:
                own = found.pop(parameter)
                total = own if total is None else total + own
            torch.autograd.backward([parameter], [total])

    @contextmanager
    def _marked(self) -> Iterator[None]:
        """Inside, layers find this pass at their weights: backward may run on another thread."""
        for each in self._parameters:
            each.weight_pass = self  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for each in self._parameters:
                del each.weight_pass  # type: ignore[attr-defined]


def parameter_of(weight: Tensor) -> Parameter | None:
    """What a layer keeps of its weight to ask for a pass: nothing of one that is no parameter
    itself, such as a copy in another dtype, which would live as long as the graph."""
    return weight if isinstance(weight, Parameter) else None


def weight_pass_of(weight: Parameter | None) -> WeightPass | None:
    """The pass to which the gradient of a layer's weight is put off, None to compute it now: as in
    any backward but that of a `WeightPass`, and for a weight that is no parameter itself."""
    return getattr(weight, "weight_pass", None)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the dtype in which autocast, if it is on, has products computed; it leaves those
    of float64 alone."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype is torch.float64:
        return tensors
    return tuple(each.to(torch.get_autocast_dtype(device)) for each in tensors)


def weight_product(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of the weight [out, in] of x weight^T, from that of its result [..., out] and
    from `x` [..., in]."""
    rows, columns = gradient.flatten(0, -2), x.flatten(0, -2)
    return rows.t() @ columns


def now_or_later(weight: Parameter | None, compute: Callable[[], Tensor]) -> Tensor | None:
    """What backward returns for a weight: its gradient, or None where that is put off."""
    later = weight_pass_of(weight)
    if weight is None or later is None:
        return compute()
    later.put_off(weight, compute)
    return None


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.weight = parameter_of(weight)
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        of_weight = None
        if needs_weight:
            of_weight = now_or_later(ctx.weight, partial(weight_product, gradient, x))
        return gradient @ weight if needs_x else None, of_weight


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.weight, ctx.count = parameter_of(weight), len(weight)
        return F.embedding(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        (rows,) = ctx.saved_tensors
        compute = partial(
            torch.ops.aten.embedding_dense_backward,
            gradient,
            rows,
            num_weights=ctx.count,
            padding_idx=-1,
            scale_grad_by_freq=False,
        )
        return now_or_later(ctx.weight, compute), None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, [..., out] of `x` [..., in] and `weight` [out, in], whose gradient can be put
    off. Communicates nothing."""
    y: Tensor = _Matmul.apply(*as_autocast(x, weight))
    return y


def embedding(rows: Tensor, weight: Tensor) -> Tensor:
    """weight[rows], whose gradient can be put off. Communicates nothing."""
    y: Tensor = _Embedding.apply(weight, rows)
    return y
