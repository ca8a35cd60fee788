"""megatron-core's own attention, and the two blocks by its local specification, as subjects.

TransformerEngine's attention needs CUDA; the local one is what runs on a CPU, without context
parallelism. What is the transformer block's in Megatron, the stream of random numbers around hidden
states under sequence parallelism and the addition of the last bias, is done as it does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor
from torch.nn import Parameter

from verify.case import Case
from verify.oracle.terms import in_training
from verify.placement import Placements, Shard
from verify.targets.megatron_core import stand_ins
from verify.targets.megatron_core.norm import NORMALISATIONS, Norm
from verify.targets.megatron_core.subjects import ModuleSubject, Tensors, config_of

_SCORING = frozenset({"causal", "window", "sink", "layer_number", "scale", "dropout", "training"})
OPTIONS: Mapping[str, frozenset[str]] = {
    "core_attention": _SCORING,
    "self_attention": _SCORING | {"bias"},
    "latent_attention": (_SCORING - {"scale"}) | {"norm", "rotary", "interleaved"},
}
LATENT_NAMES = {
    "linear_q_proj": "q",
    "linear_q_down_proj": "q_down",
    "linear_q_up_proj": "q_up",
    "linear_kv_down_proj": "kv_down",
    "linear_kv_up_proj": "kv_up",
    "linear_proj": "proj",
    "q_layernorm": "query_norm",
    "kv_layernorm": "kv_norm",
    "core_attention": "core",
}
_OFFSET, _SINKS = "softmax_offset", "softmax_type"


class _Up(tensor_parallel.ColumnParallelLinear):
    """`ColumnParallelLinear` of latents, which are parts of one product."""

    def forward(self, input_: Tensor, *given: Any, **named: Any) -> Any:
        """The layer of a contiguous copy, as layers of TransformerEngine take what is not."""
        return super().forward(input_.contiguous(), *given, **named)


class _CoreOfLatents(DotProductAttention):
    """`DotProductAttention`, which refuses the sizes of keys and values that `MLASelfAttention`
    gives every core. It takes the size of keys from the tensors, that of values from the
    configuration's `kv_channels`."""

    def __init__(self, *given: Any, k_channels: int = 0, v_channels: int = 0, **named: Any) -> None:
        super().__init__(*given, **named)


class AttentionSubject(ModuleSubject):
    """A module whose learnable softmax offsets are the contract's sinks."""

    def parameters(self) -> Mapping[str, tuple[Parameter, Placements]]:
        """By the contract's names. The offsets have none of the attributes that say how they lie;
        `DotProductAttention.sharded_state_dict` says it: by heads."""
        found = dict(super().parameters())
        for name in [name for name in found if name.endswith(_OFFSET)]:
            parameter, _ = found.pop(name)
            found[name.replace(_OFFSET, "sink")] = (parameter, {"tp": Shard(0)})
        return found


def _config(case: Case, *, values: str = "head_size", **sizes: Any) -> TransformerConfig:
    """The configuration of attention with the sizes and options of a case, of which the size
    `values` is that of a head's value."""
    options, shape = case.options, case.shape
    window, causal = options.get("window"), bool(options.get("causal", True))
    if options.get("sink", False):
        sizes[_SINKS] = "learnable"
    around = None if window is None else (int(window) - 1, 0 if causal else int(window) - 1)
    return config_of(
        case,
        num_attention_heads=shape["heads"],
        kv_channels=shape[values],
        window_size=around,
        softmax_scale=options.get("scale"),
        apply_query_key_layer_scaling=options.get("layer_number") is not None,
        attention_dropout=float(options.get("dropout", 0.0) or 0.0),
        fp16=case.dtype == "float16",
        bf16=case.dtype == "bfloat16",
        **sizes,
    )


def _mask_type(case: Case) -> AttnMaskType:
    return AttnMaskType.causal if case.options.get("causal", True) else AttnMaskType.no_mask


def core_attention(case: Case) -> AttentionSubject:
    """`DotProductAttention`. One group of several ranks is a group for each of them, as
    `SelfAttention` has it."""
    config = _config(
        case,
        hidden_size=case.shape["heads"] * case.shape["head_size"],
        num_query_groups=max(case.shape["groups"], case.layout.tp),
    )
    layer_number = int(case.options.get("layer_number") or 1)
    module = DotProductAttention(
        config, layer_number, _mask_type(case), "self", softmax_scale=config.softmax_scale
    ).train(in_training(case))

    def call(inputs: Tensors) -> Tensors:
        y = module(inputs["q"], inputs["k"], inputs["v"], None)
        return {"y": y.unflatten(-1, (-1, case.shape["head_size"]))}

    return AttentionSubject(module, config, call)


def self_attention(case: Case) -> AttentionSubject:
    """`SelfAttention` of Megatron's own linear layers and `DotProductAttention`."""
    config = _config(
        case,
        hidden_size=case.shape["hidden"],
        num_query_groups=case.shape["groups"],
        add_bias_linear=bool(case.options.get("bias", True)),
    )
    parts = SelfAttentionSubmodules(
        linear_qkv=tensor_parallel.ColumnParallelLinear,
        core_attention=DotProductAttention,
        linear_proj=tensor_parallel.RowParallelLinear,
    )
    module = SelfAttention(
        config, parts, int(case.options.get("layer_number") or 1), _mask_type(case)
    ).train(in_training(case))

    def call(inputs: Tensors) -> Tensors:
        with forked(case):
            output, bias = module(inputs["x"], None)
        return {"y": output if bias is None else output + bias}

    names = {"linear_qkv": "qkv", "linear_proj": "proj", "core_attention": "core"}
    return AttentionSubject(module, config, call, names=names)


