"""Mutants of a whole model and its training step: how its parts are put together over stages."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_model = partial(Mutant, family="model", module="impl.model", caught_by=("gpt_training",))
_config = partial(_model, module="impl.model_config")
_training = partial(_model, module="impl.training")
_gradients = partial(_model, module="impl.gradients")
_parallel = partial(_model, module="impl.data_parallel")

_SHARED = "            copy.shared = True  # type: ignore[attr-defined]\n"
_POSITIONS = "                placement=config.layer.placement,\n"
_STREAM = 'self._stream = tracker.stream(stream_of(*["tp"] * parallel, "cp"))'
_LAST = "ended = self.final_norm(h)"
_LAST_NORM = """sequence_parallel=parallel,
            **made,
        )
        self.output"""
_LAYER = "str(index): TransformerLayer(config.layer_at(index), layer_number=index + 1, **own)"
_IN_CHUNK = """\
index - layers_of(
                        config, layout=layout, stage=stage, chunk=chunk
                    ).start"""
_NEEDED = "self.config.tied, self.config.tied or self.config.multi_token_layers > 0"
_LOSSES = "last.losses(h, **vars(microbatches[m]))"
_EMBEDDING = "            embedding_group=self.groups.embedding,\n"
_FORWARD = "y: Tensor = chunk(x, packed=microbatches[m].packed)"
_UPDATED = f"""\
{_EMBEDDING}        )
        if finalised is not None:
            finalised()
        means = losses / tokens.clamp_min(1)
        return TrainResult(means[0], means[1:], tokens, self.optimizer.step())
"""
_TOLD = "return all_reduce(all_reduce(told, group=self.groups.dp_cp), group=self.groups.pp)"
_AUXILIARY = "scale * float(tokens.clamp_min(1)) / len(microbatches)"

MODEL = (
    _model(
        name="model-tied-copy-counts-twice",
        wrong="The copy of a tied embedding counts in the norm beside the original.",
        snippet=_SHARED,
        replacement="",
        seen="megatron/core/optimizer/clip_grads.py, param_is_not_shared",
    ),
    _model(
        name="model-tied-on-one-stage-only",
        wrong="The copy on the last stage is a weight of its own after the first step.",
        snippet=_NEEDED,
        replacement="self.config.tied, False",
    ),
    _model(
        name="model-tied-copy-starts-apart",
        wrong="The copy of a tied embedding is not given the values of the first stage.",
        snippet="parameter.copy_(all_reduce(parameter, group=groups.embedding))",
        replacement="all_reduce(parameter, group=groups.embedding)",
        seen="EMB-09",
    ),
    _model(
        name="model-tied-while-it-is-made",
        wrong="Each chunk ties its embedding as it is made, and stages wait for each other there.",
        snippet="        self._share_embedding()\n",
        replacement="""\
        self._share_embedding()
        tie_embeddings([self], groups=groups)
        dist.barrier(groups.pp)
""",
        seen="HANG-05",
    ),
    _model(
        name="model-untied-on-one-stage",
        wrong="An embedding that is not tied shares its weight where one stage has it all.",
        snippet="            if tied:\n",
        replacement="            if self.post_process:\n",
    ),
    _config(
        name="model-chunks-stage-by-stage",
        wrong="The chunks of a stage have neighbouring layers, as if it computed them in a row.",
        snippet="place = chunk * layout.pp + stage",
        replacement="place = stage * layout.vpp + chunk",
    ),
    _config(
        name="model-first-stage-as-the-last",
        wrong="The number of layers of the first stage is that of the last.",
        snippet="stages[0] = first",
        replacement="stages[-1] = first",
    ),
    _config(
        name="model-offsets-of-the-last-stage",
        wrong="Layers are numbered as if the first stage had as many as the last.",
        snippet="""\
    starts = (0, *accumulate(counts))
    place = chunk * layout.pp + stage
    return range(starts[place], starts[place + 1])
""",
        replacement="""\
    place = chunk * layout.pp + stage
    first = counts[0] if config.last_stage_layers is None else counts[-1]
    start = sum((first, *counts[1:])[:place])
    return range(start, start + counts[place])
