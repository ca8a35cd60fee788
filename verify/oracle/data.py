"""The contracts of data: which samples a rank has, and which of their tokens."""

from __future__ import annotations

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
    option, all of which count. Raises BadArgument, as does the reference for a text of no sample.
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
    """`seen` [epochs, samples]: how often each sample was in the steps of an epoch, summed over dp:
    once. A step has microbatches * batch samples, and an epoch so many whole steps.

    Raises BadArgument for samples that are no multiple of a step's.
    """
    epochs, samples, batch, microbatches = sizes(case, "epochs", "samples", "batch", "microbatches")
    known_options(case)
    if samples % (batch * microbatches):
        raise BadArgument(
            f"case.shape.samples: {samples} are no steps of {batch} * {microbatches} samples"
        )
    once = torch.ones(epochs, samples, dtype=torch.float64)
    return Contract(
        axes=AXES,
        inputs={},
        parameters={},
        outputs={"seen": TensorSpec((epochs, samples), {"dp": Partial()}, None)},
        reference=lambda inputs, parameters: {"seen": once},
        linear=True,
        divided={"batch": batch},
        over={"batch": ("dp",)},
    )
