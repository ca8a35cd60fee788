"""Generated tensors: the same full tensors on every rank, whatever the layout, and a rank's part.

A tensor is a function of `(case.seed, its name, its replica)` and of the lens. Only integers are
drawn, and scaled by powers of two, so that the values do not depend on a platform's mathematics.
Names are those of the contract; the upstream gradient of an output `y` is `grad y`.

| lens | values |
|---|---|
| `exact` | integers from 1 to 9 and their negatives |
| `fp64` | multiples of 2**-23, near normal with standard deviation 1.15 |
| `native` | the same, rounded to the case's dtype |

Option `magnitude`, a power of two, multiplies all inputs but integers. Option `zeros` names tensors
that are zero, and `strides` says how local tensors lie in memory.

Weights are divided by about the root of their last dimension. A `Partial` tensor is defined as the
sum of its ranks' parts; the parts are integers below 2**p / n of one unit, p the dtype's precision
and n the number of parts, so that every sum of them is exact in any order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import frexp, log2, prod

import torch
from torch import Tensor

from verify.case import Case
from verify.errors import BadArgument, HarnessError
from verify.oracle.contract import IGNORED, Contract, TensorSpec
from verify.placement import Cut, Partial, Placements, pieces, shard
from verify.replica import RankMap

STRIDES = ("contiguous", "transposed")
_LARGEST_INTEGER = 9
# Where tensors are drawn, whatever the ranks' default device is: the same everywhere.
_HERE = "cpu"
_GRID = 2.0**-23
_MOST_PRECISION = 24
# In the `sim` cluster all ranks and the reference ask for the same.
_SETTLED: dict[tuple[str, str], dict[str, Generated]] = {}
_SETTLED_KEPT = 8


@dataclass(frozen=True)
class Generated:
    """A full tensor, float64 or int64, and its summands [n, *shape] where it is `Partial`."""

    full: Tensor
    parts: Tensor | None = None

    @property
    def magnitude(self) -> Tensor:
        """The sum of the absolute values of all summands."""
        return self.full.abs() if self.parts is None else self.parts.abs().sum(0)


@dataclass(frozen=True)
class Problem:
    """Everything that is given to one replica. `upstream` holds the outputs' gradients by
    output."""

    inputs: Mapping[str, Generated]
    parameters: Mapping[str, Generated]
    upstream: Mapping[str, Generated]

    def with_masks(self, masks: Mapping[str, Tensor]) -> Problem:
        """The same with dropout masks (bool) among the inputs."""
        given = {name: Generated(mask) for name, mask in masks.items()}
        return Problem({**self.inputs, **given}, self.parameters, self.upstream)

    def whole(self) -> Problem:
        """The same without summands, for a single rank."""
        groups = (self.inputs, self.parameters, self.upstream)
        return Problem(*({n: Generated(g.full) for n, g in given.items()} for given in groups))


def dtype_of(case: Case) -> torch.dtype:
    """The dtype in which the candidate computes."""
    return getattr(torch, case.dtype)


def generate(case: Case, contract: Contract, ranks: RankMap, replica: str) -> Problem:
    """What a replica is given. Raises BadArgument for a lens, dtype or option that does not fit.

    The tensors are shared by all that ask: do not write to them.
    """
    _check(case, contract)
    source = _Source(case, replica, frozenset(_zeros(case, contract)))
    inputs = {name: source.input(name, spec, ranks) for name, spec in contract.inputs.items()}
    parameters = {name: source.weight(name, shape) for name, shape in contract.parameters.items()}
    upstream = {
        name: source.tensor(f"grad {name}", spec, spec.grad_placements, ranks)
        for name, spec in contract.outputs.items()
        if spec.grad_placements is not None
    }
    if contract.settle is not None:
        inputs = _settled(contract, case, replica, inputs, parameters)
    return Problem(inputs, parameters, upstream)


def _settled(
    contract: Contract,
    case: Case,
    replica: str,
    inputs: Mapping[str, Generated],
    parameters: Mapping[str, Generated],
) -> dict[str, Generated]:
    """The inputs of which no decision is near a tie. Raises HarnessError if they are no longer
    numbers of the case's dtype."""
    key = (json.dumps(case.to_json(), sort_keys=True), replica)
    if key not in _SETTLED:
        assert contract.settle is not None
        drawn = ({n: g.full for n, g in given.items()} for given in (inputs, parameters))
        found = {name: Generated(full) for name, full in contract.settle(*drawn).items()}
        for name, each in found.items():
            rounded = each.full.to(dtype_of(case)).to(each.full.dtype)
            if each.full.is_floating_point() and not torch.equal(rounded, each.full):
                raise HarnessError(f"lens: {name} of {case} was settled to what is no {case.dtype}")
        while len(_SETTLED) >= _SETTLED_KEPT:
            _SETTLED.pop(next(iter(_SETTLED)))
        _SETTLED[key] = found
    return _SETTLED[key]


