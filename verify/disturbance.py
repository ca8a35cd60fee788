"""Rounding errors made visible: a computation whose every operand is moved by one unit roundoff.

Monte Carlo arithmetic (Parker, Pierce, Eggert: Monte Carlo arithmetic, Computing in Science and
Engineering 2(4), 2000) at the grain of torch's operators. An error of rounding inside an operator
is, to first order, that of operands changed a little (backward stability; Higham, Accuracy and
Stability of Numerical Algorithms, 2nd ed., 2002, chapters 1 and 3). To move what a computation is
given shows how that reaches the results; but where large terms cancel further on, as they do in the
gradient of a softmax of which one share is nearly one, what remains of them are the errors that
they got on the way, which have to be made there.

A contraction that is computed wide and then narrowed, as the gradient of a norm's weight in
bfloat16 is, is rounded once here; ranks round their parts of it, each of which may be larger than
the sum. So what it contracts is moved by the roundoff that its result is narrowed to.

Another formula may have other terms. The gradient of a softmax needs the sum of shares times their
gradients, which is that of the output times its gradient, and attention that keeps no shares takes
the latter (arXiv:2205.14135, appendix B.4). Of one key, or where gradients are alike, nothing is
left here; there the errors of the output are, of its size. `of_output` makes them.

Of a layer norm the input's gradient is as exact here as what is left when the mean is taken off.
Those who keep the mean and the spread, as torch does, normalise again in backward, and are left
with errors of a mean that may be a hundred times what is left. `of_mean` makes those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Others move elements, or decide between them (comparisons, sorts, maxima): and a decision on what
# was moved for it alone would not be that of the rest of the computation.
_ROUNDING = """
    _log_softmax _log_softmax_backward_data _softmax _softmax_backward_data add add_ addcdiv
    addcdiv_ addcmul addcmul_ addmm baddbmm bmm cumsum div div_ embedding_dense_backward erf exp
    expm1 gelu gelu_backward index_add index_add_ index_put index_put_ lerp lerp_
    linalg_vector_norm log log1p logsumexp mean mm mul mul_ native_layer_norm
    native_layer_norm_backward nll_loss2d_backward nll_loss2d_forward nll_loss_backward
    nll_loss_forward pow reciprocal rsqrt rsub scatter_add sigmoid sigmoid_backward silu
    silu_backward sqrt sqrt_ sub sub_ sum tanh tanh_backward var var_mean
"""
ARITHMETIC = frozenset(_ROUNDING.split())
CONTRACTIONS = frozenset(("addmm", "baddbmm", "bmm", "mm", "sum"))


@dataclass(eq=False)
class _Contraction:
    """A contraction that was computed: `result`, of `function` with operands as they were given,
    and `current` until one of them is written to."""

    result: Tensor
    function: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    current: bool = True


class Disturbing(TorchDispatchMode):
    """While inside, operators that round get every floating operand moved by one unit roundoff of
    its dtype, up or down as `generator` draws, forward and backward; of a contraction whose result
    is narrowed, by that of the narrower dtype. What an operator writes to is left as it is."""

    active: ClassVar[Disturbing | None] = None

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator
        self._before: Disturbing | None = None
        # By the addresses of storages, which are given to no others as long as these live: the
        # contractions by their results, and those that change with what is there.
        self._contractions: dict[int, _Contraction] = {}
        self._changing: dict[int, list[_Contraction]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; to tell the compiler so would import it, for seconds."""
        return False

    def __enter__(self) -> Disturbing:
        self._before, Disturbing.active = Disturbing.active, self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Disturbing.active = self._before

    def signs(self, like: Tensor) -> Tensor:
        """1 or -1, as drawn, for each element."""
        signs = torch.empty(like.shape, dtype=like.dtype)
        return signs.random_(0, 2, generator=self._generator).mul_(2).sub_(1)

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given, name = dict(kwargs or {}), function.overloadpacket.__name__
        written = _written(function, args, given) if function._schema.is_mutable else []
        for address in map(_address, written):
            self._forget(address)
        if name == "_to_copy":
            return function(self._narrowed(args[0], given.get("dtype")), **given)
        if name not in ARITHMETIC:
            return function(*args, **given)
        result = function(*self._all_moved(args, written), **given)
        if name in CONTRACTIONS and result.is_floating_point() and result.numel():
            self._keep(_Contraction(result, function, args, given))
        return result

    def _keep(self, contraction: _Contraction) -> None:
        self._contractions[_address(contraction.result)] = contraction
        for each in (contraction.result, *contraction.args):
            if isinstance(each, Tensor):
                self._changing.setdefault(_address(each), []).append(contraction)

    def _forget(self, address: int) -> None:
        """What is there changes: neither a contraction nor its operands are what they were."""
        for contraction in self._changing.pop(address, ()):
            contraction.current = False

    def _all_moved(
        self,
        operands: Sequence[Any],
        kept: Sequence[Tensor] = (),
        dtype: torch.dtype | None = None,
    ) -> list[Any]:
        """The operands, moved by the roundoff of `dtype` or their own, all but those `kept`."""
        same = set(map(id, kept))
        return [a if id(a) in same else self._moved(a, dtype) for a in operands]

    def _narrowed(self, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        """What is to be given a dtype: a contraction, if that is narrower than its own, of operands
        that were moved by the roundoff of that."""
        contraction = self._contractions.get(_address(tensor))
        if contraction is None or not contraction.current or not _narrower(dtype, tensor.dtype):
            return tensor
        operands = self._all_moved(contraction.args, dtype=dtype)
        again = contraction.function(*operands, **contraction.kwargs)
        return again.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _moved(self, operand: Any, dtype: torch.dtype | None) -> Any:
        if not isinstance(operand, Tensor):
            return operand
        if operand.is_complex():
            return torch.view_as_complex(self._moved(torch.view_as_real(operand), dtype))
        if not operand.is_floating_point():
            return operand
        return moved(operand, self._generator, dtype)


class _OfOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, scores: Tensor, shares: Tensor, mode: Disturbing) -> Tensor:
        ctx.save_for_backward(out, shares)
        ctx.mode = mode
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,), (out, shares) = gradients, ctx.saved_tensors
        wide = torch.promote_types(out.dtype, torch.float32)
        rounded = out.to(wide) * ctx.mode.signs(out) * (torch.finfo(out.dtype).eps / 2)
        errors = shares * (gradient.to(wide) * rounded).sum(-1, keepdim=True)
        return gradient, errors.to(shares.dtype), None, None


