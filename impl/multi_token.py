"""Multi-token prediction: modules that predict tokens further on, one after the other.

    h[k] = layer(weight [norm(h[k - 1]), norm(embedding(t[i + k]))]),   k = 1 .. D

h[0] are the hidden states that the model ends with, before its last norm; or every h[k - 1] is
taken behind a last norm, as logits are made of it, which is what Megatron-LM does. The logits of
norm(h[k]) are of the token after t[i + k], by the model's own output weights; its own embedding,
too, looks up the tokens. So a loss of depth k has nothing to say of the last k tokens of a
sequence, also of one of several that are packed. DeepSeek-AI, arXiv:2412.19437, section 2.2,
equations 21 to 25; a module has a last norm of its own, as in their checkpoints and in Megatron-LM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module, ModuleList

from impl.collectives import all_gather
from impl.context_parallel.zigzag import Chunks, PackedSequences, Placement, chunks_of
from impl.embedding import VocabParallelEmbedding
from impl.groups import Groups
from impl.norm import NORMS
from impl.parameters import Initialiser, replicated_parameter
from impl.random import RandomTracker
from impl.transformer import LayerConfig, TransformerLayer
from impl.weight_pass import linear

NOTHING = -1
"""The token of a place after the end of a sequence, whose embedding is zeros."""


class PredictionModule(Module):
    """h[k] of h[k - 1] and the embeddings of the tokens k places further on.

    All are [sequence, batch, hidden], and lie as a transformer layer's do. `weight` [hidden, 2
    hidden] is Replicate, and each rank applies it to its own tokens: its gradient is Partial over
    tp with sequence parallelism. `final_norm` is for who makes logits. Collectives are the layer's.
    """

    def __init__(
        self,
        config: LayerConfig,
        *,
        groups: Groups,
        tracker: RandomTracker,
        init: Initialiser,
        layer_number: int,
        **made: Any,
    ) -> None:
        super().__init__()
        parallel = groups.layout.sequence_parallel
        norm = partial(
            NORMS[config.norm],
            config.hidden,
            zero_centered=config.zero_centered,
            sequence_parallel=parallel,
            **made,
        )
        self.hidden_norm = norm()
        self.embedding_norm = norm()
        self.final_norm = norm()
        self.weight = replicated_parameter(
            config.hidden, 2 * config.hidden, init=init, sequence_parallel=parallel, **made
        )
        self.layer = TransformerLayer(
            config, groups=groups, tracker=tracker, init=init, layer_number=layer_number, **made
        )

    def forward(
        self, h: Tensor, embedded: Tensor, *, packed: PackedSequences | None = None
    ) -> Tensor:
        """The next hidden states."""
        joined = torch.cat([self.hidden_norm(h), self.embedding_norm(embedded)], dim=-1)
        return self.layer(linear(joined, self.weight), packed=packed)


class MultiTokenPrediction(ModuleList):
    """The modules of all depths, in their order, whose layers are as `configs` say, and numbered on
    from the `layers_before`. With `normalised` each is given states behind a last norm."""

    def __init__(
        self,
        configs: Sequence[LayerConfig],
        *,
        groups: Groups,
        layers_before: int,
        normalised: bool,
        **own: Any,
    ) -> None:
        super().__init__(
            PredictionModule(each, groups=groups, layer_number=number, **own)
            for number, each in enumerate(configs, layers_before + 1)
        )
        self.groups, self.placement = groups, configs[0].placement
        self.normalised = normalised

    def forward(
        self,
        h: Tensor,
        rows: Tensor,
        *,
        embedding: VocabParallelEmbedding,
        packed: PackedSequences | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each depth the states to make logits of, normalised, and the `rows` that they are for.

        `h` are the hidden states of this rank, as modules are given them. `rows` [3, batch,
        sequence], int, are its tokens, what should follow each, and how much that counts; those of
        a depth are k places further on, and count nothing where there are none. Forward: an
        all-gather of `rows` over cp, and the collectives of the parts.
        """
        ahead = look_ahead(
            rows, depths=len(self), group=self.groups.cp, placement=self.placement, packed=packed
        )
        for module, (moved, inside) in zip(self, ahead, strict=True):
            assert isinstance(module, PredictionModule)
            tokens, targets, counts = moved
            embedded = embedding(tokens.where(inside, NOTHING))
            if not embedding.scatter_to_sequence:
                embedded = embedded.transpose(0, 1)
            h = module(h, embedded, packed=packed)
            states = module.final_norm(h)
            yield states, torch.stack([tokens, targets, counts * inside])
            h = states if self.normalised else h


def look_ahead(
    rows: Tensor,
    *,
    depths: int,
    group: ProcessGroup,
    placement: Placement,
    packed: PackedSequences | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """For k = 1 .. `depths` what lies k places further on in the whole sequence, and where that is
    a token of the same one.

    `rows` [..., sequence] and what comes of them are this rank's places of cp, in their order, and
    bool [sequence] says at which of them there is such a place: at others values mean nothing. A
    place further on may be on any rank, so that there is one all-gather of `rows`, and no backward.
    """
    size = dist.get_world_size(group)
    length = rows.shape[-1] * size
    whole = packed or PackedSequences((length,), (length,))
    by_rank = chunks_of(length, size=size, placement=placement, packed=packed)
    order = [_places(whole, chunks) for chunks in by_rank]
    gathered = all_gather(rows, dim=-1, group=group)
    in_order = gathered[..., torch.cat(order).argsort().to(rows.device)]
    own = dist.get_rank(group)
    mine, ends = (each.to(rows.device) for each in (order[own], _ends(whole, by_rank[own])))
    for k in range(1, depths + 1):
        ahead = mine + k
        yield in_order[..., ahead.clamp(max=length - 1)], ahead < ends


def _places(whole: PackedSequences, chunks: Chunks) -> Tensor:
    """Where the places of a rank are in all sequences together."""
    starts = [(whole.starts[chunk.sequence] + chunk.position, chunk.length) for chunk in chunks]
    return torch.cat([torch.arange(start, start + length) for start, length in starts])


def _ends(whole: PackedSequences, chunks: Chunks) -> Tensor:
    """For each place of a rank, the one after the last token of its sequence."""
    ends = [sum(each) for each in zip(whole.starts, whole.lengths, strict=True)]
    return torch.cat([torch.full((c.length,), ends[c.sequence]) for c in chunks])
