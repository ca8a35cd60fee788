"""Mutants of random streams, dropout and initialisation."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_random = partial(
    Mutant, family="random", module="impl.random", caught_by=("random_streams", "dropout")
)
_stream = partial(Mutant, family="random", module="impl.random", caught_by=("random_streams",))
_dropout = partial(Mutant, family="dropout", module="impl.dropout", caught_by=("dropout",))
_initial = partial(
    Mutant, family="initialisation", module="impl.initialise", caught_by=("initialisation",)
)

_AXES = "        for axis in axes:"
_OF_BIASED = "dropout(biased, p=p, stream=stream, training=training)"
_SWITCH = """\
        self._states[self._current] = self._generator.get_state()
        self._generator.set_state(self._states[name])
"""
_STATES = """\
        self._states[self._current] = self._generator.get_state()
        return {name: state.clone() for name, state in self._states.items()}
"""


def _over(stream: str, *axes: str) -> str:
    """The seeds of a stream made to differ over these axes."""
    return f"        for axis in {axes} if name == {stream} else axes:"


MUTANTS = (
    _random(
        name="random-tensor-parallel-alike",
        wrong="All ranks of a tensor-parallel group share the tensor-parallel stream.",
        snippet=_AXES,
        replacement=_over("TENSOR_PARALLEL", "pp"),
        caught_by=("random_streams", "dropout", "initialisation"),
    ),
    _random(
        name="random-default-per-rank",
        wrong="The default stream differs over tp, so that copies are dropped apart.",
        snippet=_AXES,
        replacement=_over("DEFAULT", "pp", "tp"),
        caught_by=("random_streams", "dropout"),
        seen="RNG-03",
    ),
    _random(
        name="random-context-parallel-alike",
        wrong="All ranks of a context-parallel group drop alike, in different tokens.",
        snippet=_AXES,
        replacement=_over("CONTEXT_PARALLEL", "pp"),
        seen="Megatron-LM's seeds do not depend on cp",
    ),
    _random(
        name="random-one-stream-of-two-axes",
        wrong="Ranks that differ over cp only share the stream of activations split over both.",
        snippet=_AXES,
        replacement=_over("TENSOR_CONTEXT_PARALLEL", "pp", "tp"),
    ),
    _stream(
        name="random-stages-alike",
        wrong="All pipeline stages share the tensor-parallel stream.",
        snippet=_AXES,
        replacement=_over("TENSOR_PARALLEL", "tp"),
        caught_by=("random_streams", "initialisation"),
        seen="RNG-06",
    ),
    _stream(
        name="random-experts-alike",
        wrong="All ranks of ep share the stream of experts, which start equal.",
        snippet=_AXES,
        replacement=_over("EXPERT_PARALLEL", "pp", "etp"),
        caught_by=("random_streams", "initialisation"),
        seen="RNG-01",
    ),
    _stream(
        name="random-experts-of-stages-coincide",
        wrong="The experts of stage 1, ep rank 0 have the stream of those of stage 0, ep rank 1.",
        snippet="            index = index * sizes[axis] + coordinates[axis]",
        replacement=(
            "            step = 1 if axis in ('tp', 'etp') else 100\n"
            "            index += step * coordinates[axis]"
        ),
        caught_by=("random_streams", "initialisation"),
        seen="the sums of Megatron-LM's seeds",
    ),
    _stream(
        name="random-replicas-apart",
        wrong="Data-parallel replicas draw other numbers, so that their weights start apart.",
        snippet="        found[name] = seed + block * _SEEDS_A_STREAM + index",
        replacement=(
            "        found[name] = seed + block * _SEEDS_A_STREAM + index"
            ' + 1000 * coordinates["dp"]'
        ),
        caught_by=("random_streams", "initialisation"),
    ),
    _stream(
        name="random-fork-starts-again",
        wrong="Every fork of a stream draws the numbers of the first.",
        snippet=_SWITCH,
        replacement=(
            "        if self._current == DEFAULT:\n"
            "            self._states[DEFAULT] = self._generator.get_state()\n"
            "        self._generator.set_state(self._states[name])\n"
        ),
        caught_by=("random_streams", "recomputed_block", "initialisation"),
    ),
    _stream(
        name="random-fork-stays",
        wrong="After a fork everything draws from its stream.",
        snippet="        finally:\n            self._switch(before)",
        replacement="        finally:\n            pass",
    ),
    _stream(
        name="random-fork-moves-the-default",
        wrong="After a fork the default generator goes on from the fork's stream.",
        snippet="            self._switch(before)",
        replacement=(
            "            self._states[name] = self._generator.get_state()\n"
            "            self._current = before"
        ),
        caught_by=("random_streams", "recomputed_block"),
    ),
    _stream(
        name="random-states-not-in-use",
        wrong="States that are put back are kept, but not those that the generator draws from.",
        snippet="self._generator.set_state(self._states[self._current])",
        replacement="pass",
        caught_by=("recomputed_block",),
        seen="RNG-08",
    ),
    _stream(
        name="random-states-before-the-last-numbers",
        wrong="States that are told are those when a fork began or ended, not of now.",
        snippet=_STATES,
        replacement=_STATES.partition("\n")[2],
    ),
    _stream(
        name="random-states-not-copied",
        wrong="Who writes into states that were told writes into the streams.",
        snippet=_STATES,
        replacement=(
            "        self._states[self._current] = self._generator.get_state()\n"
            "        return dict(self._states)\n"
        ),
    ),
    _stream(
        name="random-states-kept-as-given",
        wrong="Who writes into states that were put back writes into the streams.",
        snippet="{name: snapshot.states[name].clone() for name in self._states}",
        replacement="dict(snapshot.states)",
    ),
    _dropout(
        name="dropout-default-stream",
        wrong="Whatever an activation is split over, its mask is drawn from the default stream.",
        snippet="    with stream():\n",
        replacement="    with nullcontext():\n",
        caught_by=("dropout", "recomputed_block"),
    ),
    _dropout(
        name="dropout-never-off",
        wrong="Outside of training elements are dropped too.",
        snippet="if not (training and p):",
        replacement="if not p:",
    ),
    _dropout(
        name="dropout-keeps-with-p",
        wrong="p is the probability of keeping.",
        snippet="return F.dropout(x, p)",
        replacement="return F.dropout(x, 1 - p)",
        caught_by=("dropout", "recomputed_block"),
    ),
    _dropout(
        name="dropout-not-scaled",
        wrong="What is kept is not divided by 1 - p.",
        snippet="return F.dropout(x, p)",
        replacement="return F.dropout(x, p) * (1 - p)",
        caught_by=("dropout", "recomputed_block"),
    ),
    _dropout(
        name="dropout-bias-after",
        wrong="The bias is added after the dropout.",
        snippet=_OF_BIASED,
        replacement="dropout(x, p=p, stream=stream, training=training) + (biased - x)",
        caught_by=("dropout", "recomputed_block"),
    ),
    _dropout(
        name="dropout-of-residual",
        wrong="The residual is dropped with the rest.",
        snippet=f"    return residual.to(x.dtype) + {_OF_BIASED}",
        replacement=(
            "    return dropout(residual.to(x.dtype) + biased, p=p, stream=stream,"
            " training=training)"
        ),
        caught_by=("dropout", "recomputed_block"),
    ),
    _dropout(
        name="dropout-any-probability",
        wrong="A probability of one is accepted, and everything dropped.",
        snippet="if not 0.0 <= p < 1.0:",
        replacement="if not 0.0 <= p <= 1.0:",
    ),
    _dropout(
        name="dropout-of-packed-memory",
        wrong="An activation is read as if it lay packed in memory.",
        snippet="return F.dropout(x, p)",
        replacement="return F.dropout(x.as_strided((x.numel(),), (1,)).view(x.shape), p)",
        seen="CP-02",
    ),
    _initial(
        name="initial-another-part",
        wrong="Every rank keeps the first part of what it drew in full.",
        snippet="parts.select(self.dim + 1, dist.get_rank(self.group))",
        replacement="parts.select(self.dim + 1, 0)",
    ),
    _initial(
        name="initial-layers-alike",
        wrong="All parameters are drawn from the run's seed, whatever their names.",
        snippet='seed_of(f"{seed}/{name_of(name)}")',
        replacement="seed_of(str(seed))",
    ),
    _initial(
        name="initial-whatever-the-seed",
        wrong="Values depend on names only: runs with other seeds begin with the same model.",
        snippet='seed_of(f"{seed}/{name_of(name)}")',
        replacement="seed_of(name_of(name))",
    ),
    _initial(
        name="initial-inputs-of-a-part",
        wrong="The spread is that of the inputs of a rank's part.",
        snippet="shape[-1] if inputs is None else inputs",
        replacement="part.shape[-1] if inputs is None else inputs",
    ),
    _initial(
        name="initial-outputs-for-inputs",
        wrong="The spread comes from the outputs of a weight.",
        snippet="shape[-1] if inputs is None else inputs",
        replacement="shape[0] if inputs is None else inputs",
    ),
    _initial(
        name="initial-output-layers-not-scaled",
        wrong="Layers that end in the residual are drawn like all others.",
        snippet="            return output\n",
        replacement="            return inside\n",
    ),
    _initial(
        name="initial-scaled-by-layers-only",
        wrong="The spread of output layers lacks the two of its root.",
        snippet="std / math.sqrt(2.0 * num_layers)",
        replacement="std / math.sqrt(num_layers)",
    ),
    _initial(
        name="initial-shards-from-the-default",
        wrong="Shards are drawn from the default stream, so that all start equal.",
        snippet="return TENSOR_PARALLEL if is_shard(parameter) else DEFAULT",
        replacement="return DEFAULT",
    ),
    _initial(
        name="initial-experts-from-tensor-parallel",
        wrong="Experts are drawn from the tensor-parallel stream, the same on all ep ranks.",
        snippet="        return EXPERT_PARALLEL\n",
        replacement="        return TENSOR_PARALLEL\n",
        seen="RNG-01",
    ),
    _initial(
        name="initial-copies-of-experts-apart",
        wrong="Copies of an expert's bias are drawn by every rank from a stream of its own.",
        snippet='not is_shard(parameter) and groups.size("etp") > 1:',
        replacement='not is_shard(parameter) and groups.size("tp") > 1:',
    ),
    _initial(
        name="initial-biases-by-outputs",
        wrong="The spread of a bias comes from its own size, not from the inputs of the weight.",
        snippet="shape[-1] if inputs is None else inputs",
        replacement="shape[-1]",
    ),
    _initial(
        name="initial-gates-as-one",
        wrong="A gated weight is cut as one block, not gate and up each.",
        snippet="(self.blocks, dist.get_world_size(self.group), -1)",
        replacement="(1, dist.get_world_size(self.group), -1)",
    ),
    _initial(
        name="initial-vectors-left",
        wrong="Vectors keep what their module gave them, whatever the rule says.",
        snippet="        shape = _full_shape(parameter, groups)\n",
        replacement=(
            "        if parameter.dim() < 2:\n"
            "            continue\n"
            "        shape = _full_shape(parameter, groups)\n"
        ),
    ),
    _dropout(
        name="dropout-residual-of-any-shape",
        wrong="The residual of one token is added to all.",
        snippet="if residual.shape != x.shape:",
        replacement="if residual.dim() != x.dim():",
    ),
    _stream(
        name="random-name-taken",
        wrong="A stream is lost where another is added by its name.",
        snippet="        if name in self._states:\n            raise ",
        replacement="        if False:\n            raise ",
    ),
    _stream(
        name="random-seed-taken",
        wrong="Two streams of one seed draw the same numbers.",
        snippet="            if taken == seed:",
        replacement="            if taken == name:",
    ),
    _stream(
        name="random-states-of-others",
        wrong="The states of some streams are put back, and the others are lost.",
        snippet="        self._require_all(snapshot.states)\n",
        replacement=(
            "        states = {**self._states, **snapshot.states}\n"
            "        snapshot = Snapshot(states, snapshot.current)\n"
        ),
    ),
)
