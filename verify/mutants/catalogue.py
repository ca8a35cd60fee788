"""Every mutant, by the name of its target and by its own."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from verify.errors import BadArgument, HarnessError
from verify.mutants import (
    attention,
    checkpoint,
    context,
    context_algorithms,
    context_dropout,
    context_scores,
    data,
    data_parallel,
    embedding,
    experts,
    gradients,
    groups,
    latent_attention,
    linear,
    linear_cross_entropy,
    loss,
    mapping,
    mlp,
    model,
    multi_token,
    norm,
    optimizer,
    pipeline,
    positions,
    random,
    recompute,
    routing,
    transformer,
)
from verify.mutants.generated import PREFIX, Generated, find_generated
from verify.mutants.history import PREFIX as HISTORY
from verify.mutants.history import Historic, find_historic
from verify.mutants.mutant import Mutant


def _by_name(*families: tuple[Mutant, ...]) -> dict[str, Mutant]:
    found: dict[str, Mutant] = {}
    for mutant in (each for family in families for each in family):
        if mutant.name in found:
            raise HarnessError(f"mutants: two are called {mutant.name}")
        found[mutant.name] = mutant
    return found


CATALOGUE: Mapping[str, Mapping[str, Mutant]] = {
    "impl": _by_name(
        groups.MUTANTS,
        mapping.MUTANTS,
        linear.MUTANTS,
        mlp.MUTANTS,
        norm.MUTANTS,
        positions.MUTANTS,
        pipeline.MUTANTS,
        transformer.MUTANTS,
        model.MUTANTS,
        multi_token.MUTANTS,
        embedding.MUTANTS,
        loss.MUTANTS,
        linear_cross_entropy.MUTANTS,
        gradients.MUTANTS,
        data.MUTANTS,
        data_parallel.MUTANTS,
        optimizer.MUTANTS,
        checkpoint.MUTANTS,
        routing.MUTANTS,
        experts.MUTANTS,
        random.MUTANTS,
        recompute.MUTANTS,
        attention.MUTANTS,
        context.MUTANTS,
        context_algorithms.MUTANTS,
        context_dropout.MUTANTS,
        context_scores.MUTANTS,
        latent_attention.MUTANTS,
    )
}


AnyMutant = Mutant | Generated | Historic
"""Written by hand, generated from the source, or from what is communicated."""


def find(target: str, name: str) -> AnyMutant:
    """The mutant of a target, also one generated from its source or its history. Raises
    BadArgument, in one line, with names that come close."""
    known = CATALOGUE.get(target, {})
    if not known:
        raise BadArgument(
            f"target: {target!r} has no mutants; targets that have are {', '.join(CATALOGUE)}"
        )
    if name.startswith(PREFIX):
        return find_generated(target, name.removeprefix(PREFIX))
    if name.startswith(HISTORY):
        return find_historic(target, name.removeprefix(HISTORY))
    if name in known:
        return known[name]
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    nothing = f"none of its {len(known)} comes close; see verify/mutants"
    hint = f"did you mean {', '.join(close)}?" if close else nothing
    raise BadArgument(f"target: {target} has no mutant {name!r}; {hint}")
