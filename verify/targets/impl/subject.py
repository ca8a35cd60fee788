"""What a subject of impl is: a module or an operation, its inputs and outputs renamed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.init import constant_

from impl.gradients import finish_sequence_parallel_gradients
from impl.groups import Groups
from verify.case import Case
from verify.placement import Placements
from verify.target import Subject
from verify.targets.megatron_attributes import placements_of

Tensors = Mapping[str, Tensor]


class ModuleSubject:
    """A module whose `forward` is adapted by `call`."""

    def __init__(self, module: Module, groups: Groups, call: Callable[[Tensors], Tensors]) -> None:
        self.module, self._groups, self._call = module, groups, call

    def parameters(self) -> Mapping[str, tuple[Parameter, Placements]]:
        """Every parameter by its name, with the placement that its attributes say."""
        return {
            name: (parameter, placements_of(parameter))
            for name, parameter in self.module.named_parameters()
        }

    def forward(self, inputs: Tensors) -> Tensors:
        """Local inputs to local outputs."""
        return self._call(inputs)

    def finish_gradients(self) -> None:
        """The sum over tp of gradients that each rank computed from its part of the sequence."""
        finish_sequence_parallel_gradients(self.module.parameters(), group=self._groups.tp)


class OperationSubject:
    """An operation without parameters."""

    def __init__(self, call: Callable[[Tensors], Tensors]) -> None:
        self._call = call

    def parameters(self) -> Mapping[str, tuple[Parameter, Placements]]:
        """None."""
        return {}

    def forward(self, inputs: Tensors) -> Tensors:
        """Local inputs to local outputs."""
        return self._call(inputs)

    def finish_gradients(self) -> None:
        """No parameters, no gradients."""


Builder = Callable[[Case, Groups], Subject]


def common(case: Case, groups: Groups) -> dict[str, Any]:
    """The arguments that every module takes, sequence parallelism only if there is some: the
    default is under test too. The harness writes all weights: one that it forgot would be NaN."""
    given = {"sequence_parallel": True} if case.layout.sequence_parallel else {}
    return {
        "group": groups.tp,
        "init": partial(constant_, val=math.nan),
        "dtype": getattr(torch, case.dtype),
        **given,
    }


def switches(case: Case, *names: str) -> dict[str, Any]:
    """The options that the case names, as arguments; the others have the module's defaults."""
    return {name: bool(case.options[name]) for name in names if name in case.options}
