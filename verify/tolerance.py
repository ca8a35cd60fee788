"""How far from the reference a candidate may be, measured tensor by tensor.

A local tensor is held against the same cut of the reference in two norms: the Frobenius norm of all
of it, and the norm of each row (the last dimension; single elements of a vector), so that a wrong
row cannot hide in a large tensor. In both, with u the unit roundoff of the result's dtype,

    allowed = multiple * max(u * scale, deviation)

`scale` is the norm of the reference there, and at least what a tensor of the full reference's root
mean square would have, because a row whose terms cancel keeps the rounding errors of its terms; and
what the contract says that these are at least, where all rows may cancel at once.

`deviation` is what the reference itself does in the case's dtype: the largest distance from
float64, in the same norm of the same part, of the plain run and of disturbed runs, in which the
operands of all arithmetic were moved by one unit roundoff of theirs (`verify.disturbance`). A few
runs measure it; a candidate is rejected only by many, so that no lucky run decides. It also
measures what `scale` cannot know: a difference of large numbers, such as log-sum-exp minus logit,
is as uncertain as they are, and so is a gradient through a softmax that is nearly one. For float64,
of which there is no truth to measure from, it is measured in float32 and scaled by the ratio of the
unit roundoffs; and `SMALLEST`, the smallest normal number, is always allowed, because below it
float64 loses digits, which runs in float32 cannot show. `docs/tolerances.md` derives all this and
shows it.

A factor on all of a tensor moves every row by less than its bound allows, and rounding errors do
not: over many rows they cancel. Where the `native` reference has the weight of `MANY_ROWS` rows or
more, its factor, the projection of the difference on the reference, may be at most
`multiple * deviation` of the same projection, or `COHERENT` unit roundoffs: what a few factors that
are rounded once each (a scale, the inverse of a count) do to everything.

The multiples. `fp64` is for algebra, not for rounding: 1e3 unit roundoffs are 1e-13 of a tensor's
scale, below any wrong term and above any order of summation at the sizes that are drawn. `native`:
a sum over n ranks rounds n partial sums and n - 1 additions where the reference rounds once; these
are independent, so the error grows as sqrt(2 n); 8, of 32 ranks, for all that have no more.
`exact` allows nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from verify.errors import HarnessError
from verify.lens import dtype_of
from verify.reference import Reference, Results

Cut = Callable[[Tensor], Tensor]

MULTIPLES = {"fp64": 1e3, "native": 8.0}
SMALLEST = torch.finfo(torch.float64).tiny
# Disturbed runs behind a bound: few first, because most candidates are nearer than that.
EFFORTS = (0, 1, 4, 32)
# So many times its bound no further run would raise a bound that several runs have measured, unless
# results are abrupt. None has measured zero, whatever is allowed there: what is cut off (by a
# squared relu) is a little above it in one of many.
HOPELESS = 100.0
MANY_ROWS = 32
COHERENT = 3.0


@dataclass(frozen=True)
class Excess:
    """A local tensor that is too far from the reference. `index` is its worst element; `error` and
    `bound` are in the norm that `norm` names: of the `element`, its `row` or the `tensor`, or as a
    `factor` on all of the tensor."""

    index: tuple[int, ...]
    reference: float
    candidate: float
    error: float
    bound: float
    norm: str


@dataclass
class Tolerance:
    """Judges local tensors of one replica. `slack` multiplies every bound: 2 for a candidate that
    is compared with another candidate, because each may be off by one."""

    reference: Reference
    slack: float = 1.0
    _distances: dict[str, list[Tensor]] = field(default_factory=dict)
    _runs: list[Results] = field(default_factory=list)
    _rms: dict[str, float] = field(default_factory=dict)

    def excess(self, name: str, candidate: Tensor, expected: Tensor, cut: Cut) -> Excess | None:
        """None where `candidate` is as near to `expected` as result `name` allows.

        Both are float64 and of one shape; `cut` takes the full tensor to their part of it.
        """
        difference = candidate - expected
        if not candidate.numel():
            return None
        if not candidate.isfinite().all():
            return _at(
                _first_not_finite(candidate), candidate, expected, difference, 0.0, "element"
            )
        lens = self.reference.case.lens
        if lens == "exact":
            return self._inexact(candidate, expected, difference)
        found = None
        for runs in EFFORTS:
            deviations = [_rows(cut(each)) for each in self._deviations(name, runs)]
            found = self._beyond(name, candidate, expected, difference, deviations)
            found = found or self._scaled(candidate, expected, difference, deviations)
            if found is None or (runs >= EFFORTS[-2] and self._hopeless(found)):
                return found
        return found

    def _hopeless(self, found: Excess) -> bool:
        abrupt = self.reference.contract.abrupt and self.reference.case.lens == "native"
        return not abrupt and found.bound > SMALLEST and HOPELESS * found.bound < found.error

    def overflows(self, name: str) -> bool:
        """Whether the reference of result `name`, computed in the case's dtype, is not finite:
        nothing can be said of a candidate then that is finite, or is not."""
        return not bool(self.reference.native[name].isfinite().all())

    @staticmethod
    def _inexact(candidate: Tensor, expected: Tensor, difference: Tensor) -> Excess | None:
        if torch.equal(candidate, expected):
            return None
        worst = _largest(difference)
        return _at(worst, candidate, expected, difference, 0.0, "element")

    def _beyond(
        self,
        name: str,
        candidate: Tensor,
        expected: Tensor,
        difference: Tensor,
        deviations: list[Tensor],
    ) -> Excess | None:
        """The worst row that is too far off, or else the whole tensor if that is."""
        wrong = _rows(difference)
        width, error = wrong.shape[1], _norms(wrong)
        bound, of_all = self._allowed(name, expected, deviations)
        if bool((error > bound).any()):
            row = int(torch.argmax(error - bound))
            index = _unravel(row * width + int(wrong[row].abs().argmax()), candidate.shape)
            norm, off, allowed = ("row" if width > 1 else "element"), error[row], bound[row]
        else:
            index, norm, off, allowed = _largest(difference), "tensor", error.norm(), of_all
            if not bool(off > allowed):
                return None
        return _at(index, candidate, expected, difference, float(allowed), norm, float(off))

    def bounds(
        self, name: str, expected: Tensor, cut: Cut, *, disturbed: int = EFFORTS[-1]
    ) -> tuple[Tensor, float]:
        """How far each row of a local tensor may be off, and all of it, by so many disturbed runs;
        `expected` and `cut` as of `excess`."""
        deviations = [_rows(cut(each)) for each in self._deviations(name, disturbed)]
        rows, of_all = self._allowed(name, expected, deviations)
        return rows, float(of_all)

    def _allowed(
        self, name: str, expected: Tensor, deviations: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        dtype = self.reference.dtypes[name]
        roundoff = torch.finfo(dtype if dtype.is_floating_point else torch.float64).eps / 2
        multiple = self.slack * self._multiple
        right = _rows(expected)
        least = max(self._rms_of(name) * right.shape[1] ** 0.5, self._terms_of(name))
        scale = _norms(right).clamp_min(least)
        deviated = torch.stack([torch.zeros_like(scale), *(_norms(each) for each in deviations)])
        rows = multiple * torch.maximum(roundoff * scale, deviated.amax(0))
        of_all = multiple * torch.maximum(roundoff * scale.norm(), _norms(deviated).amax())
        floor = SMALLEST if self.reference.case.lens == "fp64" else 0.0
        return rows.clamp_min(floor), of_all.clamp_min(floor)

    def _scaled(
        self, candidate: Tensor, expected: Tensor, difference: Tensor, deviations: list[Tensor]
    ) -> Excess | None:
        """A factor on all of a tensor of many rows."""
        right = _rows(expected)
        if self.reference.case.lens != "native" or _weight(right) < MANY_ROWS:
            return None
        roundoff = torch.finfo(dtype_of(self.reference.case)).eps / 2
        factor = abs(_projection(_rows(difference), right))
        measured = max((abs(_projection(each, right)) for each in deviations), default=0.0)
        allowed = self.slack * max(COHERENT * roundoff, self._multiple * measured)
        if factor <= allowed:
            return None
        index = _largest(difference)
        return _at(index, candidate, expected, difference, allowed, "factor", factor)

    @property
    def _multiple(self) -> float:
        case = self.reference.case
        if case.lens != "native":
            return MULTIPLES[case.lens]
        return max(MULTIPLES["native"], (2 * case.layout.world_size) ** 0.5)

    def _rms_of(self, name: str) -> float:
        if name not in self._rms:
            full = self.reference.results[name]
            self._rms[name] = float(full.double().norm()) / max(full.numel(), 1) ** 0.5
        return self._rms[name]

    def _terms_of(self, name: str) -> float:
        contract = self.reference.contract
        results = {f"grad {each}": spec for each, spec in contract.inputs.items()}
        results |= contract.outputs
        if name in results:
            return results[name].terms
        return contract.terms.get(name.removeprefix("grad "), 0.0)

    def _deviations(self, name: str, disturbed: int) -> list[Tensor]:
        """The distances from float64 of the reference at the case's precision: of the plain run and
        of so many disturbed ones; none at all for float64 without effort."""
        dtype = dtype_of(self.reference.case)
        count, lower, shrink = disturbed + 1, dtype, 1.0
        if dtype is torch.float64:
            count, lower = (count if disturbed else 0), torch.float32
            shrink = torch.finfo(dtype).eps / torch.finfo(lower).eps
        found = self._distances.setdefault(name, [])
        while len(found) < count:
            if len(self._runs) == len(found):
                self._runs.append(self._run(lower, len(found)))
            found.append((self._runs[len(found)][name] - self.reference.results[name]) * shrink)
            if not found[-1].isfinite().all():
                raise HarnessError(
                    f"reference: {name} of {self.reference.case} overflows in {lower}; it cannot be"
                    " calibrated"
                )
        return found[:count]

    def _run(self, dtype: torch.dtype, draw: int) -> Results:
        own = draw == 0 and dtype is dtype_of(self.reference.case)
        return self.reference.native if own else self.reference.rounded(dtype, draw)


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1)


def _projection(rows: Tensor, onto: Tensor) -> float:
    """How much of one tensor is in another, as a factor of that."""
    return float((rows * onto).sum() / onto.square().sum())


def _weight(rows: Tensor) -> float:
    """How many rows of equal norm a tensor is worth; 0 of zeros."""
    squares = rows.square().sum(1)
    return float(squares.sum() ** 2 / squares.square().sum().clamp_min(1e-300))


def _rows(tensor: Tensor) -> Tensor:
    """A matrix of the rows that are judged one by one."""
    return tensor.reshape(-1, 1) if tensor.dim() < 2 else tensor.reshape(-1, tensor.shape[-1])


def _largest(difference: Tensor) -> tuple[int, ...]:
    return _unravel(int(difference.abs().argmax()), difference.shape)


def _first_not_finite(candidate: Tensor) -> tuple[int, ...]:
    return _unravel(int((~candidate.isfinite()).reshape(-1).int().argmax()), candidate.shape)


def _unravel(flat: int, shape: torch.Size) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        flat, i = divmod(flat, size)
        index.append(i)
    return tuple(reversed(index))


def _at(
    index: tuple[int, ...],
    candidate: Tensor,
    expected: Tensor,
    difference: Tensor,
    bound: float,
    norm: str,
    error: float | None = None,
) -> Excess:
    off = float(difference[index].abs()) if error is None else error
    return Excess(index, float(expected[index]), float(candidate[index]), off, bound, norm)
