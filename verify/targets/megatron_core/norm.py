"""The norm that megatron-core's modules are given here."""

from __future__ import annotations

from megatron.core.transformer import TransformerConfig
from torch.nn import LayerNorm, Module, RMSNorm

# The contracts' words, and the configuration's.
NORMALISATIONS = {"layer": "LayerNorm", "rms": "RMSNorm"}


class Norm:
    """torch's norm, marked as `FusedLayerNorm` is, for the wrapper of the local specification,
    which refuses sequence parallelism. A class, because a specification calls no
    functions."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float) -> Module:  # type: ignore[misc]
        """The norm that the configuration asks for."""
        kind = LayerNorm if config.normalization == "LayerNorm" else RMSNorm
        module = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in module.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return module
