"""Explanations by the size of the error, and descriptions of where it is: the weak ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from verify.case import DTYPES
from verify.diagnose.evidence import Evidence
from verify.finding import Explanation

_SURE, _SIZED, _WHERE = 0.95, 0.8, 0.0
_LOWER = DTYPES[1:]
# A rounding error of a sum lies between a small part and some multiples of one unit roundoff.
_LEAST, _MOST = 1 / 32, 16
# The size of the errors of fewer elements tells nothing.
_ENOUGH = 8
# By how much it may have grown in what is computed of its result.
_GROWN = 4
# One in 2 ** so many tensors would be of a lower precision's values by chance.
_CHANCE = 10
# An element's error below this part of the largest is taken for rounding.
_ABOVE = 1e-3


def lower_precision(evidence: Evidence) -> Iterator[Explanation]:
    """The error is everywhere and of the size of a lower precision's rounding: sure where the
    values are of that dtype, else told of enough elements if what is wrong after it fits too."""
    expected = torch.cat([evidence.expected[rank].reshape(-1) for rank in evidence.wrong])
    found = torch.cat([evidence.candidate[rank].reshape(-1) for rank in evidence.wrong])
    apart = (found - expected).abs()
    errors = int((apart > apart.max() * _ABOVE).sum())
    if not evidence.dtype.is_floating_point:
        return
    own = torch.finfo(evidence.dtype).eps / 2
    fitting = []
    for name in _LOWER if errors > len(apart) / 2 else ():
        roundoff = _roundoff(name)
        if roundoff > own and _LEAST * roundoff <= evidence.relative <= _MOST * roundoff:
            fitting.append(name)
    for name in fitting:
        if _is_rounded(found, getattr(torch, name), own):
            yield Explanation(f"{evidence.name} was rounded to {name}: all its values are", _SURE)
    fitting = [n for n in fitting if evidence.later <= _GROWN * _MOST * _roundoff(n)]
    if fitting and errors >= _ENOUGH:
        names = " or ".join(fitting)
        yield Explanation(
            f"the error is of the size of {names} rounding: something under {evidence.name} is"
            f" computed, accumulated or sent in {names}",
            _SIZED,
        )


def _roundoff(name: str) -> float:
    """The unit roundoff of a dtype."""
    return torch.finfo(getattr(torch, name)).eps / 2


def _is_rounded(found: Tensor, dtype: torch.dtype, own: float) -> bool:
    """Whether all values are of a lower precision, and too many for that to be chance."""
    bits = math.log2(torch.finfo(dtype).eps / 2 / own) * len(found[found != 0].unique())
    return bits >= _CHANCE and torch.equal(found.to(dtype).double(), found)


def subset(evidence: Evidence) -> Iterator[Explanation]:
    """Where the error is, if it is not everywhere: on some ranks, or in some rows."""
    coordinates = evidence.ranks.coordinates
    for axis in evidence.groups:
        wrong = {coordinates[rank][axis] for rank in evidence.wrong}
        right = {coordinates[rank][axis] for rank in evidence.candidate} - wrong
        if right:
            which = ", ".join(f"{axis}={index}" for index in sorted(wrong))
            yield Explanation(f"only ranks with {which} are wrong", _WHERE)
    shape = evidence.expected[evidence.wrong[0]].shape
    for dim, length in enumerate(shape):
        rows = _wrong_along(evidence, dim)
        if 0 < len(rows) <= length // 2:
            first, last = rows[0], rows[-1]
            run = last - first + 1 == len(rows) and len(rows) > 1
            where = f"{first} to {last}" if run else ", ".join(map(str, rows[:8]))
            yield Explanation(
                f"only {where} of {length} along dimension {dim} of {evidence.name} are wrong",
                _WHERE,
            )


def _wrong_along(evidence: Evidence, dim: int) -> list[int]:
    """The indices along a dimension at which a wrong rank's error is, above rounding."""
    found: set[int] = set()
    for rank in evidence.wrong:
        difference = (evidence.candidate[rank] - evidence.expected[rank]).abs()
        others = [d for d in range(difference.dim()) if d != dim]
        along = difference.amax(others) if others else difference
        found |= set((along > float(difference.max()) * _ABOVE).nonzero().reshape(-1).tolist())
    return sorted(found)
