"""The single-device computation of a case: results in float64, in the native dtype, or disturbed.

Results are named in the order of execution: every output by its name, then the gradients, `grad x`
for the input x and `grad weight` for the parameter weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from verify.case import Case
from verify.disturbance import Disturbing
from verify.errors import HarnessError
from verify.lens import Generated, Problem, dtype_of
from verify.oracle.contract import Contract

Results = dict[str, Tensor]
Change = Callable[[str, Generated], Tensor]


def result_names(contract: Contract) -> tuple[str, ...]:
    """The names of everything that is compared, in the order of execution."""
    inputs = [name for name, spec in contract.inputs.items() if spec.grad_placements is not None]
    parameters = [name for name in contract.parameters if name not in contract.frozen]
    return (*contract.outputs, *(f"grad {name}" for name in (*inputs, *parameters)))


@contextmanager
def one_thread() -> Iterator[None]:
    """While inside, torch computes with one thread: references are small, and more threads only
    wait for each other, on a busy machine long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Reference:
    """The reference of one replica. `problem` is what it is given."""

    case: Case
    contract: Contract
    problem: Problem

    @cached_property
    def results(self) -> Results:
        """Full results in float64. Raises HarnessError where they are not finite, or all zero
        although nothing asked for that."""
        results = self.evaluate(torch.float64)
        for name, value in results.items():
            if not value.isfinite().all():
                raise HarnessError(f"reference: {name} of {self.case} is not finite")
        if not self._may_vanish() and not any(value.any() for value in results.values()):
            raise HarnessError(f"reference: every result of {self.case} is zero; it shows nothing")
        if self.case.lens == "exact":
            self._check_exact(results)
        return results

    @cached_property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The dtype of every result when it is computed in the case's."""
        return {name: value.dtype for name, value in self.native.items()}

    @cached_property
    def native(self) -> Results:
        """Full results computed in the case's dtype."""
        dtype = dtype_of(self.case)
        return self.results if dtype is torch.float64 else self.rounded(dtype, 0)

    def rounded(self, dtype: torch.dtype, draw: int) -> Results:
        """Full results computed in `dtype`; for a draw above 0, with the operands of all arithmetic
        moved by one unit roundoff up or down, as the draw has it. What ranks have parts of is moved
        by that of all parts: they compute with these, which are larger than their sum. So backward
        goes from two upstream gradients that are as large as all parts together, and their sum the
        gradient: what cancels on the way leaves the errors of parts."""
        if draw == 0:
            return self.evaluate(dtype)
        generator = torch.Generator().manual_seed(draw)
        roundoff = torch.finfo(dtype).eps / 2

        def change(name: str, given: Generated) -> Tensor:
            if given.parts is None:
                return given.full
            signs = torch.randint(0, 2, given.full.shape, generator=generator) * 2 - 1
            return given.full + given.magnitude * roundoff * signs

        with Disturbing(generator):
            return self.evaluate(dtype, change, in_parts=True)

    def evaluate(
        self, dtype: torch.dtype, change: Change | None = None, *, in_parts: bool = False
    ) -> Results:
        """Full results in `dtype`; `change` gives other values for what is generated, by name
        (`grad y` for the upstream gradient of y). With `in_parts` backward goes twice, as
        `rounded` says, where an upstream gradient is a sum."""
        inputs = {n: self._leaf(n, g, dtype, change) for n, g in self.problem.inputs.items()}
        parameters = {
            n: self._leaf(n, g, dtype, change) for n, g in self.problem.parameters.items()
        }
        for name, spec in self.contract.inputs.items():
            inputs[name].requires_grad_(spec.grad_placements is not None)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name not in self.contract.frozen)
        with torch.enable_grad():
            outputs = self.contract.reference(inputs, parameters)
        if set(outputs) != set(self.contract.outputs):
            raise HarnessError(
                f"reference: {self.case.concept} returns {sorted(outputs)}, its contract names"
                f" {sorted(self.contract.outputs)}"
            )
        results = {name: outputs[name].detach() for name in self.contract.outputs}
        leaves = {f"grad {n}": t for n, t in (*inputs.items(), *parameters.items())}
        leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        return results | self._gradients(outputs, leaves, dtype, change, in_parts=in_parts)

    def _gradients(
        self,
        outputs: Mapping[str, Tensor],
        leaves: Mapping[str, Tensor],
        dtype: torch.dtype,
        change: Change | None,
        *,
        in_parts: bool,
    ) -> Results:
        names = [name for name in self.problem.upstream if outputs[name].requires_grad]
        if not names or not leaves:
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        given = [self.problem.upstream[name] for name in names]
        upstream = [
            self._leaf(f"grad {n}", g, dtype, change).to(outputs[n].dtype)
            for n, g in zip(names, given, strict=True)
        ]
        passes: list[Sequence[Tensor]] = [upstream]
        if in_parts and any(each.parts is not None for each in given):
            passes = list(zip(*map(_halves, upstream, given), strict=True))
        found = [
            torch.autograd.grad(
                [outputs[name] for name in names],
                list(leaves.values()),
                each,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for each in passes
        ]
        return {name: sum(own[1:], own[0]) for name, *own in zip(leaves, *found, strict=True)}

    @staticmethod
    def _leaf(name: str, given: Generated, dtype: torch.dtype, change: Change | None) -> Tensor:
        if not given.full.is_floating_point():
            return given.full
        value = given.full if change is None else change(name, given)
        return value.detach().to(dtype, copy=True)

    def _may_vanish(self) -> bool:
        """Whether something in the case explains results that are all zero."""
        options = self.case.options
        # Large logits make a softmax that is exactly one and zeros; small tensors, and few tokens,
        # may be dropped, or padding, or below zero where that is cut off, as a whole.
        asked = any(options.get(name) for name in ("zeros", "ignored", "padding", "dropped"))
        asked = asked or options.get("activation") == "squared_relu"
        asked = asked or bool(self.contract.masks) or options.get("magnitude", 1) != 1
        classes = [spec.high for spec in self.contract.inputs.values() if spec.high is not None]
        return asked or any(high == 1 for high in classes)

    def _check_exact(self, results: Results) -> None:
        """The results of the absolute values of everything bound every partial sum of the real
        ones, in whatever order it is taken; and all are integers of one unit, as terms are products
        of what is given. Raises HarnessError where a sum may not be representable."""
        unit = self._unit()
        limit = unit * 2 / torch.finfo(torch.float64).eps
        largest = self.evaluate(torch.float64, lambda name, given: given.magnitude)
        for name, value in largest.items():
            if value.numel() and float(value.max()) >= limit:
                raise HarnessError(
                    f"lens: {name} of {self.case} reaches {float(value.max()):.3g}; the exact lens"
                    f" needs every sum below {limit:.3g}"
                )
            for each in (value, results[name]):
                if bool((broken := each.double() % unit).any()):
                    found = float(each[broken != 0][0])
                    raise HarnessError(
                        f"lens: {name} of {self.case} has {found!r}, no multiple of {unit:g}; of"
                        " what its contract calls linear every term is a product of what is given"
                    )

    def _unit(self) -> float:
        """What every term is an integer multiple of: what is given are integers, inputs times the
        option `magnitude`, and no term has one of them twice."""
        magnitude = float(self.case.options.get("magnitude") or 1)
        scaled = [each for each in self.problem.inputs.values() if each.full.is_floating_point()]
        return min(magnitude, 1.0) ** len(scaled)


def _halves(upstream: Tensor, given: Generated) -> tuple[Tensor, Tensor]:
    """Two tensors as large as the parts of an upstream gradient, whose sum it is; of one without
    parts itself and nothing."""
    if given.parts is None:
        return upstream, torch.zeros_like(upstream)
    size = given.magnitude.to(upstream.dtype)
    return (upstream + size) / 2, (upstream - size) / 2
