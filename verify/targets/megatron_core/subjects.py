"""megatron-core's modules and operations as subjects, one builder for each concept.

Every builder returns what a user of megatron-core would build, with its defaults. The adapters only
rename tensors and parameters and, where Megatron's MLP returns a bias for the caller to add, add it
as its transformer layer does. Names and placements are those of the contract in `verify.oracle`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import (
    _allreduce_non_tensor_model_parallel_grads,
)
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor
from torch.nn import Module, Parameter

from verify.case import Case
from verify.placement import Placements
from verify.targets.megatron_attributes import placements_of

Tensors = Mapping[str, Tensor]

_LINEAR = ("bias", "skip_bias_add", "frozen_weight", "flat")
OPTIONS: Mapping[str, frozenset[str]] = {
    "column_linear": frozenset({"gather_output", *_LINEAR}),
    "row_linear": frozenset({"input_is_parallel", *_LINEAR}),
    "vocab_embedding": frozenset({"scatter"}),
    "vocab_cross_entropy": frozenset({"label_smoothing", "ignored", "mask_padding"}),
    "tp_mlp": frozenset({"bias", "activation", "packed"}),
    "gather_from_sp": frozenset({"tensor_parallel_output_grad"}),
}
# The arguments of a configuration.
ACTIVATIONS: dict[str, Mapping[str, Any]] = {
    "gelu": {"activation_func": torch.nn.functional.gelu},
    "swiglu": {"activation_func": torch.nn.functional.silu, "gated_linear_unit": True},
    "geglu": {"activation_func": torch.nn.functional.gelu, "gated_linear_unit": True},
}
# Versions before 0.14 have none.
if find_spec("megatron.core.activations"):
    from megatron.core.activations import squared_relu

    ACTIVATIONS["squared_relu"] = {"activation_func": squared_relu}


def config_of(
    case: Case, *, kind: type[TransformerConfig] = TransformerConfig, **sizes: Any
) -> TransformerConfig:
    """The configuration, of this kind, of a module in `case.dtype`, on `case.layout`.

    Sequence parallelism over one rank is left out, because Megatron's configuration refuses it
    where it would have no effect.
    """
    layout = case.layout
    given: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": layout.tp,
        "num_attention_heads": layout.tp,
        "kv_channels": 1,
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.sequence_parallel and layout.tp > 1,
        "params_dtype": getattr(torch, case.dtype),
        **sizes,
    }
    return kind(**given)


class ModuleSubject:
    """A module whose `forward` is adapted by `call`. `names` maps Megatron's parameter names, up to
    the last dot, to the contract's."""

    def __init__(
        self,
        module: Module,
        config: TransformerConfig,
        call: Callable[[Tensors], Tensors],
        *,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.module, self.config, self._call = module, config, call
        self._names = names or {}

    def parameters(self) -> Mapping[str, tuple[Parameter, Placements]]:
        """Every parameter by the contract's name, with the placement that its attributes say."""
        return {
            self._name(name): (parameter, placements_of(parameter))
            for name, parameter in self.module.named_parameters()
        }

    def _name(self, name: str) -> str:
        prefix, _, last = name.rpartition(".")
        return f"{self._names.get(prefix, prefix)}.{last}" if prefix else last

    def forward(self, inputs: Tensors) -> Tensors:
        """Local inputs to local outputs."""
        return self._call(inputs)

    def finish_gradients(self) -> None:
        """Megatron's own sum over tensor parallel ranks, as `finalize_model_grads` calls it, of the
        gradients of replicated parameters that each rank computed from its part of the sequence."""
        self.module.ddp_config = DistributedDataParallelConfig()
        _allreduce_non_tensor_model_parallel_grads([self.module], self.config)


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


def _freeze(module: Module, case: Case) -> None:
    if case.options.get("frozen_weight", False):
        module.weight.requires_grad_(False)


def _named(output: Tensor, bias: Tensor | None) -> Tensors:
    return {"y": output} if bias is None else {"y": output, "bias": bias}


def column_linear(case: Case) -> ModuleSubject:
    """`ColumnParallelLinear`; with skip_bias_add the bias is a second output."""
    config = config_of(case)
    module = tensor_parallel.ColumnParallelLinear(
        case.shape["in_features"],
        case.shape["out_features"],
        config=config,
        init_method=config.init_method,
        bias=bool(case.options.get("bias", True)),
        gather_output=bool(case.options.get("gather_output", False)),
        skip_bias_add=bool(case.options.get("skip_bias_add", False)),
    )
    _freeze(module, case)
    return ModuleSubject(module, config, lambda inputs: _named(*module(inputs["x"])))


def row_linear(case: Case) -> ModuleSubject:
    """`RowParallelLinear`; with skip_bias_add the bias is a second output."""
    config = config_of(case)
    module = tensor_parallel.RowParallelLinear(
        case.shape["in_features"],
        case.shape["out_features"],
        config=config,
        init_method=config.init_method,
        bias=bool(case.options.get("bias", True)),
        input_is_parallel=bool(case.options.get("input_is_parallel", True)),
        skip_bias_add=bool(case.options.get("skip_bias_add", False)),
    )
    _freeze(module, case)
    return ModuleSubject(module, config, lambda inputs: _named(*module(inputs["x"])))


def vocab_embedding(case: Case) -> ModuleSubject:
    """`VocabParallelEmbedding` of tokens [batch, sequence]."""
    config = config_of(case)
    module = tensor_parallel.VocabParallelEmbedding(
        case.shape["vocabulary"],
        case.shape["hidden"],
        init_method=config.init_method,
        reduce_scatter_embeddings=bool(case.options.get("scatter", False)),
        config=config,
    )
    return ModuleSubject(module, config, lambda inputs: {"y": module(inputs["tokens"])})


def vocab_cross_entropy(case: Case) -> OperationSubject:
    """`vocab_parallel_cross_entropy` of logits [sequence, batch, vocabulary / tp]."""
    smoothing = float(case.options.get("label_smoothing", 0.0) or 0.0)

    def call(inputs: Tensors) -> Tensors:
        loss = tensor_parallel.vocab_parallel_cross_entropy(
            inputs["logits"], inputs["targets"], smoothing
        )
        return {"loss": loss}

    return OperationSubject(call)


def tp_mlp(case: Case) -> ModuleSubject:
    """`MLP` with Megatron's own linear layers (its local specification)."""
    ffn = case.shape["ffn"]
    config = config_of(
        case,
        hidden_size=case.shape["hidden"],
        ffn_hidden_size=ffn,
        add_bias_linear=bool(case.options.get("bias", True)),
        **ACTIVATIONS[str(case.options.get("activation", "gelu"))],
    )
    parts = MLPSubmodules(
        linear_fc1=tensor_parallel.ColumnParallelLinear,
        linear_fc2=tensor_parallel.RowParallelLinear,
    )
    module = MLP(config, parts, ffn_hidden_size=ffn)

    def call(inputs: Tensors) -> Tensors:
        output, bias = module(inputs["x"])
        return {"y": output if bias is None else output + bias}

    names = {"linear_fc1": "fc1", "linear_fc2": "fc2"}
    return ModuleSubject(module, config, call, names=names)


def _mapping(operation: Callable[[Tensor], Tensor], case: Case) -> OperationSubject:
    return OperationSubject(lambda inputs: {"y": operation(inputs["x"])})


def gather_from_sp(case: Case) -> OperationSubject:
    """`gather_from_sequence_parallel_region`, its backward a reduce-scatter or a split."""
    partial_gradient = bool(case.options.get("tensor_parallel_output_grad", True))
    gather = partial(
        mappings.gather_from_sequence_parallel_region,
        tensor_parallel_output_grad=partial_gradient,
    )
    return _mapping(gather, case)


def _sequence_to_hidden(x: Tensor) -> Tensor:
    """[s/tp, b, h] to [s, b, h/tp] through Megatron's exchange of [tokens, hidden]."""
    return mappings.all_to_all_sp2hp(x).unflatten(0, (-1, x.shape[1]))


def _hidden_to_sequence(x: Tensor) -> Tensor:
    """[s, b, h/tp] to [s/tp, b, h] through Megatron's exchange of [tokens, hidden]."""
    return mappings.all_to_all_hp2sp(x).unflatten(0, (-1, x.shape[1]))


_OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "copy_to_tp": mappings.copy_to_tensor_model_parallel_region,
    "reduce_from_tp": mappings.reduce_from_tensor_model_parallel_region,
    "scatter_to_tp": mappings.scatter_to_tensor_model_parallel_region,
    "gather_from_tp": mappings.gather_from_tensor_model_parallel_region,
    "scatter_to_sp": mappings.scatter_to_sequence_parallel_region,
    "reduce_scatter_to_sp": mappings.reduce_scatter_to_sequence_parallel_region,
    "all_gather_last_dim": mappings.all_gather_last_dim_from_tensor_parallel_region,
    "reduce_scatter_last_dim": mappings.reduce_scatter_last_dim_to_tensor_parallel_region,
    "all_to_all_sp_to_hp": _sequence_to_hidden,
    "all_to_all_hp_to_sp": _hidden_to_sequence,
}
BUILDERS: dict[str, Callable[[Case], ModuleSubject | OperationSubject]] = {
    "column_linear": column_linear,
    "row_linear": row_linear,
    "vocab_embedding": vocab_embedding,
    "vocab_cross_entropy": vocab_cross_entropy,
    "tp_mlp": tp_mlp,
    "gather_from_sp": gather_from_sp,
    **{concept: partial(_mapping, operation) for concept, operation in _OPERATIONS.items()},
}


