"""Mutants of a whole model and its training step: how its parts are put together over stages."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_model = partial(Mutant, family="model", module="impl.model", caught_by=("gpt_training",))
_training = partial(_model, module="impl.training")
_gradients = partial(_model, module="impl.gradients")
_parallel = partial(_model, module="impl.data_parallel")

_SHARED = "            self.output.weight.shared = True  # type: ignore[attr-defined]\n"
_POSITIONS = "                placement=config.layer.placement,\n"
_STREAM = 'self._stream = tracker.stream(stream_of(*["tp"] * parallel, "cp"))'
_LAST = "x, _ = self.output(self.final_norm(x))"
_LAST_NORM = """sequence_parallel=parallel,
                **made,
            )
            self.output"""
_LAYER = "str(index): TransformerLayer(config.layer_at(index), **own)"
_SUM = "(last.losses(logits, microbatches[m].targets) * microbatches[m].mask).sum()"
_EMBEDDING = "            embedding_group=self.groups.embedding,\n"
_BOTH = "loss, tokens = all_reduce(both, group=self.groups.pp)"

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
        snippet="        if config.tied:",
        replacement="        if config.tied and layout.pp == 1:",
    ),
    _model(
        name="model-tied-copy-starts-apart",
        wrong="The copy of a tied embedding keeps what it was initialised with.",
        snippet="parameter.copy_(total)",
        replacement="parameter.copy_(total if first else values)",
    ),
    _model(
        name="model-untied-on-one-stage",
        wrong="An embedding that is not tied shares its weight where one stage has it all.",
        snippet="        if config.tied:",
        replacement="        if config.tied or layout.pp == 1:",
    ),
    _model(
        name="model-chunks-stage-by-stage",
        wrong="The chunks of a stage have neighbouring layers, as if it computed them in a row.",
        snippet="place = chunk * layout.pp + stage",
        replacement="place = stage * layout.vpp + chunk",
        seen="PP-05",
    ),
    _model(
        name="model-first-stage-as-the-last",
        wrong="The number of layers of the first stage is that of the last.",
        snippet="stages[0] = first",
        replacement="stages[-1] = first",
    ),
    _model(
        name="model-experts-counted-in-the-chunk",
        wrong="Which layers have experts begins anew in every chunk.",
        snippet=_LAYER,
        replacement=_LAYER.replace(
            "layer_at(index)",
            "layer_at(\n"
            "                    index - layers_of(\n"
            "                        config, layout=layout, stage=stage, chunk=chunk\n"
            "                    ).start\n"
            "                )",
        ),
    ),
    _model(
        name="model-positions-contiguous",
        wrong="Learned positions are those of contiguous chunks of the sequence.",
        snippet=_POSITIONS,
        replacement='                placement="contiguous",\n',
        seen="CP-02",
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
        seen="SP-04",
    ),
    _model(
        name="model-without-last-norm",
        wrong="Logits are of states that are not normalised.",
        snippet=_LAST,
        replacement="x, _ = self.output(x + 0.0 * self.final_norm(x))",
    ),
    _model(
        name="model-last-norm-not-marked",
        wrong="The gradient of the last norm is not summed over tp under sequence parallelism.",
        snippet=_LAST_NORM,
        replacement=_LAST_NORM.replace("sequence_parallel=parallel,", ""),
        seen="SP-01",
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
        seen="TP-08",
    ),
    _model(
        name="model-padding-without-tp",
        wrong="The vocabulary is padded to a multiple that does not divide by tp.",
        snippet="multiple = self.vocabulary_multiple * tp",
        replacement="multiple = self.vocabulary_multiple + 0 * tp",
    ),
)
STEP = (
    _training(
        name="step-mean-of-means",
        wrong="Every microbatch counts alike, however many of its tokens count.",
        snippet=_SUM,
        replacement=f"{_SUM} / microbatches[m].mask.sum().clamp_min(1)",
        seen="DP-01",
    ),
    _training(
        name="step-mask-forgotten",
        wrong="Tokens that do not count are in the loss.",
        snippet=_SUM,
        replacement="last.losses(logits, microbatches[m].targets).sum()",
    ),
    _training(
        name="step-targets-of-the-first",
        wrong="The targets of every microbatch are those of the first.",
        snippet=_SUM,
        replacement="(last.losses(logits, microbatches[0].targets) * microbatches[m].mask).sum()",
    ),
    _training(
        name="step-tokens-of-dp-only",
        wrong="The number of tokens, and the loss, are not summed over cp.",
        snippet="group=self.groups.dp_cp))",
        replacement="group=self.groups.dp))",
        seen="CP-06",
    ),
    _training(
        name="step-tokens-of-the-last-stage",
        wrong="Only the last stage divides its gradients by the number of tokens.",
        snippet=_BOTH,
        replacement="loss, tokens = both + 0 * all_reduce(both, group=self.groups.pp)",
    ),
    _training(
        name="step-loss-not-scaled",
        wrong="The loss is not scaled, and gradients are divided by the scale.",
        snippet="scale=1.0 if scale is None else scale.value,",
        replacement="scale=1.0,",
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
    ),
    _training(
        name="step-reduced-too-soon",
        wrong="A bucket is reduced from the first microbatch's backward pass on.",
        snippet="with self.data_parallel.no_sync():",
        replacement="with nullcontext():",
        seen="DP-03",
    ),
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
    _gradients(
        name="step-tied-not-summed",
        wrong="Each copy of a tied embedding follows its own part of the gradient.",
        snippet="if copies and group is not None:",
        replacement="if copies and group is None:",
        seen="PP-02",
    ),
    _parallel(
        name="step-tied-shards-apart",
        wrong="The copies of a tied embedding are in buffers with others, their shards elsewhere.",
        snippet="of_expert(parameter), of_tied_embedding(parameter)\n",
        replacement="of_expert(parameter), False\n",
        seen="megatron/core/distributed/param_and_grad_buffer.py, shared_embedding",
    ),
)
MUTANTS = (*MODEL, *STEP)