def local(
    given: Generated, placements: Placements, ranks: RankMap, rank: int, case: Case
) -> Tensor:
    """A rank's own copy of its part, in the case's dtype and strides."""
    index = ranks.part(placements, rank)
    full = given.full if given.parts is None else given.parts[index]
    part = shard(full, placements, ranks.sizes, ranks.coordinates[rank])
    if not part.is_floating_point():
        return part.clone()
    part = part.to(dtype_of(case), copy=True, memory_format=torch.contiguous_format)
    return part if case.options.get("strides", STRIDES[0]) == STRIDES[0] else not_contiguous(part)


def not_contiguous(tensor: Tensor) -> Tensor:
    """The same values with the first and the last dimension exchanged in memory; every second
    element of a buffer where that changes nothing. A single element has no strides to change."""
    if tensor.dim() > 1:
        moved = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if not moved.is_contiguous():
            return moved
    buffer = tensor.new_empty((*tensor.shape, 2))
    buffer[..., 0] = tensor
    return buffer[..., 0]


def check_fits(case: Case, contract: Contract, ranks: RankMap) -> None:
    """Raise BadArgument where a tensor of the contract cannot be cut as it is placed."""
    for name, spec in (*contract.inputs.items(), *contract.outputs.items()):
        for placements in (spec.placements, spec.grad_placements or {}):
            _check_cut(name, spec.shape, placements, ranks, case)
    for name, size in contract.divided.items():
        axes = contract.over.get(name, contract.axes)
        ways = prod(ranks.sizes[axis] for axis in axes)
        if size % ways:
            raise BadArgument(
                f"case.shape.{name}: {size} of {case} does not divide by {ways}"
                f" over {', '.join(axes)}"
            )


def _check_cut(
    name: str, shape: tuple[int, ...], placements: Placements, ranks: RankMap, case: Case
) -> None:
    lengths = list(shape)
    for axis, placement in placements.items():
        if axis not in ranks.sizes:
            raise BadArgument(f"case: {name} of {case.concept} is placed over {axis!r}, no axis")
        if not isinstance(placement, Cut):
            continue
        try:
            cut = pieces(lengths[placement.dim], placement, ranks.sizes[axis])[0]
        except ValueError as error:
            raise BadArgument(f"case: {name} of {case}: {error} over {axis}") from error
        lengths[placement.dim] = sum(piece.stop - piece.start for piece in cut)


def _check(case: Case, contract: Contract) -> None:
    if case.lens != "native" and case.dtype != "float64":
        raise BadArgument(
            f"case.dtype: the lens {case.lens} computes in float64, not in {case.dtype};"
            " take the lens native"
        )
    if case.lens == "exact" and not contract.linear:
        raise BadArgument(
            f"case.lens: exact does not apply to {case.concept}, which is not linear; allowed are"
            " fp64 and native"
        )
    if "misfit" in case.options:
        raise BadArgument(f"case.options.misfit: {case} is for the check misfit only")
    strides = case.options.get("strides", STRIDES[0])
    if strides not in STRIDES:
        raise BadArgument(f"case.options.strides: {strides!r} is not one of {', '.join(STRIDES)}")
    magnitude = case.options.get("magnitude", 1)
    if not isinstance(magnitude, int | float) or magnitude <= 0 or frexp(magnitude)[0] != 0.5:
        raise BadArgument(f"case.options.magnitude: {magnitude!r} is not a power of two like 1024")