""",
        seen="PP-01",
    ),
    _model(
        name="model-experts-counted-in-the-chunk",
        wrong="Which layers have experts begins anew in every chunk.",
        snippet=_LAYER,
        replacement=_LAYER.replace(
            "layer_at(index)",
            f"layer_at(\n                    {_IN_CHUNK}\n                )",
        ),
        seen="ATT-01",
    ),
    _model(
        name="model-experts-in-even-chunks",
        wrong="Which layers have experts is told as if all chunks had equally many layers.",
        snippet=_LAYER,
        replacement=_LAYER.replace(
            "layer_at(index)",
            f"layer_at(\n                    {_IN_CHUNK}\n"
            "                    + config.layers * (chunk * layout.pp + stage)\n"
            "                    // (layout.pp * layout.vpp)\n"
            "                )",
        ),
        seen="PP-02",
    ),
    _model(
        name="model-positions-contiguous",
        wrong="Learned positions are those of contiguous chunks of the sequence.",
        snippet=_POSITIONS,
        replacement='                placement="contiguous",\n',
    ),
    _model(
        name="model-embedding-not-dropped",
        wrong="The embedding is not dropped.",
        snippet="dropout(x, p=self.p, ",
        replacement="dropout(x, p=0.0 * self.p, ",
    ),
    _model(
        name="model-embedding-dropped-alike",
        wrong="Ranks with other tokens under sequence parallelism drop the embedding alike.",
        snippet=_STREAM,
        replacement='self._stream = tracker.stream(stream_of("cp"))',
    ),
    _model(
        name="model-without-last-norm",
        wrong="Logits are of states that are not normalised.",
        snippet=_LAST,
        replacement="ended = h + 0.0 * self.final_norm(h)",
    ),
    _model(
        name="model-last-norm-not-marked",
        wrong="The gradient of the last norm is not summed over tp under sequence parallelism.",
        snippet=_LAST_NORM,
        replacement=_LAST_NORM.replace("sequence_parallel=parallel,", ""),
        seen="SP-02",
    ),
    _model(
        name="model-last-norm-off-centre",
        wrong="The last norm ignores that weights are zero-centred.",
        snippet="zero_centered=config.layer.zero_centered,",
        replacement="zero_centered=False,",
    ),
    _model(
        name="model-padding-is-predicted",
        wrong="Rows of padding take part in the softmax.",
        snippet="            real_vocabulary=self.config.vocabulary,\n",
        replacement="",
        seen="megatron-core 0.16.1, vocab_parallel_cross_entropy",
    ),
    _config(
        name="model-padding-without-tp",
        wrong="The vocabulary is padded to a multiple that does not divide by tp.",
        snippet="multiple = self.vocabulary_multiple * tp",
        replacement="multiple = self.vocabulary_multiple + 0 * tp",
    ),
)
STEP = (
    _training(
        name="model-reduced-after-the-pipeline",
        wrong="With overlap, no backward pass of a stage begins a reduction; all wait for the end.",
        snippet=", scale=scale, completing=self.data_parallel.sync)",
        replacement=", scale=scale)",
    ),
    _training(
        name="model-always-announced",
        wrong="The shape of every activation is announced, although all are alike.",
        snippet="if len(shapes) > 1:",
        replacement="if shapes:",
    ),
    _training(
        name="step-mean-of-means",
        wrong="Every microbatch counts alike, however many of its tokens count.",
        snippet=_LOSSES,
        replacement=f"{_LOSSES} / microbatches[m].mask.sum().clamp_min(1)",
        seen="LS-01",
    ),
    _model(
        name="step-mask-forgotten",
        wrong="Tokens that do not count are in the loss.",
        snippet="return (losses.transpose(0, 1) * mask).sum()",
        replacement="return losses.sum()",
    ),
    _training(
        name="step-targets-of-the-first",
        wrong="The targets of every microbatch are those of the first.",
        snippet=_LOSSES,
        replacement=_LOSSES.replace(
            "**vars(microbatches[m])",
            '**{**vars(microbatches[m]), "targets": microbatches[0].targets}',
        ),
    ),
    _training(
        name="step-tokens-of-dp-only",
        wrong="The number of tokens is not summed over cp.",
        snippet="reshape(1), group=self.groups.dp_cp)",
        replacement="reshape(1), group=self.groups.dp)",
    ),
    _training(
        name="step-loss-of-a-replica",
        wrong="The loss is of a rank's own tokens, divided by the number of all.",
        snippet=_TOLD,
        replacement="return all_reduce(told, group=self.groups.pp)",
        seen="LS-13",
    ),
    _training(
        name="step-loss-on-the-last-stage",
        wrong="Only the last stage has the loss.",
        snippet=_TOLD,
        replacement="return all_reduce(told, group=self.groups.dp_cp)",
    ),
    _training(
        name="step-auxiliary-not-scaled",
        wrong="The auxiliary losses of routers are divided by the number of tokens.",
        snippet=_AUXILIARY,
        replacement="scale",
        seen="LS-04",
    ),
    _training(
        name="step-auxiliary-without-loss-scale",
        wrong="The loss scale multiplies the main loss only, and all gradients are divided by it.",
        snippet=_AUXILIARY,
        replacement=_AUXILIARY.replace("scale * ", ""),
    ),
    _training(
        name="step-auxiliary-of-each-microbatch",
        wrong="The auxiliary losses of microbatches are added, not averaged.",
        snippet=_AUXILIARY,
        replacement=_AUXILIARY.replace(" / len(microbatches)", ""),
        seen="LS-04",
    ),
    _training(
        name="step-auxiliary-by-own-tokens",
        wrong="Auxiliary losses are multiplied by the tokens of a rank, and divided by all.",
        snippet=_AUXILIARY,
        replacement="scale * float(sum(m.mask.sum() for m in microbatches)) / len(microbatches)",
        seen="LS-04",
    ),
    _training(
        name="step-auxiliary-of-the-first-chunk",
        wrong="Of several chunks of a stage only the first has auxiliary losses that are scaled.",
        snippet="for each in chunks.modules() if isinstance",
        replacement="for each in chunks[0].modules() if isinstance",
    ),
    _training(
        name="step-loss-not-scaled",
        wrong="The loss is not scaled, and gradients are divided by the scale.",
        snippet="scale=scale, completing",
        replacement="scale=1.0, completing",
    ),
    _training(
        name="step-gradients-kept",
        wrong="Gradients of the step before are added to those of this one.",
        snippet="        self.data_parallel.zero_gradients()\n",
        replacement=(
            "        for buffer in self.data_parallel.buffers:\n"
            "            kept = buffer.data.clone()\n"
            "            buffer.zero()\n"
            "            buffer.data.copy_(kept)\n"
        ),
        seen="LS-09",
    ),
    _training(
        name="step-zeroed-before-each-microbatch",
        wrong="Gradients are zeroed before each microbatch.",
        snippet=_FORWARD,
        replacement=f"self.data_parallel.zero_gradients()\n            {_FORWARD}",
        seen="LS-09",
    ),
    _training(
        name="step-reduced-too-soon",
        wrong="A bucket is reduced from the first microbatch's backward pass on.",
        snippet="with self.data_parallel.no_sync():",
        replacement="with nullcontext():",
    ),
    _training(
        name="step-receives-whole-sequences",
        wrong="Under sequence parallelism a stage expects the whole sequence from the one before.",
        snippet="if self.groups.layout.sequence_parallel else 1",
        replacement="if not self.groups.layout.sequence_parallel else 1",
        seen="PP-07",
    ),
    _training(
        name="step-tied-over-tp",
        wrong="The gradients of a tied embedding are summed over tp, and not over its stages.",
        snippet=_EMBEDDING,
        replacement="            embedding_group=self.groups.tp,\n",
    ),
    _model(
        name="step-overflow-of-a-stage",
        module="impl.optimizer.mixed",
        wrong="The stage whose gradients overflow skips the step alone.",
        snippet="for group in (self.groups.tp_dp_cp, self.groups.pp):",
        replacement="for group in (self.groups.tp_dp_cp,):",
    ),
    _gradients(
        name="step-tied-not-summed",
        wrong="Each copy of a tied embedding follows its own part of the gradient.",
        snippet="if copies and group is not None:",
        replacement="if copies and group is None:",
    ),
    _training(
        name="step-tied-summed-after-the-update",
        wrong="The gradients of a tied embedding are summed when it has been updated.",
        snippet=_UPDATED,
        replacement=_UPDATED.replace(_EMBEDDING, "").replace(
            "return TrainResult(means[0], means[1:], tokens, self.optimizer.step())",
            "result = TrainResult(means[0], means[1:], tokens, self.optimizer.step())\n"
            "        from impl.gradients import finish_tied_gradients\n\n"
            "        own = self.data_parallel.parameters\n"
            "        finish_tied_gradients(own, group=self.groups.embedding)\n"
            "        return result",
        ),
        seen="EMB-04",
    ),
    _parallel(
        name="step-tied-shards-apart",
        wrong="The copies of a tied embedding are in buffers with others, their shards elsewhere.",
        snippet="of_expert(parameter), of_tied_embedding(parameter)\n",
        replacement="of_expert(parameter), False\n",
        seen="EMB-01",
    ),
)
EVALUATION = (
    _training(
        name="step-evaluation-drops",
        wrong="An evaluation drops as training does.",
        snippet="        self.chunks.eval()\n",
        replacement="",
    ),
    _training(
        name="step-evaluation-does-not-end",
        wrong="After an evaluation nothing is dropped any more.",
        snippet="        self.chunks.train()\n",
        replacement="",
        seen="RNG-05",
    ),
    _training(
        name="step-evaluation-by-own-tokens",
        wrong="The loss of an evaluation is divided by the tokens of this rank.",
        snippet="losses[0] / self._tokens(microbatches).clamp_min(1)",
        replacement="losses[0] / sum(each.mask.sum() for each in microbatches).clamp_min(1)",
        seen="CP-17",
    ),
    _training(
        name="step-evaluation-not-packed",
        wrong="An evaluation takes packed sequences for one.",
        snippet=_FORWARD,
        replacement=_FORWARD.replace("[m].packed", "[m].packed if chunk.training else None"),
        seen="CP-17",
    ),
)
PACKED = (
    _model(
        name="model-layers-not-packed",
        wrong="Layers take packed sequences for one.",
        snippet="x = layer(x, packed=packed)",
        replacement="x = layer(x)",
    ),
    _model(
        name="model-positions-go-on",
        wrong="The second of packed sequences has learned positions that go on from the first.",
        snippet="x = self.positions(x, packed=packed)",
        replacement="x = self.positions(x)",
        seen="ATT-09",
    ),
    _training(
        name="model-packed-as-the-first",
        wrong="All microbatches have the packed sequences of the first.",
        snippet="chunk(x, packed=microbatches[m].packed)",
        replacement="chunk(x, packed=microbatches[0].packed)",
    ),
    _model(
        module="impl.pipeline.executor",
        name="executor-first-microbatch",
        wrong="Chunks are told that every microbatch is the first.",
        snippet="self.stage.chunks[chunk](x, m)",
        replacement="self.stage.chunks[chunk](x, 0)",
    ),
    _training(
        name="model-first-stage-packed-only",
        wrong="Only the first chunk is told of packed sequences.",
        snippet="chunk(x, packed=microbatches[m].packed)",
        replacement="chunk(x, packed=None if x.is_floating_point() else microbatches[m].packed)",
        seen="ATT-09",
    ),
)
REFUSALS = (
    _training(
        name="step-refused-by-the-first-stage",
        wrong="A sequence that is too long is refused by the first stage only; the others wait.",
        snippet="                self._check_length(each.tokens, each.packed)\n",
        replacement="",
    ),
)
MUTANTS = (*MODEL, *STEP, *EVALUATION, *PACKED, *REFUSALS)
