"""Inputs of which one does not fit: another size in a dimension, a dimension more or fewer, or an
index of what is not there.

A case says which by its option `misfit`, as `k 0 longer`. The part that each rank is given is
altered, so that all ranks meet the like: a dimension that is cut over n ranks is altered n times.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from verify.case import Case
from verify.errors import BadArgument
from verify.lens import generate
from verify.oracle.contract import Contract, TensorSpec
from verify.placement import Cut, Listed
from verify.rank_program import contract_of
from verify.replica import RankMap

OPTION = "misfit"
SHAPES = ("longer", "shorter", "one", "without", "twice")
INDEX = "index"
HOW = (*SHAPES, INDEX)


@dataclass(frozen=True)
class Misfit:
    """What is altered of one input: the dimension of this number is one `longer` or `shorter`, or
    `one`; or it is `without` that dimension; or it is there `twice`, in a further dimension, the
    first. Or the last of its integers is this number, an `index` of what is not there."""

    tensor: str
    number: int
    how: str

    @staticmethod
    def of(case: Case) -> Misfit:
        """The misfit of a case. Raises BadArgument where it has none."""
        words = str(case.options.get(OPTION) or "").split()
        number = r"-?\d+" if words[2:] == [INDEX] else r"\d+"
        if len(words) != 3 or words[2] not in HOW or not re.fullmatch(number, words[1]):
            raise BadArgument(
                f"case.options.{OPTION}: {' '.join(words)!r} is none; give an input, a dimension or"
                f" an index, and one of {', '.join(HOW)}, as in 'k 0 longer'"
            )
        return Misfit(words[0], int(words[1]), words[2])

    def __str__(self) -> str:
        return f"{self.tensor} {self.number} {self.how}"

    def altered(self, x: Tensor, ways: int = 1) -> Tensor:
        """A part of the tensor, or all of it where the dimension is cut in so many ways."""
        if self.how == "twice":
            return torch.stack((x, x))
        if self.how == INDEX:
            found = x.clone(memory_format=torch.contiguous_format)
            found.view(-1)[-1] = self.number
            return found
        if self.how == "without":
            return x.select(self.number, 0)
        size = x.shape[self.number]
        wanted = {"longer": size + ways, "shorter": size - ways, "one": ways}[self.how]
        places = torch.arange(wanted, device=x.device).clamp(max=size - 1)
        return x.index_select(self.number, places)


def fitting(case: Case) -> Case:
    """The case without its misfit."""
    options = {name: value for name, value in case.options.items() if name != OPTION}
    return dataclasses.replace(case, options=options)


def misfits(case: Case, how: Collection[str] = HOW, tensors: Collection[str] = ()) -> list[Misfit]:
    """All of a kind, of these `tensors` if given, that make a valid case one that cannot be
    computed: on one device, whole tensors that are altered like it raise an error."""
    contract = contract_of(case)
    ranks = RankMap(case.layout, contract.axes)
    problem = generate(case, contract, ranks, "")
    # Of integers the shape is looked at: 0 is a class of whatever vocabulary.
    inputs = {
        name: torch.zeros_like(each.full) if contract.inputs[name].high else each.full
        for name, each in problem.inputs.items()
    }
    parameters = {name: each.full for name, each in problem.parameters.items()}

    def computes(each: Misfit) -> bool:
        spec = contract.inputs[each.tensor]
        ways = 1 if each.how == INDEX else _ways(spec, each.number, ranks)
        altered = {each.tensor: each.altered(inputs[each.tensor], ways)}
        try:
            contract.reference({**inputs, **altered}, parameters)
        except Exception:
            return False
        return True

    with torch.no_grad():
        # Nothing is dropped here, or masks that fit no longer would be what is refused.
        contract.reference(inputs, parameters)
        found = (*_shapes(contract, ranks), *_indices(case, contract))
        asked = [e for e in found if e.how in how and (not tensors or e.tensor in tensors)]
        return [each for each in asked if not computes(each)]


def _shapes(contract: Contract, ranks: RankMap) -> Iterator[Misfit]:
    """What may be altered of the shape of every input. There are never as many elements: they might
    be read as they were. Nor can a rank's part fit where the whole does not: no dimension is left
    out that is cut, or the last."""
    for name, spec in contract.inputs.items():
        if any(isinstance(placement, Listed) for placement in spec.placements.values()):
            continue
        yield Misfit(name, 0, "twice")
        for dim, size in enumerate(spec.shape):
            ways = _ways(spec, dim, ranks)
            own = size // ways
            yield Misfit(name, dim, "longer")
            if own > 2:
                yield Misfit(name, dim, "shorter")
            if own > 1:
                yield Misfit(name, dim, "one")
            if own > 1 and ways == 1 and dim < len(spec.shape) - 1:
                yield Misfit(name, dim, "without")


def _indices(case: Case, contract: Contract) -> Iterator[Misfit]:
    """What may be none of what is counted: below the first, or beyond the last."""
    given = [value for spec in contract.inputs.values() for value in spec.values or ()]
    for name, spec in contract.inputs.items():
        if spec.values is not None:
            yield from (Misfit(name, index, INDEX) for index in (-1, max(given) + 1))
        if spec.high is not None:
            beyond = {spec.high, spec.high + 1, max(case.shape.values())}
            yield from (
                Misfit(name, index, INDEX) for index in (-1, -spec.high - 1, *sorted(beyond))
            )


def _ways(spec: TensorSpec, dim: int, ranks: RankMap) -> int:
    """Over how many ranks a dimension is cut."""
    cut = ((axis, p) for axis, p in spec.placements.items() if isinstance(p, Cut))
    count = len(spec.shape)
    return prod(ranks.sizes[axis] for axis, p in cut if p.dim % count == dim)
