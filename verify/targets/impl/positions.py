"""impl's positions as subjects: rotary and learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.nn.init import constant_

from impl.context_parallel.zigzag import positions
from impl.embedding import PositionEmbedding
from impl.groups import Groups
from impl.rotary import RotaryEmbedding
from verify.case import Case
from verify.targets.impl.context import BlockSubject, packed_of, placement_of
from verify.targets.impl.subject import Builder, OperationSubject, Tensors

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "rotary": ("rotary_dim", "base", "interleaved", "placement", "packed"),
    "position_embedding": ("placement", "packed"),
}


def rotary_of(case: Case, head_size: int) -> RotaryEmbedding:
    """The rotary embedding that the options of a case describe."""
    given: dict[str, Any] = {"dim": int(case.options.get("rotary_dim") or head_size)}
    if "base" in case.options:
        given["base"] = float(case.options["base"] or 0.0)
    return RotaryEmbedding(**given, interleaved=bool(case.options.get("interleaved", False)))


def rotary(case: Case, groups: Groups) -> OperationSubject:
    """`RotaryEmbedding` of this rank's heads and chunks."""
    embedding, dtype = rotary_of(case, case.shape["head_size"]), getattr(torch, case.dtype)

    def call(inputs: Tensors) -> Tensors:
        where = positions(
            case.shape["sequence"],
            group=groups.cp,
            placement=placement_of(case),
            packed=packed_of(inputs),
        )
        return {"y": embedding.rotation(where, dtype=dtype)(inputs["x"])}

    return OperationSubject(call)


def position_embedding(case: Case, groups: Groups) -> BlockSubject:
    """`PositionEmbedding`."""
    split: dict[str, Any] = {"sequence_parallel": True} if case.layout.sequence_parallel else {}
    module = PositionEmbedding(
        case.shape["max_positions"],
        hidden=case.shape["hidden"],
        tp_group=groups.tp,
        cp_group=groups.cp,
        placement=placement_of(case),
        init=partial(constant_, val=math.nan),
        dtype=getattr(torch, case.dtype),
        **split,
    )

    def call(inputs: Tensors) -> Tensors:
        return {"y": module(inputs["x"], packed=packed_of(inputs))}

    return BlockSubject(module, groups, call)


BUILDERS: Mapping[str, Builder] = {"rotary": rotary, "position_embedding": position_embedding}
