"""Explanations in which every element is off in the same way: a factor, a bias, nothing written."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from torch import Tensor

from verify.diagnose.evidence import Evidence
from verify.finding import Explanation


def not_written(evidence: Evidence) -> Iterator[Explanation]:
    """NaN where a buffer was read before it was filled; zeros where it never was."""
    wrong = [evidence.candidate[rank] for rank in evidence.wrong]
    bad = sum(int((~each.isfinite()).sum()) for each in wrong)
    if bad:
        count = sum(each.numel() for each in wrong)
        some = "every element" if bad == count else f"{bad} of {count} elements"
        yield Explanation(
            f"{some} of {evidence.name} is NaN or infinite: a buffer was used before it was"
            " written, or before the communication into it was waited for",
            1.0,
        )
    elif wrong and not any(bool(each.any()) for each in wrong):
        yield Explanation(f"{evidence.name} is all zero: it was never written", 1.0)


def factor(evidence: Evidence) -> Iterator[Explanation]:
    """A constant factor: the size of a group or its reciprocal, two, a half, or a flipped sign; of
    the whole, or of what a bias is added to."""
    for name, added in {"": None, **_biases(evidence)}.items():
        before = f" before {name} is added" * bool(name)
        for value, meaning in _factors(evidence).items():
            predicted = {}
            for rank in evidence.wrong:
                rest = 0.0 if added is None else evidence.cut(added, rank)
                predicted[rank] = (evidence.expected[rank] - rest) * value + rest
            yield evidence.explain(f"{evidence.name}{before} is {meaning}", predicted)


def _factors(evidence: Evidence) -> dict[float, str]:
    """Factors to try and what each would mean; of equal factors the first meaning stays."""
    found: dict[float, str] = {}
    sizes: dict[int, list[str]] = {}
    for name, size in _group_sizes(evidence).items():
        sizes.setdefault(size, []).append(name)
    for size, names in sizes.items():
        groups = " or ".join(names)
        large = f"{size} times too large, {size} being the size of {groups}: a sum over it is"
        small = f"{size} times too small, {size} being the size of {groups}: a division by it is"
        found.setdefault(float(size), f"{large} done twice, or a division by it is missing")
        found.setdefault(1.0 / size, f"{small} done once too often, or the sum over it is missing")
    found.setdefault(-1.0, "of the opposite sign")
    found.setdefault(2.0, "twice too large: it is added twice, or accumulated onto itself")
    found.setdefault(0.5, "half of what it should be")
    return found


def _group_sizes(evidence: Evidence) -> dict[str, int]:
    """Sizes above one: of each axis that the concept is split over, then of others and of pairs."""
    mesh = evidence.ranks.sizes
    own_first = sorted(mesh, key=lambda axis: axis not in evidence.ranks.axes)
    axes = {axis: mesh[axis] for axis in own_first if mesh[axis] > 1}
    pairs = {f"{one} x {other}": axes[one] * axes[other] for one, other in combinations(axes, 2)}
    return axes | pairs


def bias(evidence: Evidence) -> Iterator[Explanation]:
    """A bias that is added too often, not at all, or only in part."""
    for name, spread in _biases(evidence).items():
        added = {rank: evidence.cut(spread, rank) for rank in evidence.wrong}
        for extra, meaning in _extra_biases(evidence).items():
            predicted = {r: evidence.expected[r] + extra * added[r] for r in evidence.wrong}
            yield evidence.explain(f"{name} is {meaning}", predicted)


def _biases(evidence: Evidence) -> dict[str, Tensor]:
    """Parameters that could be added to every row of an output, spread out to its full shape."""
    if evidence.reference is None or evidence.name.startswith("grad "):
        return {}
    vectors = {n: given.full for n, given in evidence.reference.problem.parameters.items()}
    return {
        name: vector.double().expand(evidence.full.shape)
        for name, vector in vectors.items()
        if vector.dim() == 1 and vector.shape == evidence.full.shape[-1:] and vector.any()
    }


def _extra_biases(evidence: Evidence) -> dict[float, str]:
    found = {-1.0: "not added"}
    for axis, size in ((a, evidence.ranks.sizes[a]) for a in evidence.groups):
        group = evidence.group_text(axis)
        found.setdefault(
            size - 1.0,
            f"added {size} times: by every rank of {group}, before the sum over it",
        )
        found.setdefault(1.0 / size - 1.0, f"added only in part: divided by the size of {group}")
    found.setdefault(1.0, "added twice")
    return found
