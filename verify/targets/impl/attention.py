"""impl's attention as subjects: of given heads, and the two blocks that make heads of x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from impl.attention import CoreAttention, SelfAttention
from impl.groups import Groups
from impl.latent_attention import LatentAttention
from impl.norm import NORMS
from impl.random import parallel_tracker, stream_of
from impl.rotary import RotaryEmbedding, Rotation
from verify.case import Case
from verify.oracle.attention import SCORING
from verify.oracle.attention_block import IN_BLOCKS
from verify.oracle.terms import in_training
from verify.targets.impl.subject import Builder, ModuleSubject, Tensors, common, switches

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "core_attention": SCORING,
    "self_attention": ("bias", *IN_BLOCKS, *SCORING),
    "latent_attention": (*IN_BLOCKS, *SCORING),
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


def _norm(case: Case, features: int | None, **rows: bool) -> Module | None:
    """The norm of the option `norm`; `rows` says which of them this rank has."""
    kind = str(case.options.get("norm", "none"))
    if kind == "none" or features is None:
        return None
    return NORMS[kind](features, dtype=getattr(torch, case.dtype), **rows)


def _rotary(case: Case, size: int) -> Rotation | None:
    """The rotation of the whole sequence."""
    if not case.options.get("rotary", False):
        return None
    positions = torch.arange(case.shape["sequence"])
    embedding = RotaryEmbedding(dim=size, **switches(case, "interleaved"))
    return embedding.rotation(positions, dtype=getattr(torch, case.dtype))


def core_attention(case: Case, groups: Groups) -> ModuleSubject:
    """`CoreAttention` of this rank's heads."""
    module = _core(case, groups).train(in_training(case))

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
        query_norm=_norm(case, case.shape["head_size"], sharded_heads=True),
        key_norm=_norm(case, case.shape["head_size"], sharded_heads=True),
        **common(case, groups),
        **switches(case, "bias"),
    ).train(in_training(case))
    return _block(module, groups, _rotary(case, case.shape["head_size"]))


def latent_attention(case: Case, groups: Groups) -> ModuleSubject:
    """`LatentAttention` with `CoreAttention`."""
    parallel = case.layout.sequence_parallel
    sizes: dict[str, Any] = {n: case.shape[n] for n in ("head_size", "rope_size", "value_size")}
    module = LatentAttention(
        case.shape["hidden"],
        heads=case.shape["heads"],
        q_lora_rank=case.shape.get("q_lora"),
        kv_lora_rank=case.shape["kv_lora"],
        core=_core(case, groups),
        query_norm=_norm(case, case.shape.get("q_lora"), sequence_parallel=parallel),
        kv_norm=_norm(case, case.shape["kv_lora"], sequence_parallel=parallel),
        **sizes,
        **common(case, groups),
    ).train(in_training(case))
    return _block(module, groups, _rotary(case, case.shape["rope_size"]))


def _block(module: Module, groups: Groups, rotary: Rotation | None) -> ModuleSubject:
    def call(inputs: Tensors) -> Tensors:
        return {"y": module(inputs["x"], rotary=rotary, **_padding(inputs))}

    return ModuleSubject(module, groups, call)


def _padding(inputs: Tensors) -> dict[str, Tensor]:
    return {"padding": inputs["padding"] != 0} if "padding" in inputs else {}


BUILDERS: Mapping[str, Builder] = {
    "core_attention": core_attention,
    "self_attention": self_attention,
    "latent_attention": latent_attention,
}
