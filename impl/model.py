"""GPT: embeddings, transformer layers, a last norm and the logits, cut over pipeline stages.

The layers of a model are shared out to `pp * vpp` chunks; chunk c of stage s is the (c * pp + s)-th
of them. The first one has the embeddings too, the last one the norm and the logits:

    x = dropout(tokens[t] + positions[i]);  x = layer(x), ...;  logits = final_norm(x) weight^T

Modules have their place in the whole model as a name, `layers.7.mlp.fc1.weight`, whatever chunk
they are in, so the parameters of all chunks of all stages are those of the model by their names.
The one exception is a tied embedding on several stages: the last has a copy, `output.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, ModuleDict, ModuleList, Parameter

from impl.collectives import all_reduce
from impl.cross_entropy import vocab_parallel_cross_entropy
from impl.dropout import dropout
from impl.embedding import PositionEmbedding, VocabParallelEmbedding
from impl.groups import Groups
from impl.linear import ColumnParallelLinear
from impl.norm import NORMS
from impl.parameters import Initialiser
from impl.random import RandomTracker, stream_of
from impl.transformer import LayerConfig, TransformerLayer
from verify.layout import Layout

Positions = Literal["rotary", "learned", "none"]
POSITIONS = get_args(Positions)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes and choices of a model.

    `vocabulary` is the number of tokens; the embedding and the logits have rows of padding up to a
    multiple of `vocabulary_multiple * tp`, which no token has and no probability goes to. With
    `tied`, logits are products with the rows of the embedding. Rotary positions are those of
    `layer.rotary`. Of layers with experts, those between every `experts_every`-th, from the first
    on, have the perceptron instead. The embedding is dropped as hidden states are.

    Chunks have equally many layers; or the first stage has `first_stage_layers`, the last
    `last_stage_layers`, and those between have what is left, each stage's in its chunks alike, as
    in Megatron-LM; or `split` says how many each of the chunks has, in the order of the model.
    """

    layer: LayerConfig
    layers: int
    vocabulary: int
    max_sequence: int
    positions: Positions = "rotary"
    tied: bool = True
    vocabulary_multiple: int = 1
    experts_every: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    split: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        sizes = ("layers", "vocabulary", "max_sequence", "vocabulary_multiple", "experts_every")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is no size; give 1 or more")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions: {self.positions!r} is not one of {', '.join(POSITIONS)}")
        if (self.positions == "rotary") is not (self.layer.rotary is not None):
            raise ValueError(
                f"positions: {self.positions} does not go with layer.rotary={self.layer.rotary};"
                " give layer.rotary for rotary positions, and only for them"
            )
        if self.experts_every > 1 and self.layer.experts is None:
            raise ValueError(
                f"experts_every: {self.experts_every} is given, but layer.experts is not"
            )

    def padded_vocabulary(self, *, tp: int) -> int:
        """The rows of the embedding, padding included."""
        multiple = self.vocabulary_multiple * tp
        return -(-self.vocabulary // multiple) * multiple

    def layer_at(self, index: int) -> LayerConfig:
        """The configuration of a layer of the model, counted from 0."""
        return self.layer if index % self.experts_every == 0 else replace(self.layer, experts=None)


def layers_of(config: ModelConfig, *, layout: Layout, stage: int, chunk: int) -> range:
    """Which layers of the model a chunk of a stage has. Arithmetic only.

    ValueError for layers that cannot be shared out as the configuration says, and for a chunk
    without layers that has neither embeddings nor logits.
    """
    counts = _counts(config, layout)
    for place, count in enumerate(counts):
        least = 0 if place in (0, len(counts) - 1) else 1
        if count < least:
            raise ValueError(f"layers: chunk {place} of {len(counts)} would have {count} of them")
    starts = (0, *accumulate(counts))
    place = chunk * layout.pp + stage
    return range(starts[place], starts[place + 1])


def _counts(config: ModelConfig, layout: Layout) -> tuple[int, ...]:
    """How many layers each chunk has, in the order of the model."""
    pp, vpp, first, last = (
        layout.pp,
        layout.vpp,
        config.first_stage_layers,
        config.last_stage_layers,
    )
    if config.split is not None:
        if first is not None or last is not None:
            raise ValueError(
                f"split: {config.split} says it all; leave out first_stage_layers and"
                " last_stage_layers"
            )
        if len(config.split) != pp * vpp or sum(config.split) != config.layers:
            raise ValueError(
                f"split: {config.split} does not share out {config.layers} layers to the"
                f" {pp * vpp} chunks of pp={pp} vpp={vpp}"
            )
        return config.split
    between = pp - (first is not None) - (last is not None)
    left = config.layers - (first or 0) - (last or 0)
    if (between < 1 and left) or min(between, left) < 0:
        raise ValueError(
            f"layers: {config.layers} are not those of pp={pp} stages of which the first has"
            f" {first} and the last {last}"
        )
    each, rest = divmod(left, between) if between > 0 else (0, 0)
    stages = [each] * pp
    if first is not None:
        stages[0] = first
    if last is not None:
        stages[-1] = last
    if rest or any(count % vpp for count in stages):
        raise ValueError(
            f"layers: {left} do not divide by {between} stages and their vpp={vpp} chunks;"
            " give first_stage_layers, last_stage_layers or split"
        )
    return tuple(count // vpp for count in stages) * vpp


class Embedding(Module):
    """Tokens [batch, sequence] to hidden states [sequence, batch, hidden], dropped.

    Tokens are those of this rank of cp, Replicate over tp; hidden states are Shard(0) over tp with
    sequence parallelism. Collectives are those of `VocabParallelEmbedding`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        groups: Groups,
        tracker: RandomTracker,
        init: Initialiser,
        **made: Any,
    ) -> None:
        super().__init__()
        parallel, hidden = groups.layout.sequence_parallel, config.layer.hidden
        made = {**made, "init": init, "sequence_parallel": parallel, "hidden": hidden}
        self.tokens = VocabParallelEmbedding(
            config.padded_vocabulary(tp=groups.size("tp")),
            group=groups.tp,
            scatter_to_sequence=parallel,
            **made,
        )
        self.positions = (
            PositionEmbedding(
                config.max_sequence,
                tp_group=groups.tp,
                cp_group=groups.cp,
                placement=config.layer.placement,
                **made,
            )
            if config.positions == "learned"
            else None
        )
        self.parallel, self.p = parallel, config.layer.hidden_dropout
        self._stream = tracker.stream(stream_of(*["tp"] * parallel, "cp"))

    def forward(self, tokens: Tensor) -> Tensor:
        """The hidden states."""
        x = self.tokens(tokens)
        x = x if self.parallel else x.transpose(0, 1)
        if self.positions is not None:
            x = self.positions(x)
        return dropout(x, p=self.p, stream=self._stream, training=self.training)


class GPTModel(Module):
    """One chunk of a model on the stage of `groups.pp`: see `layers_of`.

    Maps what the chunk before gives to what the next one takes: hidden states [sequence, batch,
    hidden], zigzag or contiguous over cp, and over tp Replicate or, with sequence parallelism,
    Shard(0). With `pre_process` it takes tokens [batch, sequence], int, of this rank of cp; with
    `post_process` it gives logits [sequence, batch, vocabulary / tp], of the padded vocabulary.

    `init` fills every weight. A copy of a tied embedding (marked `shared`) has values of its own
    until `tie_embeddings`; both it and its original are marked `shared_embedding`. Collectives and
    errors are those of the parts; and ValueError for a sequence longer than `max_sequence`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        groups: Groups,
        tracker: RandomTracker,
        init: Initialiser,
        chunk: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        layout, stage = groups.layout, groups.rank("pp")
        self.config, self.groups, self.chunk = config, groups, chunk
        self.pre_process = stage == 0 and chunk == 0
        self.post_process = stage == layout.pp - 1 and chunk == layout.vpp - 1
        made: dict[str, Any] = {"dtype": dtype, "device": device}
        own: dict[str, Any] = {"groups": groups, "tracker": tracker, "init": init, **made}
        if self.pre_process:
            self.embedding = Embedding(config, **own)
        self.layers = ModuleDict(
            {
                str(index): TransformerLayer(config.layer_at(index), **own)
                for index in layers_of(config, layout=layout, stage=stage, chunk=chunk)
            }
        )
        if self.post_process:
            parallel = layout.sequence_parallel
            self.final_norm = NORMS[config.layer.norm](
                config.layer.hidden,
                zero_centered=config.layer.zero_centered,
                sequence_parallel=parallel,
                **made,
            )
            self.output = ColumnParallelLinear(
                config.layer.hidden,
                out_features=config.padded_vocabulary(tp=layout.tp),
                group=groups.tp,
                init=init,
                bias=False,
                sequence_parallel=parallel,
                **made,
            )
        if config.tied:
            self._tie()

    def forward(self, x: Tensor) -> Tensor:
        """The next chunk's input, or the logits."""
        if self.pre_process:
            self._check(x)
            x = self.embedding(x)
        for layer in self.layers.values():
            x = layer(x)
        if self.post_process:
            x, _ = self.output(self.final_norm(x))
        return x

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The cross entropy of every token, [batch, sequence], for targets [batch, sequence]."""
        losses = vocab_parallel_cross_entropy(
            logits,
            targets=targets.transpose(0, 1),
            group=self.groups.tp,
            real_vocabulary=self.config.vocabulary,
        )
        return losses.transpose(0, 1)

    def _tie(self) -> None:
        if self.pre_process and self.post_process:
            self.output.weight = self.embedding.tokens.weight
        elif self.pre_process:
            self.embedding.tokens.weight.shared_embedding = True  # type: ignore[attr-defined]
        elif self.post_process:
            self.output.weight.shared_embedding = True  # type: ignore[attr-defined]
            self.output.weight.shared = True  # type: ignore[attr-defined]

    def _check(self, tokens: Tensor) -> None:
        length = tokens.shape[-1] * self.groups.size("cp")
        if length > self.config.max_sequence:
            raise ValueError(
                f"sequence: {length} tokens are more than max_sequence={self.config.max_sequence}"
            )


def build_model(
    config: ModelConfig,
    *,
    groups: Groups,
    tracker: RandomTracker,
    init: Initialiser,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> ModuleList:
    """All chunks of this rank's stage, in their order."""
    chunks = [
        GPTModel(
            config,
            groups=groups,
            tracker=tracker,
            init=init,
            chunk=chunk,
            dtype=dtype,
            device=device,
        )
        for chunk in range(groups.layout.vpp)
    ]
    return ModuleList(chunks)


def model_parameters(chunks: Iterable[Module]) -> dict[str, Parameter]:
    """The parameters of all chunks by their names in the model, each once; a copy of a tied
    embedding is `output.weight`."""
    return {name: each for chunk in chunks for name, each in chunk.named_parameters()}


def tie_embeddings(chunks: Iterable[Module], *, groups: Groups) -> None:
    """Give a tied embedding's copy on the last stage the values of the first stage. Collective over
    `groups.embedding` where there is a copy: one all-reduce, once after initialisation."""
    for parameter in model_parameters(chunks).values():
        if not getattr(parameter, "shared_embedding", False) or groups.embedding is None:
            continue
        first = dist.get_rank(groups.embedding) == 0
        values = parameter.detach() if first else torch.zeros_like(parameter)
        total = all_reduce(values, group=groups.embedding)
        with torch.no_grad():
            parameter.copy_(total)
