"""The dropouts of a whole model in training: which ranks apply them, and in what order.

All stages go forward through the microbatches of a step in one order: one after the other; with
several chunks a stage, pp of them through the first chunk, then through the next one, and so on
(arXiv:2104.04473, 2.2.2). Ranks of dp have the same random streams, and may drop alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate

from torch import Tensor

from verify.oracle.context import PLACEMENTS, dropout_of_shares
from verify.oracle.contract import Mask, Tensors
from verify.oracle.gpt.model import Model
from verify.oracle.terms import one_of
from verify.placement import Placements, Replicate, Shard


def masks_of(model: Model) -> dict[str, Mask]:
    """All dropouts by name, `STEP.MICROBATCH.embedding` or `STEP.MICROBATCH.LAYER.attended`; the
    layers of multi-token prediction come after those of the last chunk."""
    found: dict[str, Mask] = {}
    if not (model.layer.hidden_dropout or model.layer.attention_dropout):
        return found
    for step in range(model.case.shape["steps"]):
        for microbatch, chunk in _forwards(model):
            for place in range(chunk * model.case.layout.pp, (chunk + 1) * model.case.layout.pp):
                for what, mask in _of_chunk(model, place):
                    found[f"{step}.{microbatch}.{what}"] = mask
    return found


def kept_of(inputs: Tensors, at: tuple[int, int]) -> dict[str, Tensor]:
    """What was kept in a step's microbatch, by `embedding` and `LAYER.attended`."""
    prefix = f"{at[0]}.{at[1]}."
    return {n.removeprefix(prefix): each for n, each in inputs.items() if n.startswith(prefix)}


def _forwards(model: Model) -> Iterator[tuple[int, int]]:
    """Microbatches and chunks in the order of a step."""
    microbatches, layout = model.case.shape["microbatches"], model.case.layout
    group = layout.pp if layout.vpp > 1 else microbatches
    for first in range(0, microbatches, group):
        for chunk in range(layout.vpp):
            for microbatch in range(first, min(first + group, microbatches)):
                yield microbatch, chunk


def _of_chunk(model: Model, place: int) -> Iterator[tuple[str, Mask]]:
    """The dropouts of a chunk, its place in the model given, in forward."""
    case, layer = model.case, model.layer
    sequence, batch = case.shape["sequence"], case.shape["batch"]
    over_tp = Shard(0) if case.layout.sequence_parallel else Replicate()
    cut = model.sequences.cut(one_of(case, "placement", PLACEMENTS))
    placed: Placements = {"cp": cut, "tp": over_tp, "dp": Shard(1)}
    at = {"pp": place % case.layout.pp}
    hidden = Mask(
        (sequence, batch, case.shape["hidden"]), placed, layer.hidden_dropout, at, ("dp",)
    )
    shares = dropout_of_shares(case, case.shape["heads"], cut, layer.attention_dropout)
    placed = {**shares.placements, "dp": Shard(0)}
    shares = replace(shares, placements=placed, at=at, alike=("dp",))
    if place == 0 and layer.hidden_dropout:
        yield "embedding", hidden
    ends = (0, *accumulate(model.counts))
    own = [*range(ends[place], ends[place + 1])]
    if place == len(model.counts) - 1:
        own += range(ends[-1], ends[-1] + model.depths)
    for index in own:
        if layer.attention_dropout:
            yield f"{index}.shares", shares
        if layer.hidden_dropout:
            yield f"{index}.attended", hidden
            yield f"{index}.fed", hidden
