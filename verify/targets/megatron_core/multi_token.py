"""megatron-core's multi-token prediction: what it looks up further on, as a subject, and what a
whole model has of it.

The weight that joins embeddings to states has the columns of embeddings first, and is split over
tp by its rows; here it is what the contract of models says, whole and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import (
    MTPLossLoggingHelper,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
    roll_tensor,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn import Parameter

from verify.case import Case
from verify.targets.megatron_core.layer import NAMES
from verify.targets.megatron_core.norm import Norm
from verify.targets.megatron_core.subjects import OperationSubject, Tensors

JOIN = "multi_token.weight"
_NAMES = {
    "enorm": ".embedding_norm",
    "hnorm": ".hidden_norm",
    "eh_proj": "",
    "final_layernorm": ".final_norm",
    **{f"transformer_layer.{name}": f".layer.{each}" for name, each in NAMES.items()},
}
_PACKED = "packed_seq_params"
OPTIONS: Mapping[str, frozenset[str]] = {
    "tokens_ahead": frozenset({"placement", "packed", "padded"})
}


def tokens_ahead(case: Case) -> OperationSubject:
    """`roll_tensor`, of what it gave for the depth before."""

    def call(inputs: Tensors) -> Tensors:
        # It leaves 0 where no token is, which is one here: all are raised by one meanwhile.
        rows, found = inputs["x"] + 1, []
        for _ in range(case.shape["depths"]):
            group = parallel_state.get_context_parallel_group()
            rows, _ = roll_tensor(rows, cp_group=group, **_packed(inputs))
            found.append(rows - 1)
        return {"y": torch.stack(found)}

    return OperationSubject(call)


def _packed(inputs: Tensors) -> dict[str, PackedSeqParams]:
    """The argument that says how sequences are packed, if any are."""
    if "cu_seqlens" not in inputs:
        return {}
    real, padded = inputs["cu_seqlens"], inputs["cu_seqlens_padded"]
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=real,
        cu_seqlens_kv=real,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
    )
    return {_PACKED: packed}


def depths_of(case: Case) -> int:
    """How many modules of multi-token prediction a model has."""
    return int(case.options.get("multi_token", 0) or 0)


def modules_of(case: Case, layer: ModuleSpec) -> MultiTokenPredictionBlockSubmodules | None:
    """The specification of all modules, but for its norms the local one, with such layers."""
    depths = depths_of(case)
    module = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=Norm,
            hnorm=Norm,
            eh_proj=tensor_parallel.ColumnParallelLinear,
            transformer_layer=layer,
            layer_norm=Norm,
        ),
    )
    return MultiTokenPredictionBlockSubmodules(layer_specs=[module] * depths) if depths else None


def name_of(depth: str, module: str, last: str) -> str:
    """The contract's name of a parameter of a module of the modules."""
    return f"multi_token.{depth}{_NAMES[module]}.{last}"


def whole(weights: Tensor) -> Parameter:
    """The contract's joining weights, of several modules, of this rank's rows of them. Collective
    over tp, if there are any."""
    found = weights.detach()
    if len(weights):
        group = parallel_state.get_tensor_model_parallel_group()
        parts = [torch.empty_like(found) for _ in range(group.size())]
        dist.all_gather(parts, found.contiguous(), group=group)
        found = _turned_round(torch.cat(parts, dim=1))
    return Parameter(found, requires_grad=False)


def own_rows(weights: Tensor) -> Parameter:
    """This rank's rows of the contract's joining weights."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    found = _turned_round(weights.detach()) if len(weights) else weights.detach()
    return Parameter(found.chunk(tp, dim=1)[rank].clone(), requires_grad=False)


def _turned_round(weights: Tensor) -> Tensor:
    """The columns of embeddings and of states change places."""
    return weights.roll(weights.shape[-1] // 2, dims=-1)


def losses_of(case: Case, mask: Tensor) -> Tensor:
    """The sum of the losses of every depth in the last forward pass of this stage, where they count
    by `mask` [batch, sequence], in float64: megatron-core tells their means, and adds them up."""
    means = MTPLossLoggingHelper.tracker["values"].double()
    counts = torch.stack([mask[:, depth:].sum() for depth in range(1, 1 + depths_of(case))])
    # A mean of nothing is not a number.
    found = torch.where(counts > 0, means * counts, 0.0)
    MTPLossLoggingHelper.clean_loss_in_tracker()
    return found


def modules_lack(case: Case) -> str | None:
    """Why there is no adapter for the multi-token prediction of a model."""
    options = case.options
    if not depths_of(case):
        return None
    if not options.get("multi_token_normalised", False):
        return "its modules take states behind a last norm"
    if options.get("positions") == "learned":
        return "Megatron-LM refuses learned positions beside multi-token prediction"
    if options.get("mask") == "full":
        return "behind the end of a row it looks up token 0, which all places attend to then"
    if options.get("hidden_dropout"):
        return "it drops the embeddings of tokens further on, too"
    if "experts" in case.shape:
        return "no adapter for experts beside multi-token prediction"
    if case.shape.get("hidden", 0) % case.layout.tp:
        return "its joining weight is split over tp by hidden features"
    return None


def lacks(case: Case) -> str | None:
    """Why megatron-core cannot do a case; None where it can."""
    if case.concept not in BUILDERS:
        return None
    if case.options.get("packed") and _PACKED not in signature(roll_tensor).parameters:
        return "this version looks nothing up in packed sequences"
    if case.layout.cp > 1 and case.options.get("placement", "zigzag") != "zigzag":
        return "it cuts a sequence into two chunks for each rank of cp"
    return None


BUILDERS: Mapping[str, Callable[[Case], OperationSubject]] = {"tokens_ahead": tokens_ahead}
