"""A case of `gpt_training` read once: the model, and which stage has what of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from verify.case import Case, Option
from verify.errors import BadArgument
from verify.oracle.context import PLACEMENTS, Sequences, sequences_of
from verify.oracle.contract import Contract, TensorSpec
from verify.oracle.layer import LATENT, Layer
from verify.oracle.layer import OPTIONS as _LAYER
from verify.oracle.moe.layer import moe_layer
from verify.oracle.moe.rules import Rules, rules
from verify.oracle.pipeline import SCHEDULES
from verify.oracle.terms import known_options, number, one_of, sizes, switches, whole_number
from verify.oracle.training_plan import OPTIONS as _TRAINING
from verify.oracle.transformer import transformer_layer

POSITIONS = ("none", "rotary", "learned")
SIZES = (
    "steps",
    "microbatches",
    "sequence",
    "batch",
    "hidden",
    "heads",
    "groups",
    "head_size",
    "ffn",
    "layers",
    "vocabulary",
)
# The kind of a norm is `norm`, and so it is here: the order of the gradients' is `order`. No
# norm is a spare one.
TRAINING = tuple(name for name in _TRAINING if name not in ("norm", "spare"))
FROZEN = ("", "norm", "mlp", "embedding", "layers")
# Of how scores become shares, what needs nothing of the data; `layer_scaling` numbers the layers.
_SCORES = ("alibi", "sink", "scale")
LAYER = (*_LAYER, *_SCORES)
# Of routers, the losses that they add.
AUXILIARY = ("balance", "coefficient", "z_loss")
ROUTED = ("dispatcher", "activation", *AUXILIARY)
OWN = (
    "positions",
    "max_sequence",
    "tied",
    "multiple",
    "every",
    "first",
    "last",
    "split",
    "pipeline",
    "dispatcher",
    *AUXILIARY,
    "multi_token",
    "multi_token_scaling",
    "multi_token_normalised",
    "layer_scaling",
    "evaluated",
    "order",
)
OPTIONS = (*OWN, *LAYER, *TRAINING)


@dataclass(frozen=True)
class Model:
    """A checked case. `counts` are the layers of every chunk in the order of the model; `rule` is
    how tokens choose experts, in every `every`-th layer, None without experts. `depths` are the
    modules of multi-token prediction, whose layers are numbered on, `scaling` is the weight of the
    mean of their losses, and `normalised` says whether they are given normalised states."""

    case: Case
    layer: Layer
    inner: Contract
    rule: Rules | None
    positions: str
    tied: bool
    every: int
    padded: int
    counts: tuple[int, ...]
    depths: int
    scaling: float
    normalised: bool

    @staticmethod
    def of(case: Case) -> Model:
        """Raises BadArgument for what cannot be computed."""
        known_options(case, *OPTIONS)
        sizes(case, *SIZES, optional=("experts", "top_k", "shared_ffn", *LATENT))
        names = {"tied": True, "evaluated": False, "layer_scaling": False}
        given = switches(case, {**names, "multi_token_normalised": False})
        every = whole_number(case, "every", least=1) or 1
        for name in ("every", *AUXILIARY):
            if "experts" not in case.shape and name in case.options:
                given_, why = case.options[name], "but the case has no experts"
                raise BadArgument(f"case.options.{name}: {given_}, {why}")
        positions = one_of(case, "positions", POSITIONS)
        if (positions == "rotary") is not (case.options.get("rotary_dim") is not None):
            raise BadArgument(
                f"case.options.positions: {positions} and rotary_dim do not go together"
            )
        unit = (whole_number(case, "multiple", least=1) or 1) * case.layout.tp
        plain = layer_case(case)
        batch = -(-case.shape["batch"] // case.layout.dp)
        transformer_layer(dataclasses.replace(plain, shape={**plain.shape, "batch": batch}))
        _check_schedule(case)
        counts = _counts(case)
        if case.options.get("overflow"):
            _check_overflow(case, positions, counts[0])
        return Model(
            case=case,
            layer=Layer.of(plain),
            inner=transformer_layer(plain),
            rule=_rule(case),
            positions=positions,
            tied=given["tied"],
            every=every,
            padded=-(-case.shape["vocabulary"] // unit) * unit,
            counts=counts,
            depths=whole_number(case, "multi_token", least=0) or 0,
            scaling=_scaling(case),
            normalised=given["multi_token_normalised"],
        )

    @cached_property
    def sequences(self) -> Sequences:
        """Those of every row of the first microbatch. Where they lie is the same in all."""
        return self.sequences_in(0)

    @property
    def lengths(self) -> Mapping[str, TensorSpec]:
        """What tells of packed sequences: `cu_seqlens` [microbatches, sequences + 1], the same in
        every step, and `cu_seqlens_padded` [sequences + 1]."""
        count = self.case.shape["microbatches"]
        found = dict(self.sequences.inputs)
        if found:
            each = [self.sequences_in(m).inputs["cu_seqlens"] for m in range(count)]
            values = tuple(value for spec in each for value in spec.values or ())
            found["cu_seqlens"] = TensorSpec((count, *each[0].shape), {}, None, values=values)
        return found

    @property
    def max_sequence(self) -> int:
        """The most tokens that a sequence may have, those of a row unless the case says so."""
        row = self.case.shape["sequence"]
        return whole_number(self.case, "max_sequence", least=1) or row

    def sequences_in(self, microbatch: int) -> Sequences:
        """Those of every row of a microbatch."""
        placement = one_of(self.case, "placement", PLACEMENTS)
        return sequences_of(self.case, self.case.shape["sequence"], placement, draw=microbatch)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer of the model, counted from 0, has experts."""
        return self.rule is not None and layer % self.every == 0

    def stage_of(self, layer: int) -> int:
        """The stage that has a layer: chunk k, in the order of the model, is on stage k % pp."""
        ends = accumulate(self.counts)
        place = next(place for place, end in enumerate(ends) if layer < end)
        return place % self.case.layout.pp


