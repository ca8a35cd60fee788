"""The contracts of checkpoints: what was saved at one layout is there at another one.

Both are of the model of a case of `gpt_training`, whose options they have. Option `saved` is the
layout at which it is saved, as `tp=2,pp=2,sequence_parallel=1`, of as many ranks as that of the
case, at which it is loaded; what it leaves out is one. Every rank is given everything in full and
takes its part, as the two layouts cut it in two ways. Rows of padding are zeros in what comes out.

Two options of `checkpoint` make it one to refuse. `unlike` names in what the run that loads differs
from the one that saved. `checkpoint` says what became of what was saved: `no folder`, or an `empty`
one; one of its files is `missing`, `truncated` to a half, or `damaged` in a bit near its end; or
the last digit of one that is text is `altered`. The error has to say that it is about a checkpoint,
or which of these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from verify.case import Case, Option
from verify.errors import BadArgument
from verify.layout import Layout
from verify.oracle.contract import Contract, Tensors, TensorSpec
from verify.oracle.gpt import AXES, OPTIONS, gpt_training
from verify.oracle.gpt.model import Model
from verify.oracle.gpt.parameters import Stack, stacks_of
from verify.oracle.terms import known_options, one_of, whole_number
from verify.placement import Partial, Placements, Shard

RESUMED_OPTIONS = (*OPTIONS, "saved", "after")
ROUND_TRIP_OPTIONS = (
    "tied",
    "bias",
    "norm",
    "activation",
    "positions",
    "rotary_dim",
    "multiple",
    "every",
    "placement",
    "qk_norm",
    "sink",
    "first",
    "last",
    "split",
    "multi_token",
    "distributed",
    "bucket",
    "saved",
    "another",
    "unlike",
    "checkpoint",
)
DAMAGED = ("no folder", "empty", "missing", "truncated", "damaged", "altered")
ANOTHER = ("none", "older", "newer")
# What every run of `checkpoint` is trained with.
ROUND_TRIP_TRAINED: Mapping[str, Option] = {"optimizer": "adam", "loss_scale": "dynamic"}
_SWITCHED: Mapping[Option, Option] = {
    "gelu": "squared_relu",
    "squared_relu": "gelu",
    "swiglu": "geglu",
    "geglu": "swiglu",
    "layer": "rms",
    "rms": "layer",
}
# What a run may have otherwise: a size, or options and what they are then.
UNLIKE_SIZES: Mapping[str, Callable[[int], int]] = {
    "vocabulary": lambda size: size - 1,
    "ffn": lambda size: 2 * size,
}
UNLIKE: Mapping[str, Callable[[Case], Mapping[str, Option]]] = {
    "activation": lambda case: {"activation": _SWITCHED[case.options.get("activation", "gelu")]},
    "norm": lambda case: {"norm": _SWITCHED[case.options.get("norm", "layer")]},
    "sink": lambda case: {"sink": not case.options.get("sink", False)},
    "optimizer": lambda case: {"optimizer": "sgd"},
    "loss_scale": lambda case: {"loss_scale": "static"},
    "schedule": lambda case: {"schedule": "linear", "decay": 3},
}
# How the chunks of the saved layout share out layers is not the case's business.
_SPLITS = ("split", "first", "last", "pipeline")
VOCABULARIES = ("embedding.tokens.weight", "output.weight")
STATES = ("exp_avg", "exp_avg_sq")
# Of a run: steps, samples, updates; the value of a loss scale, good steps and overflows.
PROGRESS = 6
# The axes over which the ranks of a stream have numbers of their own.
STREAMS: Mapping[str, tuple[str, ...]] = {
    "default": ("pp",),
    "tensor-parallel": ("pp", "tp"),
    "context-parallel": ("pp", "cp"),
    "tensor-context-parallel": ("pp", "tp", "cp"),
    "expert-parallel": ("pp", "ep", "etp"),
}
DRAWN_BEFORE, DRAWN, DRAWN_BELOW = 5, 4, 2**20


def saved_layout(case: Case) -> Layout:
    """The layout of option `saved`, that of the case if left out. Raises BadArgument for a text
    that is none, or of another number of ranks."""
    text = str(case.options.get("saved") or "")
    if not text:
        return case.layout
    sizes: dict[str, object] = {}
    for pair in text.split(","):
        name, _, value = pair.partition("=")
        if name != "order" and not value.isdecimal():
            raise BadArgument(f"case.options.saved: {pair!r} is no size, such as tp=2")
        sizes[name] = value if name == "order" else int(value)
    sizes["sequence_parallel"] = bool(sizes.get("sequence_parallel", 0))
    found = Layout.from_json(sizes)
    if found.world_size != case.layout.world_size:
        raise BadArgument(
            f"case.options.saved: {found} has {found.world_size} ranks, {case.layout} has"
            f" {case.layout.world_size}"
        )
    return found


def text_of(layout: Layout) -> str:
    """The option `saved` for a layout."""
    found = {n: int(v) for n, v in layout.to_json().items() if isinstance(v, int)}
    pairs = [f"{n}={v}" for n, v in found.items() if v != int(getattr(Layout(), n) or 0)]
    return ",".join([*pairs, f"order={layout.order}"])


def unlike(case: Case) -> Case:
    """The case of the run that loads, which has one thing otherwise if option `unlike` says so.
    Raises BadArgument for what is none of these."""
    options = {name: value for name, value in case.options.items() if name != "unlike"}
    name = str(case.options.get("unlike", ""))
    if name in UNLIKE_SIZES:
        sizes = {**case.shape, name: UNLIKE_SIZES[name](case.shape[name])}
        return dataclasses.replace(case, shape=sizes, options=options)
    if name in UNLIKE:
        return dataclasses.replace(case, options={**options, **UNLIKE[name](case)})
    if name:
        allowed = ", ".join((*UNLIKE_SIZES, *UNLIKE))
        raise BadArgument(f"case.options.unlike: {name!r} is not one of {allowed}")
    return case


def case_at(case: Case, layout: Layout) -> Case:
    """The case of `gpt_training` that trains the model at a layout."""
    left_out = (
        "saved",
        "after",
        "another",
        "unlike",
        "checkpoint",
        "stopped",
        *(_SPLITS if layout != case.layout else ()),
    )
    options = {name: value for name, value in case.options.items() if name not in left_out}
    return dataclasses.replace(case, concept="gpt_training", layout=layout, options=options)


def resumed_training(case: Case) -> Contract:
    """`gpt_training` that is saved after the first `after` steps, at the layout `saved`, and goes
    on at that of the case: what each step after that gives.

    Inputs are those of `gpt_training` in full, and `given NAME`, a stack of parameters without
    padding. No dropout, whose numbers are of a layout.
    """
    known_options(case, *RESUMED_OPTIONS)
    steps, after = case.shape.get("steps", 0), whole_number(case, "after", least=1) or 1
    if after >= steps:
        raise BadArgument(f"case.options.after: {after} of {steps} steps leave none to go on with")
    if case.options.get("hidden_dropout") or case.options.get("attention_dropout"):
        raise BadArgument("case.options.hidden_dropout: resumed_training has none; leave it out")
    if case.options.get("balance") == "batch" and saved_layout(case).dp != case.layout.dp:
        raise BadArgument(
            f"case.options.balance: microbatches of dp={case.layout.dp} are others than those of"
            f" dp={saved_layout(case).dp}; give sequence or global"
        )
    if case.options.get("packed") and saved_layout(case).cp != case.layout.cp:
        raise BadArgument(
            f"case.options.packed: where sequences end at cp={case.layout.cp} is not where they end"
            f" at cp={saved_layout(case).cp}; leave it out"
        )
    plain = _checked(case)
    base, stacks = gpt_training(plain), stacks_of(Model.of(plain))
    inputs = {n: dataclasses.replace(spec, placements={}) for n, spec in base.inputs.items()}
    inputs |= {f"given {name}": TensorSpec(_real(stacks[name], case), {}, None) for name in stacks}
    outputs = {
        name: dataclasses.replace(spec, shape=(steps - after, *spec.shape[1:]))
        for name, spec in base.outputs.items()
    }

    def reference(inputs: Tensors, parameters: Tensors) -> Tensors:
        given = {n: _padded(started(n, inputs[f"given {n}"]), s) for n, s in stacks.items()}
        told = dict(base.reference({name: inputs[name] for name in base.inputs}, given))
        for name in set(VOCABULARIES) & set(stacks):
            told[f"new {name}"][:, :, case.shape["vocabulary"] :] = 0
        return {name: each[after:] for name, each in told.items()}

    return dataclasses.replace(
        base,
        inputs=inputs,
        parameters={},
        outputs=outputs,
        reference=reference,
        frozen=frozenset(),
        settle=None,
    )


def started(name: str, drawn: Tensor) -> Tensor:
    """The initial values of a stack, which training can begin with, of those that are drawn."""
    return drawn / 2 if drawn.dim() > 2 else drawn


def round_trip(case: Case) -> Contract:
    """Parameters, states of Adam, progress and random streams, saved and loaded: what they were.

    Inputs, in full: `NAME`, `exp_avg NAME` and `exp_avg_sq NAME` of every stack without padding,
    `progress`, and `seed STREAM`, an int for each rank that has numbers of its own. Outputs are the
    same as the loaded run has them, the states of a share with zeros around them where
    `distributed`; and `draws STREAM`, the next numbers of a stream that was seeded and drawn from
    before, where both layouts have the axes of a stream in the same sizes.

    With option `another` the folder has a second checkpoint, of a run after as many steps, or one
    more or less: an `older` one, and the newest in the folder is loaded; or a `newer` one, and the
    first is loaded by its name. `none` is the default.
    """
    known_options(case, *ROUND_TRIP_OPTIONS)
    if "unlike" in case.options:
        unlike(case)
        raise BadArgument(
            f"case.options.unlike: a run with another {case.options['unlike']} cannot load it"
        )
    if "checkpoint" in case.options:
        how = one_of(case, "checkpoint", DAMAGED)
        raise BadArgument(f"case.options.checkpoint: one that is {how} cannot be loaded")
    one_of(case, "another", ANOTHER)
    plain, saved = _checked(case), saved_layout(case)
    stacks = stacks_of(Model.of(plain))
    kept = [name for name, axes in STREAMS.items() if _alike(axes, saved, case.layout)]
    inputs: dict[str, TensorSpec] = {}
    outputs: dict[str, TensorSpec] = {}
    for name, stack in stacks.items():
        copies = ("edp",) if ".experts." in name else ("dp", "cp")
        parts: Placements = (
            {axis: Partial() for axis in copies} if case.options.get("distributed", False) else {}
        )
        for full in (name, *(f"{state} {name}" for state in STATES)):
            inputs[full] = TensorSpec(_real(stack, case), {}, None)
            placed = stack.placements if full == name else {**stack.placements, **parts}
            outputs[full] = TensorSpec(stack.full, placed, None)
    inputs["progress"] = TensorSpec((PROGRESS,), {}, None, high=999)
    outputs["progress"] = TensorSpec((PROGRESS,), {}, None)
    for name in kept:
        lengths = tuple(_sizes(case.layout)[axis] for axis in STREAMS[name])
        placed = {axis: Shard(dim) for dim, axis in enumerate(STREAMS[name])}
        inputs[f"seed {name}"] = TensorSpec(lengths, {}, None, high=2**16)
        outputs[f"draws {name}"] = TensorSpec((*lengths, DRAWN), placed, None)

    def reference(inputs: Tensors, parameters: Tensors) -> Tensors:
        found: dict[str, Tensor] = {}
        for name, stack in stacks.items():
            for full in (name, *(f"{state} {name}" for state in STATES)):
                found[full] = _padded(inputs[full], stack)
        found["progress"] = inputs["progress"].to(torch.float64)
        return found | {f"draws {name}": draws(inputs[f"seed {name}"]) for name in kept}

    return Contract(
        axes=AXES,
        inputs=inputs,
        parameters={},
        outputs=outputs,
        reference=reference,
        linear=True,
        divided=gpt_training(plain).divided,
        over=gpt_training(plain).over,
    )


def _checked(case: Case) -> Case:
    """The case of `gpt_training` at the case's layout, which is one at the saved layout too."""
    # verify.lens knows contracts, and this is one.
    from verify.lens import check_fits
    from verify.replica import RankMap

    for layout in (saved_layout(case), case.layout):
        plain = case_at(case, layout)
        contract = gpt_training(plain)
        check_fits(plain, contract, RankMap(layout, contract.axes))
    return plain


