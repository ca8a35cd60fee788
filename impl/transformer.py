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

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from impl.attention import SelfAttention
from impl.context_parallel.attention import CAUSAL
from impl.context_parallel.core import ContextAttention
from impl.context_parallel.dropout import ShareDropout
from impl.context_parallel.mask import AttentionMask
from impl.context_parallel.plan import ContextGroups
from impl.context_parallel.zigzag import PackedSequences, Placement, positions
from impl.dropout import bias_dropout_add, check_probability
from impl.groups import Groups
from impl.latent_attention import LatentAttention, LatentSizes
from impl.mlp import MLP
from impl.moe.layer import ExpertsConfig, RoutedExperts
from impl.norm import NORMS
from impl.parameters import Initialiser
from impl.random import RandomTracker, stream_of
from impl.recompute import checkpoint
from impl.rotary import RotaryEmbedding, Rotation

Recompute = Literal["full", "full_distributed", "selective"]
RECOMPUTED = get_args(Recompute)


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """The sizes and choices of a layer.

    `groups` of heads share keys and values, as many as heads unless given. With `latent` sizes
    attention is multi-latent: every head has keys of its own, `head_size` is the part of them
    without positions, and its linear layers have no bias. `norm` is layer or rms; `qk_norm`
    normalises queries and keys head by head too, or the latents. `bias` is of the linear layers.
    `activation` is one of `impl.mlp`'s, the gate packed; with `experts` it is theirs, in the
    perceptron's place.

    Over cp the sequence lies as `placement` says, and attention is by `algorithm`, of `mask`. Its
    scores are multiplied by `scale`, 1 / sqrt(d) unless given, and biased by distance with `alibi`;
    with `layer_scaling` products are divided by the layer's number first, and multiplied by it
    after. `sink` gives each head a learnable one.

    `recompute`: `full` keeps the input only, `full_distributed` 1/tp of it on each rank, and
    `selective` all but what core attention keeps.
    """

    hidden: int
    heads: int
    head_size: int
    ffn: int
    groups: int | None = None
    latent: LatentSizes | None = None
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
    scale: float | None = None
    alibi: bool = False
    layer_scaling: bool = False
    sink: bool = False
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
        if self.latent is not None and self.groups not in (None, self.heads):
            raise ValueError(
                f"groups: {self.groups} of {self.heads} heads; with latent attention each head has"
                " its own keys and values: give as many groups as heads, or none"
            )


class TransformerLayer(Module):
    """`y` of `x` [sequence, batch, hidden]: over cp as the placement says, over tp Replicate, or
    Shard(0) of what a rank of cp has with `groups.layout.sequence_parallel`; so are the gradients.

    Collectives are those of the table above. Gradients of replicated parameters are completed by
    `impl.gradients.finish_sequence_parallel_gradients`, over tp, and those of all parameters by
    `sum_gradients`, over cp. Hidden states are dropped in the stream of the axes that they are
    split over, shares of attention in that of tp and cp, whose ranks have other heads or rows.

    Attention is computed block by block (`impl.context_parallel`) and keeps no shares.
    `layer_number`, from 1 in the whole model, is needed for `layer_scaling` only. ValueError where
    it lacks, where an input is to be distributed that sequence parallelism splits already, and as
    the parts raise it.
    """

    def __init__(
        self,
        config: LayerConfig,
        *,
        groups: Groups,
        tracker: RandomTracker,
        init: Initialiser,
        layer_number: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.config, self.groups, self.tracker = config, groups, tracker
        self._check(layer_number)
        parallel = self.sequence_parallel = groups.layout.sequence_parallel
        made: dict[str, Any] = {"dtype": dtype, "device": device}
        norm = partial(NORMS[config.norm], zero_centered=config.zero_centered, **made)
        self.input_norm = norm(config.hidden, sequence_parallel=parallel)
        core = _core(config, groups, tracker, layer_number, made)
        self.attention = _attention(config, groups, core, norm, {**made, "init": init})
        self.mlp_norm = norm(config.hidden, sequence_parallel=parallel)
        self.mlp = _feed_forward(config, groups, init, made)
        self._stream = tracker.stream(stream_of(*["tp"] * parallel, "cp"))

    def forward(
        self, x: Tensor, *, packed: PackedSequences | None = None, padding: Tensor | None = None
    ) -> Tensor:
        """`y` of x; `packed` are the sequences of all ranks of cp. `padding`, bool [batch, tokens],
        marks those of this rank of cp that are not attended to, all of the ranks' of tp; it is
        gathered over cp once, wherever attention is computed."""
        if self.config.recompute in ("full", "full_distributed"):
            group = self.groups.tp if self.config.recompute == "full_distributed" else None
            return checkpoint(self._run, x, packed, padding, tracker=self.tracker, group=group)
        return self._run(x, packed, padding)

    def _run(self, x: Tensor, packed: PackedSequences | None, padding: Tensor | None) -> Tensor:
        given: dict[str, Any] = {"packed": packed, "padding": padding}
        rotary = self._rotation(x, packed)
        attended = self.attention(self.input_norm(x), rotary=rotary, **given)
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

    def _check(self, layer_number: int | None) -> None:
        if self.config.layer_scaling and layer_number is None:
            raise ValueError("layer_number: layer_scaling=True needs it; give 1 or more")
        if self.config.recompute == "full_distributed" and self.groups.layout.sequence_parallel:
            raise ValueError(
                "recompute: full_distributed does not go with sequence_parallel=True, which splits"
                " the input already; give full"
            )


def _attention(
    config: LayerConfig,
    groups: Groups,
    core: ContextAttention,
    norm: Callable[..., Module],
    made: dict[str, Any],
) -> Module:
    """Attention with `core`, multi-latent where there are sizes for it."""
    parallel = groups.layout.sequence_parallel
    made = {**made, "core": core, "group": groups.tp, "sequence_parallel": parallel}
    made |= {"heads": config.heads, "head_size": config.head_size}
    if config.latent is not None:
        sizes: dict[str, Any] = asdict(config.latent)
        for name, rank in (("query_norm", "q_lora_rank"), ("kv_norm", "kv_lora_rank")):
            if config.qk_norm and sizes[rank] is not None:
                made[name] = norm(sizes[rank], sequence_parallel=parallel)
        return LatentAttention(config.hidden, **sizes, **made)
    if config.qk_norm:
        of_heads = partial(norm, config.head_size, sharded_heads=True)
        made |= {"query_norm": of_heads(), "key_norm": of_heads()}
    return SelfAttention(config.hidden, groups=config.groups, bias=config.bias, **made)


def _core(
    config: LayerConfig,
    groups: Groups,
    tracker: RandomTracker,
    layer_number: int | None,
    made: dict[str, Any],
) -> ContextAttention:
    """Core attention, computed again in backward if the configuration says so."""
    return ContextAttention(
        config.heads,
        tp_group=groups.tp,
        groups=ContextGroups(cp=groups.cp, levels=groups.hcp),
        algorithm=config.algorithm,
        placement=config.placement,
        mask=config.mask,
        scale=config.scale,
        layer_number=layer_number if config.layer_scaling else None,
        alibi=config.alibi,
        sink=config.sink,
        dropout=ShareDropout(config.attention_dropout, tracker.stream(stream_of("tp", "cp"))),
        recomputed_by=tracker if config.recompute == "selective" else None,
        **made,
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
