"""Mutants of how scores become shares in attention over a sequence that is split over ranks."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_mutant = partial(Mutant, family="context", caught_by=("context_attention", "transformer_layer"))
_scores = partial(_mutant, module="impl.context_parallel.scores")
_blocks = partial(_mutant, module="impl.context_parallel.blocks")
_sweep = partial(_mutant, module="impl.context_parallel.sweep")
_ulysses = partial(_mutant, module="impl.context_parallel.ulysses")

# Also in a whole model, whose layers have their numbers.
_IN_MODELS = ("context_attention", "transformer_layer", "gpt_training")
_LIES = "(c.sequence, c.position): c.rows"
_MARKS = "~self.marks[lies[keys.sequence, keys.position]]"
_PLACES = "torch.arange(c.position, c.position + c.tokens, device=self.slopes.device)"
_SINK = "return -(shares * delta).sum((0, 1))"

MUTANTS = (
    _scores(
        name="padding-as-in-the-sequence",
        wrong="Marks are read as if they lay in the order of the sequence, not of the ranks.",
        snippet=_LIES,
        replacement="(c.sequence, c.position): slice(c.position, c.position + c.tokens)",
    ),
    _scores(
        name="padding-of-own-tokens",
        wrong="Each rank takes its own marks for those of every rank.",
        snippet="return all_gather(padding.transpose(0, 1), dim=0, group=group)",
        replacement="return padding.transpose(0, 1).repeat(group.size(), 1)",
    ),
    _scores(
        name="padding-only-attended",
        wrong="Marks are read the wrong way round: what is no padding is not attended to.",
        snippet=_MARKS,
        replacement=_MARKS.replace("~", ""),
    ),
    _scores(
        name="padding-instead-of-the-mask",
        wrong="Where there are marks of padding, the mask is forgotten.",
        snippet="allowed = real if allowed is None else allowed & real",
        replacement="allowed = real",
    ),
    _scores(
        name="distance-of-places",
        wrong="Distance is that of places in a rank's memory.",
        snippet=_PLACES,
        replacement="torch.arange(c.start, c.start + c.tokens, device=self.slopes.device)",
    ),
    _scores(
        name="slopes-of-the-first-heads",
        wrong="After an exchange of heads every rank has the slopes of the first ones.",
        snippet="slopes=self.slopes[heads]",
        replacement="slopes=self.slopes[: heads.stop - heads.start]",
        seen="ATT-03",
    ),
    _scores(
        name="layer-number-not-undone",
        wrong="Products are divided by the number of the layer, and not multiplied again.",
        snippet="found = found * self.layer_number",
        replacement="found = found * 1",
        caught_by=_IN_MODELS,
    ),
    _blocks(
        name="sink-takes-no-share",
        wrong="A sink is in the maximum of the scores, and not in their total.",
        snippet="total.fill_(1.0)",
        replacement="total.fill_(0.0)",
    ),
    _blocks(
        name="sink-grows-with-its-share",
        wrong="The gradient of a sink has the wrong sign.",
        snippet=_SINK,
        replacement=_SINK.replace("-", ""),
        caught_by=_IN_MODELS,
    ),
    _blocks(
        name="sink-share-not-normalised",
        wrong="The gradient of a sink is of its weight before it is divided by the total.",
        snippet="shares = torch.exp(sink.to(peak.dtype) - peak) / total",
        replacement="shares = torch.exp(sink.to(peak.dtype) - peak) + 0 * total",
    ),
    _sweep(
        name="sink-without-gradient",
        wrong="The gradient of a sink is lost in backward.",
        snippet="of_sink = sink_gradient(self._sink, **whole).to(self._sink.dtype)",
        replacement="of_sink = torch.zeros_like(self._sink)",
    ),
    _ulysses(
        name="sink-of-the-first-heads",
        wrong="After an exchange of heads every rank has the sinks of the first ones.",
        snippet="extras.sink[heads]",
        replacement="extras.sink[:share]",
        seen="ATT-03",
    ),
)
