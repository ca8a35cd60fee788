"""What megatron-core's multi-token prediction looks up further on, as a subject.

The modules themselves take the model's hidden states behind its last norm, and join them to
embeddings in another order than the contract of models says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import roll_tensor

from verify.case import Case
from verify.targets.megatron_core.subjects import OperationSubject, Tensors

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