def _real(stack: Stack, case: Case) -> tuple[int, ...]:
    """The shape of a stack without rows of padding."""
    if stack.name not in VOCABULARIES:
        return stack.full
    return (stack.full[0], case.shape["vocabulary"], *stack.full[2:])


def _padded(values: Tensor, stack: Stack) -> Tensor:
    found = values.new_zeros(stack.full)
    found[:, : values.shape[1]] = values
    return found


def draws(seeds: Tensor, *, before: int = DRAWN_BEFORE) -> Tensor:
    """What a generator gives after its first numbers, for each of the seeds."""
    found = []
    for seed in seeds.reshape(-1).tolist():
        generator = torch.Generator().manual_seed(int(seed))
        torch.randint(DRAWN_BELOW, (before,), generator=generator)
        found.append(torch.randint(DRAWN_BELOW, (DRAWN,), generator=generator))
    return torch.stack(found).view(*seeds.shape, DRAWN).to(torch.float64)


def _sizes(layout: Layout) -> dict[str, int]:
    return {**layout.sizes, **layout.expert_sizes}


def _alike(axes: tuple[str, ...], one: Layout, other: Layout) -> bool:
    return all(_sizes(one)[axis] == _sizes(other)[axis] for axis in axes)


__all__ = ["resumed_training", "round_trip", "saved_layout"]