def layer_case(case: Case) -> Case:
    """The same of one layer, as a case of `transformer_layer`."""
    names = ("sequence", "batch", "hidden", "heads", "groups", "head_size", "ffn", *LATENT)
    shape = {name: case.shape[name] for name in names if name in case.shape}
    options = {name: value for name, value in case.options.items() if name in LAYER}
    return dataclasses.replace(case, concept="transformer_layer", shape=shape, options=options)


def training_case(case: Case) -> Case:
    """The same of the optimizer, as a case of `training_steps`."""
    options: dict[str, Option] = {n: v for n, v in case.options.items() if n in TRAINING}
    if "order" in case.options:
        options["norm"] = case.options["order"]
    return dataclasses.replace(case, concept="training_steps", options=options)


def expert_case(case: Case) -> Case:
    """The same of a mixture of experts, as a case of `moe_layer`."""
    names = ("sequence", "batch", "hidden", "ffn", "experts", "top_k", "shared_ffn")
    shape = {name: case.shape[name] for name in names if name in case.shape}
    options = {n: v for n, v in case.options.items() if n in ROUTED}
    return dataclasses.replace(case, concept="moe_layer", shape=shape, options=options)


def _scaling(case: Case) -> float:
    """That of the losses of multi-token prediction: Megatron-LM's default, where none is given."""
    found = number(case, "multi_token_scaling", least=0.0)
    return 0.1 if found is None else found


def _rule(case: Case) -> Rules | None:
    if "experts" not in case.shape:
        if case.layout.ep > 1 or case.layout.expert_tp != case.layout.tp:
            raise BadArgument(f"case.layout: {case.layout} splits experts, of which there are none")
        return None
    plain = expert_case(case)
    moe_layer(plain)
    found = rules(plain)
    found.check_sizes()
    return found


def _check_schedule(case: Case) -> None:
    kind, layout = one_of(case, "pipeline", SCHEDULES), case.layout
    if kind == SCHEDULES[0]:
        kind = "interleaved" if layout.vpp > 1 else "1f1b"
    if layout.vpp > 1 and kind != "interleaved":
        raise BadArgument(f"case.options.pipeline: {kind} on {layout} has one chunk a stage")
    if kind == "interleaved" and case.shape["microbatches"] % layout.pp:
        raise BadArgument(
            f"case.shape.microbatches: {case.shape['microbatches']} are no multiple of"
            f" pp={layout.pp}, which interleaved needs"
        )


def _check_overflow(case: Case, positions: str, layers: int) -> None:
    """Raise BadArgument unless some gradient must overflow with that of what any chunk gives: of
    the first one, which has so many layers."""
    if case.options.get("frozen") == "embedding":
        raise BadArgument("case.options.overflow: no gradient passes a frozen embedding")
    # Layers sum gradients over tp, and the beginning of sequence parallelism gathers them.
    apart = case.layout.tp > 1 and not case.layout.sequence_parallel
    if apart and not layers and positions != "learned":
        raise BadArgument(
            "case.options.overflow: the first chunk has no layer, and a rank's part of the"
            f" vocabulary, of tp={case.layout.tp}, may have none of the tokens"
        )


def _counts(case: Case) -> tuple[int, ...]:
    """Megatron-LM's split: equally many layers a stage, or so many on the first and the last and
    equally many on the others, and of a stage equally many a chunk; or the option `split`."""
    pp, vpp, layers = case.layout.pp, case.layout.vpp, case.shape["layers"]
    if text := case.options.get("split"):
        counts = tuple(int(each) for each in str(text).split(","))
        if len(counts) != pp * vpp or sum(counts) != layers:
            raise BadArgument(f"case.options.split: {text} is no split of {layers} layers")
        if any(case.options.get(name) is not None for name in ("first", "last")):
            raise BadArgument(f"case.options.split: {text} says it all; leave out first and last")
        return _checked(case, counts)
    named: Mapping[int, int | None] = {
        0: whole_number(case, "first", least=0),
        pp - 1: whole_number(case, "last", least=0),
    }
    fixed = {stage: count for stage, count in named.items() if count is not None}
    left, others = layers - sum(fixed.values()), pp - len(fixed)
    if left < 0 or (left and not others) or (others and left % others):
        raise BadArgument(f"case.shape.layers: {layers} do not divide by the stages, {fixed} given")
    stages = [fixed.get(stage, left // max(others, 1)) for stage in range(pp)]
    if any(count % vpp for count in stages):
        raise BadArgument(f"case.shape.layers: {stages} on the stages do not divide by vpp={vpp}")
    return _checked(case, tuple(count // vpp for count in stages) * vpp)


def _checked(case: Case, counts: tuple[int, ...]) -> tuple[int, ...]:
    if min(counts, default=0) < 0 or 0 in counts[1:-1]:
        raise BadArgument(f"case.shape.layers: {counts} leave a chunk of {case.layout} with none")
    return counts
