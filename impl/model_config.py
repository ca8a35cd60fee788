"""The sizes and choices of a whole model, and which of its layers each chunk of a stage has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, get_args

from impl.transformer import LayerConfig
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

    `multi_token_layers` modules predict tokens further on, see `impl.multi_token`; their layers are
    numbered on from the model's. The mean of their losses, times `multi_token_scaling`, is added to
    what is trained. With `multi_token_normalised` they are given states behind a last norm.

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
    multi_token_layers: int = 0
    multi_token_scaling: float = 0.1
    multi_token_normalised: bool = False
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
        for name in ("multi_token_layers", "multi_token_scaling"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative; give 0 or more")

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
