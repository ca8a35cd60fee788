"""Rounding errors made visible: a computation whose every operand is moved by one unit roundoff.

Monte Carlo arithmetic (Parker, Pierce, Eggert: Monte Carlo arithmetic, Computing in Science and
Engineering 2(4), 2000) at the grain of torch's operators. An error of rounding inside an operator
is, to first order, that of operands changed a little (backward stability; Higham, Accuracy and
Stability of Numerical Algorithms, 2nd ed., 2002, chapters 1 and 3). To move what a computation is
given shows how that reaches the results; but where large terms cancel further on, as they do in the
gradient of a softmax of which one share is nearly one, what remains of them are the errors that
they got on the way, which have to be made there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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


class Disturbing(TorchDispatchMode):
    """While inside, operators that round get every floating operand moved by one unit roundoff of
    its dtype, up or down as `generator` draws, forward and backward. What an operator writes to is
    left as it is."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; to tell the compiler so would import it, for seconds."""
        return False

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if function.overloadpacket.__name__ not in ARITHMETIC:
            return function(*args, **given)
        written = 1 if function._schema.is_mutable else 0
        operands = [a if i < written else self._moved(a) for i, a in enumerate(args)]
        return function(*operands, **given)

    def _moved(self, operand: Any) -> Any:
        if not isinstance(operand, Tensor):
            return operand
        if operand.is_complex():
            return torch.view_as_complex(self._moved(torch.view_as_real(operand)))
        return moved(operand, self._generator) if operand.is_floating_point() else operand


def moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """`tensor` times 1 plus or minus the unit roundoff of its dtype, rounded: a neighbour of what
    it was, where that is narrower than float64, or a power of two itself."""
    roundoff = torch.finfo(tensor.dtype).eps / 2
    # In float64 from the start: 1 + 2**-24 is 1 in float32.
    signs = torch.randint(0, 2, tensor.shape, generator=generator).double() * 2 - 1
    return (tensor.double() * (1 + roundoff * signs)).to(tensor.dtype)
