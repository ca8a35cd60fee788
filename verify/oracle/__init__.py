"""The oracle: what each concept promises, as single-device computations in plain torch.

`CONTRACTS` makes the contract of a case by `case.concept`. Published semantics only: nothing here
is shared with an implementation.
"""

from collections.abc import Callable

from verify.case import Case
from verify.oracle.attention import core_attention
from verify.oracle.checkpoint import resumed_training, round_trip
from verify.oracle.context import context_attention, context_split, tokens_ahead
from verify.oracle.context_block import context_attention_block
from verify.oracle.contract import Contract
from verify.oracle.cross_entropy import vocab_cross_entropy
from verify.oracle.data import batches, sample_order
from verify.oracle.dropout import dropout
from verify.oracle.embedding import vocab_embedding
from verify.oracle.gpt import gpt_training
from verify.oracle.interrupted_save import interrupted_save
from verify.oracle.latent_attention import latent_attention
from verify.oracle.learning_rates import learning_rates
from verify.oracle.linear import column_linear, row_linear
from verify.oracle.linear_cross_entropy import linear_cross_entropy
from verify.oracle.mappings import MAPPINGS
from verify.oracle.mlp import tp_mlp
from verify.oracle.moe import moe_dispatch, moe_expert_bias, moe_layer, moe_router
from verify.oracle.norm import norm, qk_norm
from verify.oracle.pipeline import pipeline
from verify.oracle.positions import position_embedding, rotary
from verify.oracle.recompute import recomputed_block
from verify.oracle.self_attention import self_attention
from verify.oracle.training import training_steps
from verify.oracle.transformer import transformer_layer

CONTRACTS: dict[str, Callable[[Case], Contract]] = {
    **MAPPINGS,
    "column_linear": column_linear,
    "row_linear": row_linear,
    "vocab_embedding": vocab_embedding,
    "vocab_cross_entropy": vocab_cross_entropy,
    "tp_mlp": tp_mlp,
    "moe_router": moe_router,
    "moe_dispatch": moe_dispatch,
    "moe_layer": moe_layer,
    "moe_expert_bias": moe_expert_bias,
    "dropout": dropout,
    "recomputed_block": recomputed_block,
    "batches": batches,
    "sample_order": sample_order,
    "context_split": context_split,
    "tokens_ahead": tokens_ahead,
    "context_attention": context_attention,
    "context_attention_block": context_attention_block,
    "core_attention": core_attention,
    "learning_rates": learning_rates,
    "training_steps": training_steps,
    "gpt_training": gpt_training,
    "resumed_training": resumed_training,
    "checkpoint": round_trip,
    "interrupted_save": interrupted_save,
    "linear_cross_entropy": linear_cross_entropy,
    "norm": norm,
    "qk_norm": qk_norm,
    "pipeline": pipeline,
    "rotary": rotary,
    "position_embedding": position_embedding,
    "self_attention": self_attention,
    "transformer_layer": transformer_layer,
    "latent_attention": latent_attention,
}

__all__ = ["CONTRACTS"]
