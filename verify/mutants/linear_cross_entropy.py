"""Mutants of the output linear with its cross entropy, and of the z-loss."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_mutant = partial(
    Mutant,
    family="linear_cross_entropy",
    module="impl.linear_cross_entropy",
    caught_by=("linear_cross_entropy",),
)
_z = partial(
    Mutant,
    family="linear_cross_entropy",
    module="impl.cross_entropy",
    caught_by=("linear_cross_entropy", "vocab_cross_entropy"),
)

_SUM = "of_hidden = all_reduce(of_hidden, group=group)"
_OF_WEIGHT = "of_weight += slope.flatten(0, -2).t() @ full[rows].flatten(0, -2)"

_ARGUMENTS = "                targets[rows],\n                gradient[rows],"

MUTANTS = (
    _mutant(
        name="chunked-loss-hidden-not-summed",
        wrong="The gradient of hidden states is of this rank's classes only.",
        snippet=_SUM,
        replacement="of_hidden = of_hidden.clone()",
        seen="CE-06",
    ),
    _mutant(
        name="chunked-loss-hidden-summed-if-whole",
        wrong="The gradient of hidden states is summed where there is one chunk only.",
        snippet=_SUM,
        replacement=(
            "if ctx.chunk >= full.shape[0]:\n"
            "                of_hidden = all_reduce(of_hidden, group=group)"
        ),
        seen="CE-06",
    ),
    _mutant(
        name="chunked-loss-own-rows",
        wrong="Under sequence parallelism a rank keeps its rows of its own classes' gradient.",
        snippet="of_hidden = reduce_scatter(of_hidden, dim=0, group=group)",
        replacement="of_hidden = of_hidden.chunk(group.size())[group.rank()]",
        seen="CE-06",
    ),
    _mutant(
        name="chunked-loss-last-chunk",
        wrong="The gradient of the weight is that of the last chunk.",
        snippet=_OF_WEIGHT,
        replacement="of_weight = slope.flatten(0, -2).t() @ full[rows].flatten(0, -2)",
    ),
    _mutant(
        name="chunked-loss-rest-left-out",
        wrong="Rows that do not fill a chunk are left out of backward.",
        snippet="for rows in _chunks(full, ctx.chunk):\n",
        replacement=(
            "of_hidden.zero_()\n"
            "        whole = full[: max(full.shape[0] // ctx.chunk, 1) * ctx.chunk]\n"
            "        for rows in _chunks(whole, ctx.chunk):\n"
        ),
    ),
    _mutant(
        name="chunked-loss-first-targets",
        wrong="Backward takes the targets of the first chunk for every one.",
        snippet=_ARGUMENTS,
        replacement=_ARGUMENTS.replace("targets[rows]", "targets[: full[rows].shape[0]]"),
    ),
    _mutant(
        name="chunked-loss-first-upstream",
        wrong="Every token of a chunk has the upstream gradient of its first one.",
        snippet="                gradient[rows],",
        replacement="                gradient[rows][:1].expand_as(gradient[rows]),",
        seen="CE-05",
    ),
    _mutant(
        name="chunked-loss-whole",
        wrong="The chunk is accepted, and all logits are made at once.",
        snippet="for start in range(0, full.shape[0], chunk):",
        replacement="chunk = full.shape[0]\n    for start in range(0, full.shape[0], chunk):",
    ),
    _mutant(
        name="chunked-loss-mask-forgotten",
        wrong="The mask of the loss is not applied.",
        snippet="return loss if loss_mask is None else loss * loss_mask",
        replacement="return loss",
    ),
    _z(
        name="z-loss-without-gradient",
        wrong="The z-loss is in the loss, and not in its gradient.",
        snippet="slope *= (1.0 + 2.0 * classes.z_loss",
        replacement="slope *= (1.0 + 0.0 * classes.z_loss",
    ),
    _z(
        name="z-loss-of-shifted-logits",
        wrong="The z-loss is of logits from which the maximum is taken off.",
        snippet="loss += classes.z_loss * (maximum + total.log()).square()",
        replacement="loss += classes.z_loss * total.log().square()",
    ),
    _z(
        name="z-loss-not-squared",
        wrong="The z-loss is the absolute value, not the square.",
        snippet="loss += classes.z_loss * (maximum + total.log()).square()",
        replacement="loss += classes.z_loss * (maximum + total.log()).abs()",
    ),
    _z(
        name="z-loss-negative",
        wrong="A z-loss with a negative weight is accepted.",
        snippet="if z_loss < 0.0:",
        replacement="if z_loss < -1.0:",
    ),
)
