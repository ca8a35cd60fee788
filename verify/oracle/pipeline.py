"""A stack of layers cut over a pipeline, and trained on several microbatches.

Every layer is x + tanh(x W^T + b) / 2, so that neither activations grow nor gradients vanish over
many layers, in float16 too. A weight that is `shared` is used by something else as well, as a tied
embedding is: its diagonal is added to the bias. Layer l of L is on chunk l // (L / (pp vpp)), and
chunk k on stage k % pp (arXiv:2104.04473, 2.2): the stack's weights [layers, hidden, hidden] are
cut over pp in vpp blocks. The loss of a microbatch is the mean of (y - target)^2 over its elements,
and the total loss the mean of these. With several `rounds` the schedule runs as often, over an
equal part of the microbatches each, and gradients add up.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from verify.case import Case
from verify.errors import BadArgument
from verify.oracle.contract import Contract, Step, Tensors, TensorSpec
from verify.oracle.terms import known_options, one_of, sizes, switches, whole_number
from verify.placement import Partial, Placements, Replicate

SCHEDULES = ("default", "gpipe", "1f1b", "interleaved", "zb-h1")
SWITCHES = {
    "variable": False,
    "overlap": True,
    "evaluated": False,
    "frozen_weight": False,
    "shared": False,
    "freed": False,
}
OPTIONS = ("schedule", "rounds", *SWITCHES)
# What announces a shape: a number of dimensions, and up to seven sizes.
ANNOUNCEMENT = 8


def pipeline(case: Case) -> Contract:
    """x [microbatches, sequence, batch, hidden] and targets are given to every stage; only the
    first reads x and has its gradient, only the last has the losses, and the other stages' parts of
    these are zero: Partial. `weight` [layers, hidden, hidden] and `bias` [layers, hidden] are on
    one stage each.

    Options: `schedule`, by default interleaved with vpp above 1, else 1f1b; `variable`: microbatch
    i has the first 1 + i % sequence of its tokens only, whose number each sender announces;
    `overlap`: whether stages compute while tensors travel; `evaluated`: each round begins with an
    evaluation, forward only, whose losses are the output `evaluation`; `frozen_weight`: the biases
    alone are trained; `shared`: a weight's gradient comes from its layer and from its diagonal;
    `freed`: no activation stays in memory once it is sent, which some targets do always, as impl,
    and others if asked; `rounds`.

    Raises BadArgument for layers that do not divide by the chunks, for another schedule than
    interleaved with several chunks a stage, and for that one with microbatches of a round that are
    no multiple of pp.
    """
    known_options(case, *OPTIONS)
    given = switches(case, SWITCHES)
    microbatches, sequence, batch, hidden, layers = sizes(
        case, "microbatches", "sequence", "batch", "hidden", "layers"
    )
    chunks = case.layout.pp * case.layout.vpp
    if layers % chunks:
        raise BadArgument(
            f"case.shape.layers: {layers} does not divide by the {chunks} chunks of pp * vpp"
        )
    _check_schedule(case, microbatches)
    lengths = lengths_of(case)

    def reference(inputs: Tensors, parameters: Tensors) -> Tensors:
        stack = parameters
        if given["shared"]:
            diagonals = parameters["weight"].diagonal(dim1=1, dim2=2)
            stack = {**parameters, "bias": parameters["bias"] + diagonals}
        losses = torch.stack(
            [
                _loss(inputs["x"][i, :length], inputs["targets"][i, :length], stack)
                for i, length in enumerate(lengths)
            ]
        )
        found = {"loss": losses.mean(), "losses": losses}
        return found | ({"evaluation": losses.clone()} if given["evaluated"] else {})

    whole: Placements = {"pp": Replicate()}
    parts: Placements = {"pp": Partial()}
    shape = (microbatches, sequence, batch, hidden)
    each = TensorSpec((microbatches,), parts, None)
    outputs = {"loss": TensorSpec((), parts, whole), "losses": each}
    outputs |= {"evaluation": each} if given["evaluated"] else {}
    return Contract(
        inputs={
            "x": TensorSpec(shape, whole, parts),
            "targets": TensorSpec(shape, whole, None),
        },
        parameters={"weight": (layers, hidden, hidden), "bias": (layers, hidden)},
        outputs=outputs,
        reference=reference,
        axes=("pp",),
        frozen=frozenset({"weight"} if given["frozen_weight"] else ()),
        forward=lambda at: _sent(case, at["pp"], given),
        backward=(),
        finish=(),
    )


def lengths_of(case: Case) -> tuple[int, ...]:
    """How many tokens each microbatch has."""
    sequence, count = case.shape["sequence"], case.shape["microbatches"]
    if not case.options.get("variable", False):
        return (sequence,) * count
    return tuple(1 + i % sequence for i in range(count))


def schedule_of(case: Case) -> str:
    """The kind of schedule that the case asks for."""
    kind = one_of(case, "schedule", SCHEDULES)
    if kind == SCHEDULES[0]:
        return "interleaved" if case.layout.vpp > 1 else "1f1b"
    return kind


def rounds_of(case: Case) -> int:
    """How often the schedule runs. Raises BadArgument where the microbatches do not divide."""
    rounds = whole_number(case, "rounds", least=1) or 1
    if case.shape["microbatches"] % rounds:
        raise BadArgument(
            f"case.options.rounds: {rounds} do not divide {case.shape['microbatches']} microbatches"
        )
    return rounds


def _check_schedule(case: Case, microbatches: int) -> None:
    kind, each = schedule_of(case), microbatches // rounds_of(case)
    if case.layout.vpp > 1 and kind != "interleaved":
        raise BadArgument(f"case.options.schedule: {kind} on {case.layout} has one chunk a stage")
    if kind == "interleaved" and each % case.layout.pp:
        raise BadArgument(
            f"case.shape.microbatches: {each} a round are no multiple of pp={case.layout.pp}, which"
            " interleaved needs"
        )


def _loss(x: Tensor, target: Tensor, parameters: Tensors) -> Tensor:
    for weight, bias in zip(parameters["weight"], parameters["bias"], strict=True):
        x = x + F.linear(x, weight, bias).tanh() / 2
    return (x - target).square().mean()


def _sent(case: Case, stage: int, given: Mapping[str, bool]) -> tuple[Step, ...]:
    """What a stage sends: of each microbatch one activation forward and one gradient back over each
    border between its chunks and others, of as many elements as the microbatch has; with an
    evaluation, one more activation."""
    pp, vpp = case.layout.pp, case.layout.vpp
    places = [chunk * pp + stage for chunk in range(vpp)]
    forward = sum(place < pp * vpp - 1 for place in places) * (2 if given["evaluated"] else 1)
    backward = sum(place > 0 for place in places)
    steps: list[Step] = []
    for length in lengths_of(case):
        elements = length * case.shape["batch"] * case.shape["hidden"]
        steps += [Step("send", "pp", elements)] * (forward + backward)
        steps += [Step("send", "pp", ANNOUNCEMENT)] * forward if given["variable"] else []
    return tuple(steps)
