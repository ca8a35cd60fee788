"""The oracle: what each concept promises, as single-device computations in plain torch.

`CONTRACTS` makes the contract of a case by `case.concept`. Published semantics only: nothing here
is shared with an implementation.
"""

from collections.abc import Callable

from verify.case import Case
from verify.oracle.contract import Contract
from verify.oracle.cross_entropy import vocab_cross_entropy
from verify.oracle.embedding import vocab_embedding
from verify.oracle.linear import column_linear, row_linear
from verify.oracle.mappings import MAPPINGS
from verify.oracle.mlp import tp_mlp

CONTRACTS: dict[str, Callable[[Case], Contract]] = {
    **MAPPINGS,
    "column_linear": column_linear,
    "row_linear": row_linear,
    "vocab_embedding": vocab_embedding,
    "vocab_cross_entropy": vocab_cross_entropy,
    "tp_mlp": tp_mlp,
}

__all__ = ["CONTRACTS"]
