"""megatron-core's norms and its transformer layer, of the local specification, as subjects.

The norm of that specification is torch's, behind a wrapper that refuses sequence parallelism. In
the layer its place is taken by `Norm`. What is the transformer block's, the stream of random
numbers around hidden states and full recomputation, is done as it does it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from verify.case import Case
from verify.oracle.context_costs import ALGORITHMS
from verify.oracle.terms import in_training
from verify.targets.megatron_core import stand_ins
from verify.targets.megatron_core.attention import (
    LATENT_NAMES,
    forked,
    latent_parts,
    latent_sizes,
    latents_lack,
)
from verify.targets.megatron_core.norm import NORMALISATIONS, Norm
from verify.targets.megatron_core.random import random_states
from verify.targets.megatron_core.subjects import ACTIVATIONS, ModuleSubject, Tensors, config_of

OPTIONS: Mapping[str, frozenset[str]] = {
    "norm": frozenset({"kind"}),
    "transformer_layer": frozenset(
        {
            "norm",
            "qk_norm",
            "bias",
            "activation",
            "rotary_dim",
            "interleaved",
            "algorithm",
            "placement",
            "mask",
            "window",
            "hidden_dropout",
            "attention_dropout",
            "recompute",
            "training",
        }
    ),
}
NAMES = {
    **{f"self_attention.{name}": f"attention.{each}" for name, each in LATENT_NAMES.items()},
    "input_layernorm": "input_norm",
    "self_attention.linear_qkv": "attention.qkv",
    "self_attention.k_layernorm": "attention.key_norm",
    "pre_mlp_layernorm": "mlp_norm",
    "mlp.linear_fc1": "mlp.fc1",
    "mlp.linear_fc2": "mlp.fc2",
}


def norm(case: Case) -> ModuleSubject:
    """`WrappedTorchNorm` of hidden states."""
    config = _config(case, "kind", hidden_size=case.shape["hidden"])
    module = WrappedTorchNorm(config, case.shape["hidden"]).to(config.params_dtype)
    return ModuleSubject(module, config, lambda inputs: {"y": module(inputs["x"])})


class _LayerSubject(ModuleSubject):
    def random_states(self) -> Mapping[str, Tensor]:
        """The state of every stream."""
        return random_states()


def transformer_layer(case: Case) -> _LayerSubject:
    """`TransformerLayer` of Megatron's own linear layers and `DotProductAttention`."""
    options, shape = case.options, case.shape
    config = layer_config(case)
    layer = TransformerLayer(config, parts_of(case)).train(in_training(case))
    dim, turning = options.get("rotary_dim"), None
    # Latent attention turns by positions of its own.
    if dim is not None and "kv_lora" not in shape:
        interleaved = bool(options.get("interleaved", False))
        turning = RotaryEmbedding(int(dim), 1.0, rotary_interleaved=interleaved)

    def run(x: Tensor) -> Tensor:
        turns = None if turning is None else turning(shape["sequence"])
        y, _ = layer(x, attention_mask=None, rotary_pos_emb=turns)
        return y

    def call(inputs: Tensors) -> Tensors:
        with forked(case):
            if options.get("recompute") != "full":
                return {"y": run(inputs["x"])}
            return {"y": tensor_parallel.checkpoint(run, False, inputs["x"])}

    return _LayerSubject(layer, config, call, names=NAMES)


def layer_config(case: Case, **given: Any) -> TransformerConfig:
    """The configuration of the layer of a case, and what is `given` besides."""
    options, shape = case.options, case.shape
    selective = options.get("recompute") == "selective"
    window, latent = options.get("window"), "kv_lora" in shape
    if latent:
        given |= latent_sizes(case)
    return _config(
        case,
        "norm",
        hidden_size=shape["hidden"],
        ffn_hidden_size=shape["ffn"],
        num_attention_heads=shape["heads"],
        num_query_groups=shape["groups"],
        kv_channels=shape["value_size" if latent else "head_size"],
        qk_layernorm=bool(options.get("qk_norm", False)),
        add_bias_linear=bool(options.get("bias", True)),
        rotary_interleaved=bool(options.get("interleaved", False)) and not latent,
        window_size=None if window is None else (int(window) - 1, 0),
        hidden_dropout=float(options.get("hidden_dropout") or 0.0),
        attention_dropout=float(options.get("attention_dropout") or 0.0),
        fp16=case.dtype == "float16",
        bf16=case.dtype == "bfloat16",
        **({"recompute_granularity": "selective"} if selective else {}),
        **ACTIVATIONS[str(options.get("activation", "gelu"))],
        **given,
    )