def lacks(case: Case) -> str | None:
    """Why megatron-core or this adapter cannot do a case; None where it can."""
    if case.concept == "vocab_cross_entropy":
        return _cross_entropy_lacks(case)
    if case.concept == "tp_mlp" and case.options.get("packed") is False:
        return "its gate and up are one packed weight"
    if case.concept == "tp_mlp" and case.options.get("activation", "gelu") not in ACTIVATIONS:
        return f"no adapter for the activation {case.options['activation']}"
    return _means_something_else(case)


def _means_something_else(case: Case) -> str | None:
    """Options and sizes that the contracts refuse, and megatron-core gives a meaning."""
    parallel, tp, shape = case.layout.sequence_parallel, case.layout.tp, case.shape
    if case.options.get("scatter", False) and not parallel:
        return "reduce_scatter_embeddings does not depend on sequence parallelism"
    if case.options.get("gather_output", False) and parallel:
        return "gather_output goes with sequence parallelism"
    if case.concept == "all_to_all_hp_to_sp" and shape and shape["sequence"] % tp:
        tokens = shape["sequence"] * shape["batch"]
        return None if tokens % tp else "all_to_all_hp2sp divides the tokens, not the sequence"
    return None


def _cross_entropy_lacks(case: Case) -> str | None:
    if case.options.get("ignored", False):
        return "vocab_parallel_cross_entropy has no ignore_index"
    if case.options.get("mask_padding", False):
        return "vocab_parallel_cross_entropy does not mask the padding of the vocabulary"
    if case.options.get("strides", "contiguous") != "contiguous":
        return "vocab_parallel_cross_entropy raises for logits that are not contiguous"
    if case.dtype == "float64":
        return "vocab_parallel_cross_entropy computes in float32, whatever its input"
    return None
