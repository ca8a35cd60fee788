"""impl's norms as subjects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import Module, ModuleDict

from impl.groups import Groups
from impl.norm import NORMS
from verify.case import Case
from verify.targets.impl.context import BlockSubject
from verify.targets.impl.subject import Builder, Tensors, switches

_OPTIONS = ("kind", "bias", "zero_centered")
OPTIONS: Mapping[str, tuple[str, ...]] = {"norm": _OPTIONS, "qk_norm": _OPTIONS}


def _made(case: Case, features: int, **arguments: Any) -> Module:
    return NORMS[str(case.options.get("kind", "layer"))](
        features,
        dtype=getattr(torch, case.dtype),
        **switches(case, "bias", "zero_centered"),
        **arguments,
    )


def norm(case: Case, groups: Groups) -> BlockSubject:
    """`LayerNorm` or `RMSNorm` of hidden states."""
    module = _made(case, case.shape["hidden"], sequence_parallel=case.layout.sequence_parallel)
    return BlockSubject(module, groups, lambda inputs: {"y": module(inputs["x"])})


def qk_norm(case: Case, groups: Groups) -> BlockSubject:
    """The same, twice, of a rank's queries and keys."""
    names, size = ("query_norm", "key_norm"), case.shape["head_size"]
    module = ModuleDict({name: _made(case, size, sharded_heads=True) for name in names})

    def call(inputs: Tensors) -> Tensors:
        return {
            "query": module["query_norm"](inputs["q"]),
            "key": module["key_norm"](inputs["k"]),
        }

    return BlockSubject(module, groups, call)


BUILDERS: Mapping[str, Builder] = {"norm": norm, "qk_norm": qk_norm}
