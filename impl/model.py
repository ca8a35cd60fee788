"""GPT: embeddings, transformer layers, a last norm and the logits, cut over pipeline stages.

The layers of a model are shared out to `pp * vpp` chunks; chunk c of stage s is the (c * pp + s)-th
of them. The first one has the embeddings too, the last one the norm and the logits:

    x = dropout(tokens[t] + positions[i]);  x = layer(x), ...;  logits = final_norm(x) weight^T

Modules have their place in the whole model as a name, `layers.7.mlp.fc1.weight`, whatever chunk
they are in, so the parameters of all chunks of all stages are those of the model by their names.
The one exception is an embedding that two stages have: the last has a copy, `output.weight` if it
is tied, else, for multi-token prediction (`impl.multi_token`), `lookup.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, ModuleDict, ModuleList, Parameter

from impl.collectives import all_reduce
from impl.context_parallel.zigzag import PackedSequences
from impl.cross_entropy import vocab_parallel_cross_entropy
from impl.dropout import dropout
from impl.embedding import PositionEmbedding, VocabParallelEmbedding
from impl.groups import Groups
from impl.linear import ColumnParallelLinear
from impl.model_config import ModelConfig, layers_of
from impl.multi_token import MultiTokenPrediction
from impl.norm import NORMS
from impl.parameters import Initialiser
from impl.random import RandomTracker, stream_of
from impl.transformer import TransformerLayer


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

    def forward(self, tokens: Tensor, *, packed: PackedSequences | None = None) -> Tensor:
        """The hidden states; `packed` are the sequences of all ranks of cp."""
        x = self.tokens(tokens)
        x = x if self.parallel else x.transpose(0, 1)
        if self.positions is not None:
            x = self.positions(x, packed=packed)
        return dropout(x, p=self.p, stream=self._stream, training=self.training)


class GPTModel(Module):
    """One chunk of a model on the stage of `groups.pp`: see `layers_of`.

    Maps what the chunk before gives to what the next one takes: hidden states [sequence, batch,
    hidden], zigzag or contiguous over cp, and over tp Replicate or, with sequence parallelism,
    Shard(0). With `pre_process` it takes tokens [batch, sequence], int, of this rank of cp; with
    `post_process` it has what `losses` needs.

    `init` fills every weight. A copy of an embedding (marked `shared`) has values of its own until
    `tie_embeddings`; both it and its original are marked `shared_embedding`. Collectives and errors
    are those of the parts; and ValueError for a sequence longer than `max_sequence`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        groups: Groups,
        tracker: RandomTracker,
        init: Initialiser,
        chunk: int,
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
                str(index): TransformerLayer(config.layer_at(index), layer_number=index + 1, **own)
                for index in layers_of(config, layout=layout, stage=stage, chunk=chunk)
            }
        )
        if self.post_process:
            self._end(own, made)
        self._share_embedding()

    def forward(self, x: Tensor, *, packed: PackedSequences | None = None) -> Tensor:
        """The next chunk's input; of the last chunk the hidden states that `losses` takes. `packed`
        are the sequences of all ranks of cp, where a row has several."""
        if self.pre_process:
            self.check_length(x, packed)
            x = self.embedding(x, packed=packed)
        for layer in self.layers.values():
            x = layer(x, packed=packed)
        return x

    def losses(
        self,
        h: Tensor,
        *,
        tokens: Tensor,
        targets: Tensor,
        mask: Tensor,
        packed: PackedSequences | None = None,
    ) -> Tensor:
        """Sums over this rank's tokens that count: of the loss, and in training of that of every
        depth of multi-token prediction, [1 + depths].

        `h` is what the last chunk gave; `tokens`, the `targets` that should follow them and `mask`,
        how much each counts, are int [batch, sequence].
        """
        ended = self.final_norm(h)
        sums = [self._sum(ended, targets, mask)]
        if self.multi_token is not None and self.training:
            rows = torch.stack([tokens, targets, mask])
            lookup = self.embedding.tokens if self.pre_process else self.lookup
            for states, (_, later, counts) in self.multi_token(
                ended if self.config.multi_token_normalised else h,
                rows,
                embedding=lookup,
                packed=packed,
            ):
                sums.append(self._sum(states, later, counts))
        return torch.stack(sums)

    def _sum(self, states: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """The sum of the cross entropies of normalised states."""
        logits, _ = self.output(states)
        losses = vocab_parallel_cross_entropy(
            logits,
            targets=targets.transpose(0, 1),
            group=self.groups.tp,
            real_vocabulary=self.config.vocabulary,
        )
        return (losses.transpose(0, 1) * mask).sum()

    def _end(self, own: dict[str, Any], made: dict[str, Any]) -> None:
        """Make what follows the last layer."""
        config, layout = self.config, self.groups.layout
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
            group=self.groups.tp,
            init=own["init"],
            bias=False,
            sequence_parallel=parallel,
            **made,
        )
        self.multi_token = None
        if not config.multi_token_layers:
            return
        further = range(config.layers, config.layers + config.multi_token_layers)
        self.multi_token = MultiTokenPrediction(
            [config.layer_at(k) for k in further],
            layers_before=config.layers,
            normalised=config.multi_token_normalised,
            **own,
        )
        if not self.pre_process:
            self.lookup = VocabParallelEmbedding(
                config.padded_vocabulary(tp=layout.tp),
                hidden=config.layer.hidden,
                group=self.groups.tp,
                init=own["init"],
                sequence_parallel=parallel,
                scatter_to_sequence=parallel,
                **made,
            )

    def _share_embedding(self) -> None:
        """Make all that are the embedding of tokens on this stage one parameter, and mark it where
        another stage has it too."""
        tied, needed = self.config.tied, self.config.tied or self.config.multi_token_layers > 0
        if self.pre_process and self.post_process:
            if tied:
                self.output.weight = self.embedding.tokens.weight
            return
        if self.pre_process and needed:
            self.embedding.tokens.weight.shared_embedding = True  # type: ignore[attr-defined]
        if self.post_process and needed:
            copy = self.output.weight if tied else self.lookup.weight
            if self.multi_token is not None:
                self.lookup.weight = copy
            copy.shared_embedding = True  # type: ignore[attr-defined]
            copy.shared = True  # type: ignore[attr-defined]

    def check_length(self, tokens: Tensor, packed: PackedSequences | None) -> None:
        """Raise ValueError where a row of these tokens, or one of its sequences, is longer than
        any may be."""
        whole = tokens.shape[-1] * self.groups.size("cp")
        length = whole if packed is None else max(packed.padded_lengths)
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
    """The parameters of all chunks by their names in the model, each once; a copy of an embedding
    is `output.weight` or `lookup.weight`."""
    return {name: each for chunk in chunks for name, each in chunk.named_parameters()}


def tie_embeddings(chunks: Iterable[Module], *, groups: Groups) -> None:
    """Give an embedding's copy on the last stage the values of the first stage. Collective over
    `groups.embedding` where there is a copy: one all-reduce, once after initialisation."""
    for parameter in model_parameters(chunks).values():
        if not getattr(parameter, "shared_embedding", False) or groups.embedding is None:
            continue
        with torch.no_grad():
            if dist.get_rank(groups.embedding) > 0:
                parameter.zero_()
            parameter.copy_(all_reduce(parameter, group=groups.embedding))
