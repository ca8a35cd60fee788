"""Mutants of the transformer layer: how its parts are put together."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_mutant = partial(
    Mutant, family="transformer", module="impl.transformer", caught_by=("transformer_layer",)
)

_core = partial(_mutant, module="impl.context_parallel.core")

_SECOND = "return self._add(self.mlp(self.mlp_norm(h)), h)"
_STREAM = 'self._stream = tracker.stream(stream_of(*["tp"] * parallel, "cp"))'
_ROTATION = "return self.config.rotary.rotation(where, dtype=x.dtype)"
_OF_SHARES = 'tracker.stream(stream_of("tp", "cp"))'
_CORE = "return checkpoint(self._attend, q, k, v, padding, packed, tracker=self.tracker)"
_AGAIN = "return checkpoint(self._run, x, packed, padding, tracker=self.tracker, group=group)"
_GIVEN = 'given: dict[str, Any] = {"packed": packed, "padding": padding}'
_DISTRIBUTED = 'group = self.groups.tp if self.config.recompute == "full_distributed" else None'

MUTANTS = (
    _core(
        name="layer-selective-keeps-projection",
        wrong="Queries, keys and values are kept, and the fused projection that has them all.",
        snippet="q, k, v = (x.contiguous() for x in (q, k, v))",
        replacement="q, k, v = (x for x in (q, k, v))",
    ),
    _mutant(
        name="layer-second-half-of-the-first-input",
        wrong="The perceptron is fed with the layer's input, not with what attention left.",
        snippet=_SECOND,
        replacement="return self._add(self.mlp(self.mlp_norm(x)), h)",
    ),
    _mutant(
        name="layer-residual-normalised",
        wrong="The residual around the perceptron is of the normalised states (post-norm).",
        snippet=_SECOND,
        replacement=(
            "normal = self.mlp_norm(h)\n        return self._add(self.mlp(normal), normal)"
        ),
    ),
    _mutant(
        name="layer-residual-of-the-input",
        wrong="The residual around the perceptron is the layer's input.",
        snippet=_SECOND,
        replacement="return self._add(self.mlp(self.mlp_norm(h)), x)",
    ),
    _mutant(
        name="layer-without-second-norm",
        wrong="The perceptron is fed with states that are not normalised.",
        snippet=_SECOND,
        replacement="return self._add(self.mlp(h) + 0 * self.mlp_norm(h), h)",
    ),
    _mutant(
        name="layer-second-norm-not-marked",
        wrong="The gradient of the second norm is not summed over tp under sequence parallelism.",
        snippet="self.mlp_norm = norm(config.hidden, sequence_parallel=parallel)",
        replacement="self.mlp_norm = norm(config.hidden)",
        seen="SP-02",
    ),
    _mutant(
        name="layer-norm-of-heads-as-of-tokens",
        wrong="Norms of heads are marked under sequence parallelism only.",
        snippet="sharded_heads=True)",
        replacement="sequence_parallel=parallel)",
        seen="megatron/core/distributed/finalize_model_grads.py, qk_layernorm",
    ),
    _mutant(
        name="layer-one-norm-of-heads",
        wrong="Keys are not normalised by an RMS norm, only by a layer norm.",
        snippet='"key_norm": of_heads()}',
        replacement='"key_norm": of_heads() if config.norm != "rms" else None}',
    ),
    _mutant(
        name="layer-offset-of-one-norm",
        wrong="Norms of heads ignore that weights are zero-centred.",
        snippet="of_heads = partial(norm, config.head_size, sharded_heads=True)",
        replacement=(
            "of_heads = partial(\n"
            "            norm, config.head_size, sharded_heads=True, zero_centered=False\n"
            "        )"
        ),
    ),
    _mutant(
        name="layer-rotary-of-a-part",
        wrong="Under sequence parallelism the first part's positions are repeated for every part.",
        snippet=_ROTATION,
        replacement=("where = where[: x.shape[0]].repeat(split)\n        " + _ROTATION),
        seen="SP-07",
    ),
    _mutant(
        name="layer-rotary-contiguous",
        wrong="Positions are those of contiguous chunks, whatever the placement.",
        snippet='"placement": self.config.placement}\n        where',
        replacement='"placement": "contiguous"}\n        where',
    ),
    _mutant(
        name="layer-rotary-of-one-sequence",
        wrong="The layer turns packed sequences by positions that run on.",
        snippet="positions(length, packed=packed, **placed)",
        replacement="positions(length, **placed)",
        seen="ATT-09",
    ),
    _mutant(
        name="layer-packed-attends-as-one",
        wrong="The layer does not tell attention that sequences are packed.",
        snippet=_GIVEN,
        replacement=_GIVEN.replace('"packed": packed, ', ""),
    ),
    _mutant(
        name="layer-dropout-alike-over-cp",
        wrong="All ranks of a context-parallel group drop alike.",
        snippet=_STREAM,
        replacement='self._stream = tracker.stream(stream_of(*["tp"] * parallel))',
    ),
    _mutant(
        name="layer-dropout-alike-over-tp",
        wrong="Under sequence parallelism all ranks of a tensor-parallel group drop alike.",
        snippet=_STREAM,
        replacement='self._stream = tracker.stream(stream_of("cp"))',
    ),
    _mutant(
        name="layer-dropout-apart-over-tp",
        wrong="Without sequence parallelism copies on tensor-parallel ranks drop differently.",
        snippet=_STREAM,
        replacement='self._stream = tracker.stream(stream_of("tp", "cp"))',
    ),
    _mutant(
        name="layer-shares-dropped-alike",
        wrong="Different heads on ranks of a tensor-parallel group are dropped alike.",
        snippet=_OF_SHARES,
        replacement='tracker.stream(stream_of("cp"))',
    ),
    _mutant(
        name="layer-drops-the-residual",
        wrong="Dropout is applied after the residual is added.",
        snippet="y, bias=None, residual=residual, p=p,",
        replacement="y + residual, bias=None, residual=torch.zeros_like(y), p=p,",
    ),
    _mutant(
        name="layer-drops-once",
        wrong="Only what comes of attention is dropped.",
        snippet=_SECOND,
        replacement="return h + self.mlp(self.mlp_norm(h))",
    ),
    _mutant(
        name="layer-recomputes-on-other-numbers",
        wrong="Recomputation draws numbers from another tracker, which knows nothing of forward.",
        snippet=_AGAIN,
        replacement=_AGAIN.replace("self.tracker", "RandomTracker()"),
        seen="REC-02",
    ),
    _mutant(
        name="layer-recomputes-nothing",
        wrong="Full recomputation is accepted, and everything is kept.",
        snippet='if self.config.recompute in ("full", "full_distributed"):',
        replacement='if self.config.recompute == "whole":',
    ),
    _core(
        name="layer-recomputes-core-twice",
        wrong="Selective recomputation runs core attention once more than it must.",
        snippet=_CORE,
        replacement=(
            "again = lambda *args: checkpoint(self._attend, *args, tracker=self.tracker)\n"
            "        return checkpoint(again, q, k, v, padding, packed, tracker=self.tracker)"
        ),
    ),
    _mutant(
        name="layer-gathers-for-itself",
        wrong="The layer gathers what the linear layers gather themselves.",
        snippet="attended = self.attention(self.input_norm(x), rotary=rotary, **given)",
        replacement=(
            "normal = self.input_norm(x)\n"
            "        torch.distributed.all_reduce(normal.detach().clone(), group=self.groups.tp)\n"
            "        attended = self.attention(normal, rotary=rotary, **given)"
        ),
    ),
    _core(
        name="layer-drops-shares-in-evaluation",
        wrong="Shares of attention are dropped outside of training too.",
        snippet="dropout=self.dropout if self.training else None",
        replacement="dropout=self.dropout",
    ),
    _mutant(
        name="layer-drops-in-evaluation",
        wrong="What is added to the residual is dropped from outside of training too.",
        snippet="p, training = self.config.hidden_dropout, self.training",
        replacement="p, training = self.config.hidden_dropout, True",
    ),
    _core(
        name="layer-no-shares-to-drop",
        wrong="Dropout of attention under context parallelism is accepted and left out.",
        snippet="dropout=self.dropout if self.training else None",
        replacement=(
            "dropout=self.dropout"
            ' if self.training and self.given["groups"].cp.size() == 1 else None'
        ),
    ),
    _mutant(
        name="layer-shares-dropped-alike-over-cp",
        wrong="Different rows on ranks of a context-parallel group are dropped alike.",
        snippet=_OF_SHARES,
        replacement='tracker.stream(stream_of("tp"))',
    ),
    _mutant(
        name="layer-padding-not-handed-on",
        wrong="The layer takes marks of padding and does not tell attention.",
        snippet=_GIVEN,
        replacement=_GIVEN.replace(": padding}", ": None}"),
    ),
    _mutant(
        name="layer-distributes-over-cp",
        wrong="An input is shared out over cp, whose ranks have other tokens.",
        snippet=_DISTRIBUTED,
        replacement=_DISTRIBUTED.replace("groups.tp", "groups.cp"),
    ),
    _mutant(
        name="layer-distributes-nothing",
        wrong="An input that is to be distributed is kept whole.",
        snippet=_DISTRIBUTED,
        replacement="group = None",
    ),
    _mutant(
        name="layer-norm-of-latents-not-marked",
        wrong="The gradient of a latent's norm is not summed over tp under sequence parallelism.",
        snippet="made[name] = norm(sizes[rank], sequence_parallel=parallel)",
        replacement="made[name] = norm(sizes[rank])",
        seen="SP-02",
    ),
    _core(
        name="layer-no-distance-over-cp",
        wrong="ALiBi is accepted and left out under context parallelism.",
        snippet="slopes=self.slopes,",
        replacement='slopes=self.slopes if self.given["groups"].cp.size() == 1 else None,',
    ),
    _core(
        name="layer-slopes-of-the-first-head",
        wrong="All heads of a rank have the slope of its first.",
        snippet="alibi_slopes(heads, group=tp_group)",
        replacement="alibi_slopes(heads, group=tp_group)[:1].expand(heads // tp_group.size())",
    ),
)
