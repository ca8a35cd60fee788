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
from impl.transformer import LayerConfig, TransformerLayer
from verify.case import Case
from verify.oracle.transformer import OPTIONS as _OPTIONS
from verify.targets.impl.context import BlockSubject, attention_arguments, packed_of
from verify.targets.impl.dropout import tracker_of
from verify.targets.impl.positions import rotary_of
from verify.targets.impl.subject import Builder, Tensors, switches

OPTIONS: Mapping[str, tuple[str, ...]] = {"transformer_layer": _OPTIONS}
_SIZES = ("hidden", "heads", "groups", "head_size", "ffn")
_SWITCHES = ("zero_centered", "qk_norm", "bias")
_GIVEN = ("norm", "activation", "hidden_dropout", "attention_dropout", "recompute")


class _LayerSubject(BlockSubject):
    module: TransformerLayer

    def random_states(self) -> Mapping[str, Tensor]:
        """The state of every stream."""
        return self.module.tracker.states()


def transformer_layer(case: Case, groups: Groups) -> BlockSubject:
    """`TransformerLayer`."""
    attention = attention_arguments(case, groups)
    given: dict[str, Any] = {name: case.options[name] for name in _GIVEN if name in case.options}
    given |= {name: case.shape[name] for name in _SIZES}
    given |= {name: attention[name] for name in ("algorithm", "placement", "mask")}
    turned = case.options.get("rotary_dim") is not None
    config = LayerConfig(
        rotary=rotary_of(case, case.shape["head_size"]) if turned else None,
        **switches(case, *_SWITCHES),
        **given,
    )
    module = TransformerLayer(
        config,
        groups=groups,
        tracker=tracker_of(case.layout, seed=case.seed),
        init=partial(constant_, val=math.nan),
        dtype=getattr(torch, case.dtype),
    )

    def call(inputs: Tensors) -> Tensors:
        return {"y": module(inputs["x"], packed=packed_of(inputs))}

    return _LayerSubject(module, groups, call)


BUILDERS: Mapping[str, Builder] = {"transformer_layer": transformer_layer}
