"""Context parallelism of impl as subjects."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from impl.attention import SelfAttention
from impl.context_parallel.attention import context_attention as attention
from impl.context_parallel.dropout import ShareDropout
from impl.context_parallel.mask import AttentionMask
from impl.context_parallel.plan import ContextGroups
from impl.context_parallel.zigzag import Chunk, PackedSequences, positions, split_sequence
from impl.gradients import sum_gradients
from impl.groups import Groups
from impl.masking import alibi_slopes
from impl.multi_token import NOTHING, look_ahead
from impl.random import stream_of
from verify.case import Case
from verify.oracle.context_shares import SHARED
from verify.targets.impl.dropout import RandomSubject, tracker_of
from verify.targets.impl.subject import (
    Builder,
    ModuleSubject,
    OperationSubject,
    Tensors,
    common,
    switches,
)

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "context_split": ("placement", "packed"),
    "tokens_ahead": ("placement", "packed", "padded"),
    "context_attention": (
        "algorithm",
        "placement",
        "mask",
        "window",
        *SHARED,
        "dropout",
        "packed",
        "blocks",
    ),
    "context_attention_block": ("algorithm", "placement", "mask", "window", "bias"),
}


class BlockSubject(ModuleSubject):
    """A module whose parameters' gradients are also summed over cp."""

    def finish_gradients(self) -> None:
        """The sum over tp, and that over cp."""
        super().finish_gradients()
        sum_gradients(self.module.parameters(), group=self._groups.cp)


def context_split(case: Case, groups: Groups) -> OperationSubject:
    """`split_sequence`, and the `positions` that belong to its result."""
    length = case.shape["sequence"]

    def call(inputs: Tensors) -> Tensors:
        given: dict[str, Any] = {
            "group": groups.cp,
            "placement": placement_of(case),
            "packed": packed_of(inputs),
        }
        return {
            "y": split_sequence(inputs["x"], **given),
            "positions": positions(length, **given),
        }

    return OperationSubject(call)


def tokens_ahead(case: Case, groups: Groups) -> OperationSubject:
    """`look_ahead`, and -1 where it says that nothing is."""

    def call(inputs: Tensors) -> Tensors:
        found = look_ahead(
            inputs["x"],
            depths=case.shape["depths"],
            group=groups.cp,
            placement=placement_of(case),
            packed=packed_of(inputs),
        )
        return {"y": torch.stack([moved.where(inside, NOTHING) for moved, inside in found])}

    return OperationSubject(call)


def context_attention(case: Case, groups: Groups) -> RandomSubject:
    """`context_attention`; with option blocks also how many blocks it computed."""
    given, scale = attention_arguments(case, groups), case.options.get("scale")
    number = case.options.get("layer_number")
    slopes = (
        alibi_slopes(case.shape["heads"], group=groups.tp) if case.options.get("alibi") else None
    )
    tracker = tracker_of(case.layout, seed=case.seed)
    stream = tracker.stream(stream_of("tp", "cp"))
    dropout = ShareDropout(float(case.options.get("dropout") or 0.0), stream)

    def call(inputs: Tensors) -> Tensors:
        blocks: list[tuple[Chunk, Chunk]] = []
        out = attention(
            inputs["q"],
            inputs["k"],
            inputs["v"],
            **given,
            scale=None if scale is None else float(scale),
            layer_number=None if number is None else int(number),
            slopes=slopes,
            sink=inputs.get("sink"),
            padding=padding_of(inputs),
            packed=packed_of(inputs),
            dropout=dropout,
            on_block=lambda q, k: blocks.append((q, k)),
        )
        counted = {"blocks": torch.tensor([len(blocks)])} if case.options.get("blocks") else {}
        return {"out": out, **counted}

    return RandomSubject(call, tracker)


def context_attention_block(case: Case, groups: Groups) -> BlockSubject:
    """`SelfAttention` with `context_attention` as its core."""
    module = SelfAttention(
        case.shape["hidden"],
        heads=case.shape["heads"],
        groups=case.shape["kv_heads"],
        head_size=case.shape["head_dim"],
        core=partial(attention, **attention_arguments(case, groups)),
        **common(case, groups),
        **switches(case, "bias"),
    )
    return BlockSubject(module, groups, lambda inputs: {"y": module(inputs["x"])})


def attention_arguments(case: Case, groups: Groups) -> dict[str, Any]:
    """The arguments of `context_attention` that the options of a case say."""
    window = case.options.get("window")
    return {
        "algorithm": str(case.options.get("algorithm", "all_gather")),
        "groups": ContextGroups(cp=groups.cp, levels=groups.hcp),
        "placement": placement_of(case),
        "mask": AttentionMask(
            case.options.get("mask", "causal"),  # type: ignore[arg-type]
            None if window is None else int(window),
        ),
    }


def placement_of(case: Case) -> Any:
    """The case's placement over cp."""
    return case.options.get("placement", "zigzag")


def packed_of(inputs: Mapping[str, Tensor]) -> PackedSequences | None:
    """The packed sequences that are among the inputs, if any."""
    if "cu_seqlens" not in inputs:
        return None
    return PackedSequences.from_cumulative(inputs["cu_seqlens"], inputs["cu_seqlens_padded"])


def padding_of(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Which keys are padding, if any are marked."""
    return inputs["padding"] != 0 if "padding" in inputs else None


BUILDERS: Mapping[str, Builder] = {
    "context_split": context_split,
    "tokens_ahead": tokens_ahead,
    "context_attention": context_attention,
    "context_attention_block": context_attention_block,
}
