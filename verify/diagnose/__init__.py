"""Likely causes of a wrong tensor, found by computing what each would have given.

An explanation is scored by the share of the error that it accounts for. Those that account for most
of it are reported, best first; of equal scores the more specific comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from verify.diagnose import order, precision, scale, shares
from verify.diagnose.evidence import Evidence
from verify.finding import LIKELY, Explanation

Explain = Callable[[Evidence], Iterable[Explanation]]

# The more specific first.
EXPLAINERS: tuple[Explain, ...] = (
    scale.not_written,
    shares.shares_of_ranks,
    scale.bias,
    scale.factor,
    order.one_chunk,
    shares.missing_sum,
    order.other_placement,
    order.ranks_exchanged,
    order.chunks_permuted,
    order.transposed,
    order.gathered_along_another_dim,
    order.shifted,
    shares.part_of_the_batch,
    precision.lower_precision,
)
MOST = 5


def diagnose(evidence: Evidence) -> tuple[Explanation, ...]:
    """Ranked explanations of one wrong tensor, the likeliest first, and then where the error is if
    it is not everywhere (score 0). Empty where nothing fits."""
    found = [explanation for explain in EXPLAINERS for explanation in explain(evidence)]
    likely = [each for each in found if each.score >= LIKELY]
    likely.sort(key=lambda each: -round(each.score, 2))
    where = precision.subset(evidence)
    return tuple({each.sentence: each for each in (*likely[:MOST], *where)}.values())


__all__ = ["EXPLAINERS", "Evidence", "diagnose"]