def _zeros(case: Case, contract: Contract) -> list[str]:
    """The names of option `zeros`: inputs, parameters, or `grad y` for an upstream gradient."""
    given = str(case.options.get("zeros") or "")
    names = [name.strip() for name in given.split(",") if name.strip()]
    allowed = [*contract.inputs, *contract.parameters, *(f"grad {y}" for y in contract.outputs)]
    if foreign := sorted(set(names) - set(allowed)):
        raise BadArgument(
            f"case.options.zeros: {', '.join(foreign)}: not one of {', '.join(allowed)}"
        )
    return names


@dataclass(frozen=True)
class _Source:
    """Draws the tensors of one replica of a case."""

    case: Case
    replica: str
    zeros: frozenset[str]

    def input(self, name: str, spec: TensorSpec, ranks: RankMap) -> Generated:
        drawn = self.tensor(name, spec, spec.placements, ranks)
        magnitude = float(self.case.options.get("magnitude") or 1)
        if not drawn.full.is_floating_point() or magnitude == 1:
            return drawn
        parts = None if drawn.parts is None else drawn.parts * magnitude
        return Generated(drawn.full * magnitude, parts)

    def tensor(
        self, name: str, spec: TensorSpec, placements: Placements | None, ranks: RankMap
    ) -> Generated:
        if spec.values is not None:
            return Generated(torch.tensor(spec.values, device=_HERE).view(spec.shape))
        if spec.high is not None:
            return Generated(self._integers(name, spec.shape, spec.high))
        partial = any(isinstance(p, Partial) for p in (placements or {}).values())
        if not partial:
            return Generated(self._values(name, spec.shape))
        parts = self._parts(name, spec.shape, ranks.parts(placements or {}))
        return Generated(parts.sum(0), parts)

    def weight(self, name: str, shape: tuple[int, ...]) -> Generated:
        values = self._values(name, shape)
        if self.case.lens != "exact" and len(shape) > 1:
            values = values * 2.0 ** -round(log2(max(shape[-1], 1)) / 2)
        return Generated(values)

    def _values(self, name: str, shape: Iterable[int]) -> Tensor:
        """Full values of a tensor that nobody sums."""
        kind = "zeros" if name in self.zeros else self.case.lens
        key = (self.case.seed, name, self.replica)
        return _draw(key, kind, self.case.dtype, tuple(shape))

    def _parts(self, name: str, shape: tuple[int, ...], count: int) -> Tensor:
        if name in self.zeros or self.case.lens == "exact":
            return self._values(name, (count, *shape))
        precision = min(_MOST_PRECISION, 1 - round(log2(torch.finfo(dtype_of(self.case)).eps)))
        limit = max(2**precision // count, 1)
        drawn = _integers((self.case.seed, name, self.replica), -limit, limit + 1, (count, *shape))
        return drawn.double() * 2.0 ** -int(log2(limit))

    def _integers(self, name: str, shape: tuple[int, ...], high: int) -> Tensor:
        if name in self.zeros:
            return torch.zeros(shape, dtype=torch.int64, device=_HERE)
        drawn = _integers((self.case.seed, name, self.replica), 0, high, shape)
        if not self.case.options.get("ignored", False) or name != "targets":
            return drawn
        key = (self.case.seed, f"ignored {name}", self.replica)
        # Of eight draws, one ignores nothing and one ignores everything.
        mode = int(_integers(key, 0, 8, (1,)))
        chance = _integers(key, 1, 3, shape)
        ignored = {0: chance < 0, 1: chance > 0}.get(mode, chance == 1)
        return drawn.masked_fill(ignored, IGNORED)


@lru_cache(maxsize=128)
def _draw(key: tuple[int, str, str], kind: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Cached because in the `sim` cluster all ranks and the reference ask for the same tensors."""
    if kind == "zeros":
        return torch.zeros(shape, dtype=torch.float64, device=_HERE)
    if kind == "exact":
        drawn = _integers(key, -_LARGEST_INTEGER, _LARGEST_INTEGER, shape)
        return (drawn + (drawn >= 0)).double()
    # The sum of four uniform numbers is near enough to normal, and exact.
    values = _integers(key, -(2**23), 2**23, (4, *shape)).sum(0).double() * _GRID
    return values.to(getattr(torch, dtype)).double() if kind == "native" else values


def _integers(key: tuple[int, str, str], low: int, high: int, shape: tuple[int, ...]) -> Tensor:
    text = "/".join(map(str, key))
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
    generator = torch.Generator(_HERE).manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator, device=_HERE)
