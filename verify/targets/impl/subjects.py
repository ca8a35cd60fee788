"""impl's modules and operations as subjects, one builder for each concept.

The adapters only rename tensors and say what case option is which argument. Names are those of the
contracts in `verify.oracle`; placements are read from the attributes of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import gelu
from torch.nn.init import constant_

from impl import mappings
from impl.cross_entropy import vocab_parallel_cross_entropy
from impl.embedding import VocabParallelEmbedding
from impl.gradients import finish_sequence_parallel_gradients
from impl.groups import Groups
from impl.linear import ColumnParallelLinear, RowParallelLinear
from impl.mlp import MLP
from verify.case import Case
from verify.placement import Placements
from verify.targets.megatron_attributes import placements_of

Tensors = Mapping[str, Tensor]

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "column_linear": ("bias", "gather_output", "skip_bias_add", "frozen_weight"),
    "row_linear": ("bias", "input_is_parallel", "skip_bias_add", "frozen_weight"),
    "vocab_embedding": ("scatter",),
    "vocab_cross_entropy": ("label_smoothing", "ignored", "mask_padding"),
    "tp_mlp": ("bias", "activation"),
    "gather_from_sp": ("tensor_parallel_output_grad",),
}
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"gelu": gelu}


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


Builder = Callable[[Case, Groups], ModuleSubject | OperationSubject]


def _common(case: Case, groups: Groups) -> dict[str, Any]:
    """The arguments that every module takes. The harness writes all weights: one that it forgot
    would be NaN."""
    return {
        "group": groups.tp,
        "init": partial(constant_, val=math.nan),
        "sequence_parallel": case.layout.sequence_parallel,
        "dtype": getattr(torch, case.dtype),
    }


def _switches(case: Case, *names: str) -> dict[str, Any]:
    """The options that the case names, as arguments; the others have the module's defaults."""
    return {name: bool(case.options[name]) for name in names if name in case.options}


def _linear(
    kind: type[ColumnParallelLinear] | type[RowParallelLinear],
    own_option: str,
    case: Case,
    groups: Groups,
) -> ModuleSubject:
    """A linear layer; with skip_bias_add the bias is a second output."""
    module = kind(
        case.shape["in_features"],
        out_features=case.shape["out_features"],
        **_common(case, groups),
        **_switches(case, "bias", "skip_bias_add", own_option),
    )
    module.weight.requires_grad_(not case.options.get("frozen_weight", False))

    def call(inputs: Tensors) -> Tensors:
        y, bias = module(inputs["x"])
        return {"y": y} if bias is None else {"y": y, "bias": bias}

    return ModuleSubject(module, groups, call)


def vocab_embedding(case: Case, groups: Groups) -> ModuleSubject:
    """`VocabParallelEmbedding` of tokens [batch, sequence]."""
    module = VocabParallelEmbedding(
        case.shape["vocabulary"],
        hidden=case.shape["hidden"],
        scatter_to_sequence=bool(case.options.get("scatter", False)),
        **_common(case, groups),
    )
    return ModuleSubject(module, groups, lambda inputs: {"y": module(inputs["tokens"])})


def vocab_cross_entropy(case: Case, groups: Groups) -> OperationSubject:
    """`vocab_parallel_cross_entropy` of logits [sequence, batch, vocabulary / tp]."""
    masked = case.options.get("mask_padding", False)
    loss = partial(
        vocab_parallel_cross_entropy,
        group=groups.tp,
        label_smoothing=float(case.options.get("label_smoothing", 0.0) or 0.0),
        real_vocabulary=case.shape.get("real_vocabulary") if masked else None,
    )
    return OperationSubject(
        lambda inputs: {"loss": loss(inputs["logits"], targets=inputs["targets"])}
    )


def tp_mlp(case: Case, groups: Groups) -> ModuleSubject:
    """`MLP`."""
    module = MLP(
        case.shape["hidden"],
        ffn=case.shape["ffn"],
        activation=ACTIVATIONS[str(case.options.get("activation", "gelu"))],
        **_common(case, groups),
        **_switches(case, "bias"),
    )
    return ModuleSubject(module, groups, lambda inputs: {"y": module(inputs["x"])})


def gather_from_sp(case: Case, groups: Groups) -> OperationSubject:
    """`gather_from_sequence_parallel_region`, its backward a reduce-scatter or a split."""
    operation = partial(
        mappings.gather_from_sequence_parallel_region,
        **_switches(case, "tensor_parallel_output_grad"),
    )
    return _mapping(operation, case, groups)


def _mapping(operation: Callable[..., Tensor], case: Case, groups: Groups) -> OperationSubject:
    return OperationSubject(lambda inputs: {"y": operation(inputs["x"], group=groups.tp)})


_OPERATIONS: Mapping[str, Callable[..., Tensor]] = {
    "copy_to_tp": mappings.copy_to_tensor_parallel_region,
    "reduce_from_tp": mappings.reduce_from_tensor_parallel_region,
    "scatter_to_tp": mappings.scatter_to_tensor_parallel_region,
    "gather_from_tp": mappings.gather_from_tensor_parallel_region,
    "scatter_to_sp": mappings.scatter_to_sequence_parallel_region,
    "reduce_scatter_to_sp": mappings.reduce_scatter_to_sequence_parallel_region,
    "all_gather_last_dim": mappings.all_gather_last_dim_from_tensor_parallel_region,
    "reduce_scatter_last_dim": mappings.reduce_scatter_last_dim_to_tensor_parallel_region,
    "all_to_all_sp_to_hp": mappings.all_to_all_sequence_to_hidden,
    "all_to_all_hp_to_sp": mappings.all_to_all_hidden_to_sequence,
}
BUILDERS: Mapping[str, Builder] = {
    "column_linear": partial(_linear, ColumnParallelLinear, "gather_output"),
    "row_linear": partial(_linear, RowParallelLinear, "input_is_parallel"),
    "vocab_embedding": vocab_embedding,
    "vocab_cross_entropy": vocab_cross_entropy,
    "tp_mlp": tp_mlp,
    "gather_from_sp": gather_from_sp,
    **{concept: partial(_mapping, operation) for concept, operation in _OPERATIONS.items()},
}