def latent_attention(case: Case) -> AttentionSubject:
    """`MLASelfAttention` of Megatron's own linear layers and `DotProductAttention`."""
    norm = str(case.options.get("norm", "none"))
    config = _config(
        case,
        values="value_size",
        hidden_size=case.shape["hidden"],
        add_bias_linear=False,
        **({} if norm == "none" else {"normalization": NORMALISATIONS[norm], "qk_layernorm": True}),
        **latent_sizes(case),
    )
    module = MLASelfAttention(
        config,
        latent_parts(normalised=norm != "none"),
        int(case.options.get("layer_number") or 1),
        _mask_type(case),
    ).train(in_training(case))

    def call(inputs: Tensors) -> Tensors:
        with forked(case):
            output, _ = module(inputs["x"], None)
        return {"y": output}

    return AttentionSubject(module, config, call, names=LATENT_NAMES)


def latent_sizes(case: Case) -> dict[str, Any]:
    """What a configuration says of latents: its kind, their sizes, those of heads, and plain
    positions, of all that shares the part with positions unless the case has a rotary_dim."""
    shape, rope = case.shape, case.shape["rope_size"]
    return {
        "kind": MLATransformerConfig,
        "q_lora_rank": shape.get("q_lora"),
        "kv_lora_rank": shape["kv_lora"],
        "qk_head_dim": shape["head_size"],
        "qk_pos_emb_head_dim": rope,
        "v_head_dim": shape["value_size"],
        "rope_type": "rope",
        "rotary_percent": int(case.options.get("rotary_dim") or rope) / rope,
    }


def latent_parts(*, normalised: bool) -> MLASelfAttentionSubmodules:
    """The parts of TransformerEngine's specification, which has narrow layers on every rank of tp,
    or what stands for them here."""
    norm: type = Norm if normalised else IdentityOp
    return MLASelfAttentionSubmodules(
        linear_q_proj=tensor_parallel.ColumnParallelLinear,
        linear_q_down_proj=stand_ins.DuplicatedLinear,
        linear_q_up_proj=_Up,
        linear_kv_down_proj=stand_ins.DuplicatedLinear,
        linear_kv_up_proj=_Up,
        core_attention=_CoreOfLatents,
        linear_proj=tensor_parallel.RowParallelLinear,
        q_layernorm=norm,
        kv_layernorm=norm,
    )


def latents_lack(case: Case, *, turned: bool) -> str | None:
    """Why there is no adapter for the latents of a case, of which keys are `turned` or not."""
    if not stand_ins.needed():
        return "the narrow layers of TransformerEngine have a stand-in on the CPU only"
    if not turned:
        return "MLASelfAttention always turns by position"
    if case.layout.cp > 1:
        return "MLASelfAttention takes what a rank of cp has for a part of the sequence"
    if case.dtype == "float64":
        return "its rotary angles are float32"
    if not case.options.get("interleaved", False):
        return "MLASelfAttention turns pairs of neighbours"
    return None


def forked(case: Case) -> AbstractContextManager[Any]:
    """What `TransformerBlock` runs its layers in."""
    parallel = case.layout.sequence_parallel and case.layout.tp > 1
    return get_cuda_rng_tracker().fork() if parallel else nullcontext()


def lacks(case: Case) -> str | None:
    """Why megatron-core or this adapter cannot do a case; None where it can."""
    if case.concept not in BUILDERS:
        return None
    options, shape = case.options, case.shape
    if options.get("sink", False) and not hasattr(TransformerConfig, _SINKS):
        return "this version has no sinks"
    if options.get("magnitude", 1) != 1:
        return "its masked scores are -10000, which large scores come near"
    if case.concept == "latent_attention":
        if reason := latents_lack(case, turned=bool(options.get("rotary", False))):
            return reason
    elif shape and shape.get("value_size", shape["head_size"]) != shape["head_size"]:
        return "DotProductAttention has one size for keys and values"
    sequence = shape.get("sequence", 1)
    square = shape.get("key_sequence", sequence) == sequence or sequence == 1
    if options.get("causal", True) and options.get("window") is None and not square:
        return "its causal mask is for as many queries as keys"
    if options.get("window") is not None and shape.get("key_sequence", sequence) < sequence:
        return "a query without a key attends to all keys alike"
    if _out_of_range(options):
        return "it leaves the range of windows, layer numbers and dropout unchecked"
    return None


def _out_of_range(options: Mapping[str, Any]) -> bool:
    low = any((options.get(name) or 1) < 1 for name in ("window", "layer_number"))
    return low or not 0 <= float(options.get("dropout", 0.0) or 0.0) < 1


BUILDERS: Mapping[str, Callable[[Case], ModuleSubject]] = {
    "core_attention": core_attention,
    "self_attention": self_attention,
    "latent_attention": latent_attention,
}