def _config(case: Case, option: str, **given: Any) -> TransformerConfig:
    return config_of(
        case, normalization=NORMALISATIONS[str(case.options.get(option, "layer"))], **given
    )


def parts_of(case: Case, mlp: ModuleSpec | None = None) -> TransformerLayerSubmodules:
    """The local specification but for its norm, with `mlp` if it is not the dense one."""
    column, row = tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear
    dense = ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row))
    return TransformerLayerSubmodules(
        input_layernorm=Norm,
        self_attention=_attention_of(case),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=Norm,
        mlp=mlp or dense,
        mlp_bda=get_bias_dropout_add,
    )


def _attention_of(case: Case) -> ModuleSpec:
    """Attention of grouped heads, or of latents if the case has them."""
    normalised = bool(case.options.get("qk_norm", False))
    of_heads = Norm if normalised else None
    heads = SelfAttentionSubmodules(
        linear_qkv=tensor_parallel.ColumnParallelLinear,
        core_attention=DotProductAttention,
        linear_proj=tensor_parallel.RowParallelLinear,
        q_layernorm=of_heads,
        k_layernorm=of_heads,
    )
    latent = "kv_lora" in case.shape
    causal = case.options.get("mask") != "full"
    return ModuleSpec(
        module=MLASelfAttention if latent else SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask},
        submodules=latent_parts(normalised=normalised) if latent else heads,
    )


def lacks(case: Case) -> str | None:
    """Why megatron-core or this adapter cannot do a case; None where it can."""
    if case.concept not in BUILDERS:
        return None
    if case.layout.cp > 1:
        return "its local attention, and so the layer, has no context parallelism"
    if case.concept == "norm":
        parallel = case.layout.sequence_parallel and case.layout.tp > 1
        return "WrappedTorchNorm refuses sequence parallelism" if parallel else None
    return layer_lacks(case)


def layer_lacks(case: Case) -> str | None:
    """Why there is no adapter for the layer of a case."""
    options = case.options
    # On one rank of cp a sequence is whole, however it would be cut and attended to on several.
    allowed: Mapping[str, Collection[str]]
    allowed = {"activation": ACTIVATIONS, "norm": NORMALISATIONS, "algorithm": ALGORITHMS}
    for name, values in allowed.items():
        if options.get(name, next(iter(values))) not in values:
            return f"no adapter for {name} {options[name]}"
    if "kv_lora" in case.shape and (reason := _latents_lack(case)):
        return reason
    if options.get("rotary_dim") is not None and case.dtype == "float64":
        return "its rotary angles are float32"
    recompute = options.get("recompute", "")
    if recompute not in ("", "full", "selective"):
        return f"no adapter for the recomputation {recompute}"
    if recompute and options.get("mask") != "full" and stand_ins.needed():
        return "its causal mask is made on CUDA, again in backward, where no stand-in is in place"
    if any(
        not 0 <= float(options.get(n) or 0.0) < 1 for n in ("hidden_dropout", "attention_dropout")
    ):
        return "it leaves it to torch what is a probability"
    return None


def _latents_lack(case: Case) -> str | None:
    if case.options.get("bias", True):
        return "where an MLP has biases, the projection of MLASelfAttention has one, too"
    return latents_lack(case, turned=case.options.get("rotary_dim") is not None)


BUILDERS: Mapping[str, Callable[[Case], ModuleSubject]] = {
    "norm": norm,
    "transformer_layer": transformer_layer,
}
