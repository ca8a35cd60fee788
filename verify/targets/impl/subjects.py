"""impl's modules and operations as subjects, one builder for each concept.

The adapters only rename tensors and say what case option is which argument. Names are those of the
contracts in `verify.oracle`; placements are read from the attributes of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from impl import mappings
from impl.cross_entropy import vocab_parallel_cross_entropy
from impl.embedding import VocabParallelEmbedding
from impl.groups import Groups
from impl.linear import ColumnParallelLinear, RowParallelLinear
from impl.mlp import MLP
from verify.case import Case
from verify.targets.impl import (
    attention,
    checkpoint,
    context,
    data,
    dropout,
    gpt,
    initialise,
    interrupted_save,
    linear_cross_entropy,
    moe,
    norm,
    pipeline,
    positions,
    recompute,
    training,
    transformer,
)
from verify.targets.impl.subject import (
    Builder,
    ModuleSubject,
    OperationSubject,
    Tensors,
    common,
    switches,
)

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "column_linear": ("bias", "gather_output", "skip_bias_add", "frozen_weight", "flat"),
    "row_linear": ("bias", "input_is_parallel", "skip_bias_add", "frozen_weight", "flat"),
    "vocab_embedding": ("scatter",),
    "vocab_cross_entropy": ("label_smoothing", "z_loss", "ignored", "mask_padding"),
    "tp_mlp": ("bias", "activation", "packed"),
    "gather_from_sp": ("tensor_parallel_output_grad",),
    **attention.OPTIONS,
    **context.OPTIONS,
    **data.OPTIONS,
    **linear_cross_entropy.OPTIONS,
    **norm.OPTIONS,
    **pipeline.OPTIONS,
    **positions.OPTIONS,
    **moe.OPTIONS,
    **dropout.OPTIONS,
    **gpt.OPTIONS,
    **checkpoint.OPTIONS,
    **interrupted_save.OPTIONS,
    **initialise.OPTIONS,
    **recompute.OPTIONS,
    **training.OPTIONS,
    **transformer.OPTIONS,
}


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
        **common(case, groups),
        **switches(case, "bias", "skip_bias_add", own_option),
    )
    module.weight.requires_grad_(not case.options.get("frozen_weight", False))

    def call(inputs: Tensors) -> Tensors:
        y, bias = module(inputs["x"])
        return {"y": y} if bias is None else {"y": y, "bias": bias}

    return ModuleSubject(module, groups, call)


def vocab_embedding(case: Case, groups: Groups) -> ModuleSubject:
    """`VocabParallelEmbedding` of tokens [batch, sequence]."""
    scattered: dict[str, Any] = {"scatter_to_sequence": True} if case.options.get("scatter") else {}
    module = VocabParallelEmbedding(
        case.shape["vocabulary"],
        hidden=case.shape["hidden"],
        **scattered,
        **common(case, groups),
    )
    return ModuleSubject(module, groups, lambda inputs: {"y": module(inputs["tokens"])})


def vocab_cross_entropy(case: Case, groups: Groups) -> OperationSubject:
    """`vocab_parallel_cross_entropy` of logits [sequence, batch, vocabulary / tp]."""
    given: dict[str, Any] = {
        name: float(case.options[name] or 0.0)
        for name in ("label_smoothing", "z_loss")
        if name in case.options
    }
    if case.options.get("mask_padding"):
        given["real_vocabulary"] = case.shape.get("real_vocabulary")

    def call(inputs: Tensors) -> Tensors:
        loss = vocab_parallel_cross_entropy(
            inputs["logits"], targets=inputs["targets"], group=groups.tp, **given
        )
        return {"loss": loss}

    return OperationSubject(call)


def tp_mlp(case: Case, groups: Groups) -> ModuleSubject:
    """`MLP`."""
    module = MLP(
        case.shape["hidden"],
        ffn=case.shape["ffn"],
        activation=str(case.options.get("activation", "gelu")),
        **common(case, groups),
        **switches(case, "bias", "packed"),
    )
    return ModuleSubject(module, groups, lambda inputs: {"y": module(inputs["x"])})


def gather_from_sp(case: Case, groups: Groups) -> OperationSubject:
    """`gather_from_sequence_parallel_region`, its backward a reduce-scatter or a split."""
    operation = partial(
        mappings.gather_from_sequence_parallel_region,
        **switches(case, "tensor_parallel_output_grad"),
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
    **attention.BUILDERS,
    **dropout.BUILDERS,
    **gpt.BUILDERS,
    **checkpoint.BUILDERS,
    **interrupted_save.BUILDERS,
    **initialise.BUILDERS,
    **recompute.BUILDERS,
    **training.BUILDERS,
    **transformer.BUILDERS,
    **context.BUILDERS,
    **data.BUILDERS,
    **linear_cross_entropy.BUILDERS,
    **norm.BUILDERS,
    **pipeline.BUILDERS,
    **positions.BUILDERS,
    **moe.BUILDERS,
}
