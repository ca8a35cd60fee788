"""impl's transformer layer as a subject."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.init import constant_

from impl.groups import Groups
from impl.latent_attention import LatentSizes
from impl.transformer import LayerConfig, TransformerLayer
from verify.case import Case
from verify.oracle.context_shares import SHARED
from verify.oracle.layer import OPTIONS as _OPTIONS
from verify.oracle.terms import in_training
from verify.targets.impl.context import BlockSubject, attention_arguments, packed_of, padding_of
from verify.targets.impl.dropout import tracker_of
from verify.targets.impl.positions import rotary_of
from verify.targets.impl.subject import Builder, Tensors, switches

OPTIONS: Mapping[str, tuple[str, ...]] = {"transformer_layer": (*_OPTIONS, "training", *SHARED)}
_SIZES = ("hidden", "heads", "groups", "head_size", "ffn")
_SWITCHES = ("zero_centered", "qk_norm", "bias", "alibi", "sink")
_GIVEN = ("norm", "activation", "scale", "hidden_dropout", "attention_dropout", "recompute")
_LATENT = {"kv_lora": "kv_lora_rank", "rope_size": "rope_size", "value_size": "value_size"}


class _LayerSubject(BlockSubject):
    module: TransformerLayer

    def random_states(self) -> Mapping[str, Tensor]:
        """The state of every stream."""
        return self.module.tracker.states()


def transformer_layer(case: Case, groups: Groups) -> BlockSubject:
    """`TransformerLayer`."""
    number = case.options.get("layer_number")
    module = TransformerLayer(
        layer_config(case, groups, layer_scaling=number is not None),
        groups=groups,
        tracker=tracker_of(case.layout, seed=case.seed),
        init=partial(constant_, val=math.nan),
        layer_number=None if number is None else int(number),
        dtype=getattr(torch, case.dtype),
    ).train(in_training(case))

    def call(inputs: Tensors) -> Tensors:
        return {"y": module(inputs["x"], packed=packed_of(inputs), padding=padding_of(inputs))}

    return _LayerSubject(module, groups, call)


def layer_config(case: Case, groups: Groups, **own: Any) -> LayerConfig:
    """The layer that a case describes, with what its options do not say as `own`."""
    attention = attention_arguments(case, groups)
    given: dict[str, Any] = {name: case.options[name] for name in _GIVEN if name in case.options}
    given |= {name: case.shape[name] for name in _SIZES}
    given |= {name: attention[name] for name in ("algorithm", "placement", "mask")}
    turned = case.options.get("rotary_dim") is not None
    return LayerConfig(
        rotary=rotary_of(case, case.shape["head_size"]) if turned else None,
        latent=_latent(case),
        **switches(case, *_SWITCHES),
        **given,
        **own,
    )


def _latent(case: Case) -> LatentSizes | None:
    """The sizes of latents, where the case has them."""
    if "kv_lora" not in case.shape:
        return None
    given = {argument: case.shape[name] for name, argument in _LATENT.items()}
    return LatentSizes(**given, q_lora_rank=case.shape.get("q_lora"))


BUILDERS: Mapping[str, Builder] = {"transformer_layer": transformer_layer}
