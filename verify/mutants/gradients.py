"""Mutants of what is done to gradients after backward."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_mutant = partial(
    Mutant, family="gradients", module="impl.gradients", caught_by=("row_linear", "tp_mlp")
)

_TOTAL = "total = all_reduce(flat, group=group)"

MUTANTS = (
    _mutant(
        name="gradients-not-summed",
        wrong="Gradients under sequence parallelism stay those of this rank's tokens.",
        snippet=_TOTAL,
        replacement="total = flat",
    ),
    _mutant(
        name="gradients-averaged",
        wrong="Gradients under sequence parallelism are averaged over tp.",
        snippet=_TOTAL,
        replacement="total = all_reduce(flat, group=group) / group.size()",
        seen="NORM-03",
    ),
    _mutant(
        name="gradients-all-replicated-summed",
        wrong="The gradients of all replicated parameters are summed, complete or not.",
        snippet='getattr(parameter, "sequence_parallel", False)',
        replacement='not getattr(parameter, "tensor_model_parallel", False)',
    ),
    _mutant(
        name="gradients-written-to-a-copy",
        wrong="What comes back is not written to the gradients, but to a copy of them.",
        snippet="gradient.copy_(part.view_as(gradient))",
        replacement="gradient.clone().copy_(part.view_as(gradient))",
        seen="LS-11",
    ),
)
