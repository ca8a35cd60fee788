"""The embedding of a vocabulary split over tp: y = weight[tokens].

Section 3 of arXiv:1909.08053.
"""

from __future__ import annotations

from torch.nn import functional as F

from verify.case import Case
from verify.oracle.contract import Contract, Tensors, TensorSpec
from verify.oracle.mappings import movement
from verify.oracle.terms import exclude, known_options, sizes, switches
from verify.placement import Partial, Replicate, Shard


def vocab_embedding(case: Case) -> Contract:
    """tokens [batch, sequence], 0 to vocabulary-1, Replicate; weight [vocabulary, hidden] Shard(0).

    y [batch, sequence, hidden] Replicate over tp (forward all-reduce, backward none); with scatter,
    y [sequence, batch, hidden] Shard(0) (forward reduce-scatter, backward all-gather). The upstream
    gradient is placed as y is. A row's gradient sums over every place that holds its token.

    Raises BadArgument for scatter without sequence parallelism.
    """
    sequence, batch, vocabulary, hidden = sizes(case, "sequence", "batch", "vocabulary", "hidden")
    known_options(case, "scatter")
    scatter = switches(case, {"scatter": False})["scatter"]
    if scatter and not case.layout.sequence_parallel:
        exclude(case, "scatter", True, why="it needs sequence parallelism")

    def reference(inputs: Tensors, parameters: Tensors) -> Tensors:
        y = F.embedding(inputs["tokens"], parameters["weight"])
        return {"y": y.transpose(0, 1) if scatter else y}

    shape = (sequence, batch, hidden) if scatter else (batch, sequence, hidden)
    place = Shard(0) if scatter else Replicate()
    placed = {"tp": place}
    elements, tp = sequence * batch * hidden, case.layout.tp
    return Contract(
        inputs={"tokens": TensorSpec((batch, sequence), grad_placements=None, high=vocabulary)},
        parameters={"weight": (vocabulary, hidden)},
        outputs={"y": TensorSpec(shape, placed, placed)},
        reference=reference,
        linear=True,
        divided={"vocabulary": vocabulary},
        forward=movement(Partial(), place, elements=elements, tp=tp),
        backward=movement(place, Replicate(), elements=elements, tp=tp),
        finish=(),
    )