def of_output(out: Tensor, scores: Tensor, shares: Tensor) -> Tensor:
    """`out` [..., e], the sum of values by `shares`, the softmax of `scores` [..., keys]; in a
    disturbed run scores get gradients as if the sum of `out` times its gradient stood for that of
    shares times theirs, with every element of `out` off by one unit roundoff of its own."""
    mode = Disturbing.active
    return out if mode is None else _OfOutput.apply(out, scores, shares.detach(), mode)


class _OfMean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, normal: Tensor, x: Tensor, mean: Tensor, root: Tensor, mode: Disturbing
    ) -> Tensor:
        ctx.save_for_backward(normal, mean, root)
        ctx.mode = mode
        return normal.view_as(normal)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (gradient,), (normal, mean, root) = gradients, ctx.saved_tensors
        roundoff = mean / root * (torch.finfo(mean.dtype).eps / 2)
        of_normal = ctx.mode.signs(mean) * (gradient * normal).mean(-1, keepdim=True)
        of_sums = ctx.mode.signs(mean) * gradient.norm(dim=-1, keepdim=True) / normal.shape[-1]
        errors = roundoff * (of_normal + normal * of_sums) / root
        return gradient, errors, None, None, None


def of_mean(normal: Tensor, x: Tensor, *, mean: Tensor, root: Tensor) -> Tensor:
    """`normal` [..., features], (x - mean) / root; in a disturbed run x gets a gradient as if it
    were computed as (g - normal mean(g normal) - mean(g)) / root from the gradient g of `normal`:
    with a mean of x that is off by one unit roundoff of its own in the first `normal`, and sums of
    g x, which may be taken before the mean is, in the second."""
    mode = Disturbing.active
    if mode is None:
        return normal
    return _OfMean.apply(normal, x, mean.detach(), root.detach(), mode)


def moved(tensor: Tensor, generator: torch.Generator, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor` times 1 plus or minus the unit roundoff of `dtype`, of its own unless given, rounded
    to its own: a neighbour of what it was, where that is narrower than float64, or a power of two
    itself."""
    eps = torch.finfo(dtype or tensor.dtype).eps
    # In float64 from the start: 1 + 2**-24 is 1 in float32.
    ups = torch.empty(tensor.shape, dtype=torch.float64).random_(0, 2, generator=generator)
    return ups.mul_(eps).add_(1 - eps / 2).mul_(tensor).to(tensor.dtype)


def _written(function: Any, args: Sequence[Any], given: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a call writes to."""
    found = []
    for i, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else given.get(argument.name)
            found += [value] if isinstance(value, Tensor) else list(value or ())
    return found


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _narrower(dtype: torch.dtype | None, than: torch.dtype) -> bool:
    return (
        dtype is not None
        and dtype.is_floating_point
        and torch.finfo(dtype).eps > torch.finfo(than).eps
    )
