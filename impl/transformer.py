"""One transformer layer under tensor, sequence and context parallelism.

    h = x + dropout(attention(norm(x)))
    y = h + dropout(mlp(norm(h)))

Every rank of a context-parallel group runs the same layer on its chunks of the sequence, and only
attention looks at others' chunks. Within them a tensor-parallel group shares out heads and ffn
features, and with sequence parallelism what lies between: norms, dropouts and residuals are of
tokens, and each rank has its part of them (Korthikanti et al., arXiv:2205.05198, figure 5).

What is communicated, with K and V all-gathered over cp and sequence parallelism over tp:

| forward | group | backward |
|---|---|---|
| all-gather of norm(x), before qkv | tp | reduce-scatter; all-gather again for the weight |
| all-gather of K, V | cp | all-gather again, reduce-scatter of their gradients |
| reduce-scatter after proj | tp | all-gather |
| all-gather of norm(h), before fc1 | tp | reduce-scatter; all-gather again for the weight |
| reduce-scatter after fc2 | tp | all-gather |

Without sequence parallelism an all-reduce after proj and after fc2, and in backward before qkv and
fc1. Other algorithms of context parallelism take the place of the second line.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from impl.attention import Core, SelfAttention
from impl.context_parallel.attention import CAUSAL, context_attention
from impl.context_parallel.dropout import ShareDropout
from impl.context_parallel.mask import AttentionMask
from impl.context_parallel.plan import ContextGroups
from impl.context_parallel.zigzag import PackedSequences, Placement, positions
from impl.dropout import bias_dropout_add, check_probability
from impl.groups import Groups
from impl.mlp import MLP
from impl.moe.layer import ExpertsConfig, RoutedExperts
from impl.norm import NORMS
from impl.parameters import Initialiser
from impl.random import RandomTracker, stream_of
from impl.recompute import checkpoint
from impl.rotary import RotaryEmbedding, Rotation

Recompute = Literal["full", "selective"]
RECOMPUTED = get_args(Recompute)


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """The sizes and choices of a layer.

    `groups` of heads share keys and values, as many as heads unless given. `norm` is layer or rms;
    `qk_norm` normalises queries and keys head by head too. `bias` is of the linear layers.
    `activation` is one of `impl.mlp`'s, the gate packed; with `experts` it is theirs, in the
    perceptron's place. Over cp the sequence lies as `placement` says, and attention is by
    `algorithm`, of `mask`. `recompute`: `full` keeps the input only, `selective` all but what core
    attention keeps.
    """

    hidden: int
    heads: int
    head_size: int
    ffn: int
    groups: int | None = None
    norm: str = "layer"
    zero_centered: bool = False
    qk_norm: bool = False
    bias: bool = True
    activation: str = "gelu"
    experts: ExpertsConfig | None = None
    rotary: RotaryEmbedding | None = None
    algorithm: str = "all_gather"
    placement: Placement = "zigzag"
    mask: AttentionMask = CAUSAL
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    recompute: Recompute | None = None

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm: {self.norm!r} is not one of {', '.join(NORMS)}")
        if self.recompute is not None and self.recompute not in RECOMPUTED:
            raise ValueError(
                f"recompute: {self.recompute!r} is not one of {', '.join(RECOMPUTED)}, or None"
            )
        check_probability(self.hidden_dropout, name="hidden_dropout")
        check_probability(self.attention_dropout, name="attention_dropout")


class TransformerLayer(Module):
    """`y` of `x` [sequence, batch, hidden]: over cp as the placement says, over tp Replicate, or
    Shard(0) of what a rank of cp has with `groups.layout.sequence_parallel`; so are the gradients.

    Collectives are those of the table above. Gradients of replicated parameters are completed by
    `impl.gradients.finish_sequence_parallel_gradients`, over tp, and those of all parameters by
    `sum_gradients`, over cp. Hidden states are dropped in the stream of the axes that they are
    split over, shares of attention in that of tp and cp, whose ranks have other heads or rows.

    Attention is computed block by block (`impl.context_parallel`) and keeps no shares. ValueError
    as the parts raise it.
    """

    def __init__(
        self,
        config: LayerConfig,
        *,
        groups: Groups,
        tracker: RandomTracker,
        init: Initialiser,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.config, self.groups, self.tracker = config, groups, tracker
        parallel = self.sequence_parallel = groups.layout.sequence_parallel
        made: dict[str, Any] = {"dtype": dtype, "device": device}
        split: dict[str, Any] = {"group": groups.tp, "init": init, "sequence_parallel": parallel}
        norm = partial(NORMS[config.norm], zero_centered=config.zero_centered, **made)
        of_heads = partial(norm, config.head_size, sharded_heads=True)
        self.input_norm = norm(config.hidden, sequence_parallel=parallel)
        self.attention = SelfAttention(
            config.hidden,
            heads=config.heads,
            groups=config.groups,
            head_size=config.head_size,
            core=_Core(config, groups, tracker),
            query_norm=of_heads() if config.qk_norm else None,
            key_norm=of_heads() if config.qk_norm else None,
            bias=config.bias,
            **split,
            **made,
        )
        self.mlp_norm = norm(config.hidden, sequence_parallel=parallel)
        self.mlp = _feed_forward(config, groups, init, made)
        self._stream = tracker.stream(stream_of(*["tp"] * parallel, "cp"))

    def forward(self, x: Tensor, *, packed: PackedSequences | None = None) -> Tensor:
        """`y` of x; `packed` are the sequences of all ranks of cp."""
        if self.config.recompute == "full":
            return checkpoint(self._run, x, packed, tracker=self.tracker)
        return self._run(x, packed)

    def _run(self, x: Tensor, packed: PackedSequences | None) -> Tensor:
        rotary = self._rotation(x, packed)
        attended = self.attention(self.input_norm(x), rotary=rotary, packed=packed)
        h = self._add(attended, x)
        return self._add(self.mlp(self.mlp_norm(h)), h)

    def _rotation(self, x: Tensor, packed: PackedSequences | None) -> Rotation | None:
        """Of all tokens of the tensor-parallel group: that is what attention is given."""
        if self.config.rotary is None:
            return None
        split = dist.get_world_size(self.groups.tp) if self.sequence_parallel else 1
        length = x.shape[0] * split * dist.get_world_size(self.groups.cp)
        placed: dict[str, Any] = {"group": self.groups.cp, "placement": self.config.placement}
        where = positions(length, packed=packed, **placed).to(x.device)
        return self.config.rotary.rotation(where, dtype=x.dtype)

    def _add(self, y: Tensor, residual: Tensor) -> Tensor:
        """The residual and what a linear layer gave, its bias added there."""
        p, training = self.config.hidden_dropout, self.training
        return bias_dropout_add(
            y, bias=None, residual=residual, p=p, stream=self._stream, training=training
        )


def _feed_forward(
    config: LayerConfig, groups: Groups, init: Initialiser, made: dict[str, Any]
) -> Module:
    """The perceptron, or the experts in its place."""
    made = {**made, "init": init, "sequence_parallel": groups.layout.sequence_parallel}
    made |= {"activation": config.activation}
    if config.experts is not None:
        return RoutedExperts(config.hidden, config=config.experts, groups=groups, **made)
    return MLP(config.hidden, ffn=config.ffn, bias=config.bias, group=groups.tp, **made)


class _Core(Module):
    """Core attention as the configuration has it, computed again in backward if that says so."""

    def __init__(self, config: LayerConfig, groups: Groups, tracker: RandomTracker) -> None:
        super().__init__()
        self.tracker = tracker if config.recompute == "selective" else None
        self.core: Core = partial(
            context_attention,
            algorithm=config.algorithm,
            groups=ContextGroups(cp=groups.cp, levels=groups.hcp),
            placement=config.placement,
            mask=config.mask,
        )
        self.dropout = ShareDropout(config.attention_dropout, tracker.stream(stream_of("tp", "cp")))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, packed: PackedSequences | None) -> Tensor:
        """Of this rank's heads, [sequence, batch, heads, d]."""
        dropout = self.dropout if self.training else None
        core = partial(self.core, packed=packed, dropout=dropout)
        if self.tracker is None:
            return core(q, k, v)
        return checkpoint(core, q, k, v, tracker=self.tracker)
