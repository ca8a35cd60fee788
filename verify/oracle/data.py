"""The contracts of data: which samples a rank has, and which of their tokens."""

from __future__ import annotations

from math import lcm

import torch

from verify.case import Case
from verify.errors import BadArgument
from verify.oracle.context import PLACEMENTS
from verify.oracle.contract import Contract, Tensors, TensorSpec
from verify.oracle.terms import known_options, one_of, sizes, whole_number
from verify.placement import Partial, Placements, Shard, ZigzagShard

AXES = ("tp", "cp", "dp", "pp")
_VOCABULARY = 1000


def batches(case: Case) -> Contract:
    """The microbatches of a step: `tokens`, `targets` and `mask` [microbatches, batch, sequence],
    the sequence as `placement` says over cp, the batch Shard over dp, alike over tp and pp.

    Given are a text [length], of which sample i is the tokens from i * sequence on, its targets
    those one further, and an `order` of samples: the step has those after the first `consumed`, an
    option, all of which count. Raises BadArgument; for a text of no sample only the reference
    does, so that there is something to give to a target, which has to refuse it.
    """
    length, sequence, batch, microbatches = sizes(
        case, "length", "sequence", "batch", "microbatches"
    )
    known_options(case, "placement", "consumed")
    consumed = whole_number(case, "consumed", least=0) or 0
    zigzag = one_of(case, "placement", PLACEMENTS) == "zigzag"
    samples = (length - 1) // sequence
    shape = (microbatches, batch, sequence)
    placed: Placements = {"dp": Shard(1), "cp": ZigzagShard(2) if zigzag else Shard(2)}

    def reference(inputs: Tensors, parameters: Tensors) -> Tensors:
        if samples < 1:
            raise BadArgument(f"case.shape.length: {length} tokens have no sample of {sequence}")
        text, chosen = inputs["text"].double(), inputs["order"][consumed:]
        rows = text[: samples * sequence].view(samples, sequence)
        after = text[1 : samples * sequence + 1].view(samples, sequence)
        return {
            "tokens": rows[chosen].view(shape),
            "targets": after[chosen].view(shape),
            "mask": torch.ones(shape, dtype=torch.float64),
        }

    return Contract(
        axes=AXES,
        inputs={
            "text": TensorSpec((length,), {}, None, high=_VOCABULARY),
            "order": TensorSpec((consumed + microbatches * batch,), {}, None, high=max(samples, 1)),
        },
        parameters={},
        outputs=dict.fromkeys(("tokens", "targets", "mask"), TensorSpec(shape, placed, None)),
        reference=reference,
        linear=True,
        forward=(),
        backward=(),
    )


def sample_order(case: Case) -> Contract:
    """The samples that steps of microbatches * batch have, over as many epochs as make whole steps,
    rows in the order that `batches` has them in.

    `seen` [epochs, samples] is how often each sample was in each epoch, summed over dp: once.
    `alike` [steps] is how many rows of a step, summed over dp, are the same once more, when another
    run takes the steps from the last to the first: all.
    """
    samples, batch, microbatches = sizes(case, "samples", "batch", "microbatches")
    known_options(case)
    step = batch * microbatches
    together = lcm(samples, step)
    shapes = {"seen": (together // samples, samples), "alike": (together // step,)}
    told = {"seen": 1.0, "alike": float(step)}
    full = {
        name: torch.full(shape, told[name], dtype=torch.float64) for name, shape in shapes.items()
    }
    return Contract(
        axes=AXES,
        inputs={},
        parameters={},
        outputs={n: TensorSpec(shape, {"dp": Partial()}, None) for n, shape in shapes.items()},
        reference=lambda inputs, parameters: full,
        linear=True,
        divided={"batch": batch},
        over={"batch": ("dp",)},
    )
