"""impl's attention as subjects: of given heads, and the two blocks that make heads of x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from impl.attention import CoreAttention, SelfAttention
from impl.groups import Groups
from impl.latent_attention import LatentAttention
from impl.random import parallel_tracker, stream_of
from verify.case import Case
from verify.targets.impl.subject import Builder, ModuleSubject, Tensors, common, switches

_SCORING = ("causal", "window", "padding", "alibi", "sink", "layer_number", "scale", "dropout")
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "core_attention": _SCORING,
    "self_attention": ("bias", *_SCORING),
    "latent_attention": _SCORING,
}


def _core(case: Case, groups: Groups) -> CoreAttention:
    tracker = parallel_tracker(case.seed, layout=case.layout, rank=dist.get_rank())
    named = ("window", "layer_number", "scale", "dropout")
    numbers: dict[str, Any] = {n: case.options[n] for n in named if n in case.options}
    return CoreAttention(
        case.shape["heads"],
        group=groups.tp,
        dropout_stream=tracker.stream(stream_of("tp")),
        dtype=getattr(torch, case.dtype),
        **switches(case, "causal", "alibi", "sink"),
        **numbers,
    )


def core_attention(case: Case, groups: Groups) -> ModuleSubject:
    """`CoreAttention` of this rank's heads."""
    module = _core(case, groups)

    def call(inputs: Tensors) -> Tensors:
        return {"y": module(*(inputs[name] for name in ("q", "k", "v")), **_padding(inputs))}

    return ModuleSubject(module, groups, call)


def self_attention(case: Case, groups: Groups) -> ModuleSubject:
    """`SelfAttention` with `CoreAttention`."""
    module = SelfAttention(
        case.shape["hidden"],
        heads=case.shape["heads"],
        groups=case.shape["groups"],
        head_size=case.shape["head_size"],
        core=_core(case, groups),
        **common(case, groups),
        **switches(case, "bias"),
    )
    return ModuleSubject(
        module, groups, lambda inputs: {"y": module(inputs["x"], **_padding(inputs))}
    )


def latent_attention(case: Case, groups: Groups) -> ModuleSubject:
    """`LatentAttention` with `CoreAttention`."""
    sizes: dict[str, Any] = {n: case.shape[n] for n in ("head_size", "rope_size", "value_size")}
    module = LatentAttention(
        case.shape["hidden"],
        heads=case.shape["heads"],
        q_lora_rank=case.shape.get("q_lora"),
        kv_lora_rank=case.shape["kv_lora"],
        core=_core(case, groups),
        **sizes,
        **common(case, groups),
    )
    return ModuleSubject(
        module, groups, lambda inputs: {"y": module(inputs["x"], **_padding(inputs))}
    )


def _padding(inputs: Tensors) -> dict[str, Tensor]:
    return {"padding": inputs["padding"] != 0} if "padding" in inputs else {}


BUILDERS: Mapping[str, Builder] = {
    "core_attention": core_attention,
    "self_attention": self_attention,
    "latent_attention": latent_attention,
}
