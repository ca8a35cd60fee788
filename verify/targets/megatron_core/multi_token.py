"""What megatron-core's multi-token prediction looks up further on, as a subject.

The modules themselves take the model's hidden states behind its last norm, and join them to
embeddings in another order than the contract of models says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import roll_tensor

from verify.case import Case
from verify.targets.megatron_core.subjects import OperationSubject, Tensors

OPTIONS: Mapping[str, frozenset[str]] = {
    "tokens_ahead": frozenset({"placement", "packed", "padded"})
}


def tokens_ahead(case: Case) -> OperationSubject:
    """`roll_tensor`, of what it gave for the depth before."""

    def call(inputs: Tensors) -> Tensors:
        # It leaves 0 where no token is, which is one here: all are raised by one meanwhile.
        rows, found = inputs["x"] + 1, []
        for _ in range(case.shape["depths"]):
            rows, _ = roll_tensor(
                rows,
                cp_group=parallel_state.get_context_parallel_group(),
                packed_seq_params=_packed(inputs),
            )
            found.append(rows - 1)
        return {"y": torch.stack(found)}

    return OperationSubject(call)


def _packed(inputs: Tensors) -> PackedSeqParams | None:
    if "cu_seqlens" not in inputs:
        return None
    real, padded = inputs["cu_seqlens"], inputs["cu_seqlens_padded"]
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=real,
        cu_seqlens_kv=real,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
    )


def lacks(case: Case) -> str | None:
    """Why megatron-core cannot do a case; None where it can."""
    if case.concept not in BUILDERS:
        return None
    if case.layout.cp > 1 and case.options.get("placement", "zigzag") != "zigzag":
        return "it cuts a sequence into two chunks for each rank of cp"
    return None


BUILDERS: Mapping[str, Callable[[Case], OperationSubject]] = {"tokens_ahead": tokens_ahead}
