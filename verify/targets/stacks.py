"""The parameters of a stage of a model as parts of the contract's stacks over the layers."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from verify.case import Case
from verify.oracle.gpt.model import Model
from verify.oracle.gpt.parameters import stacks_of
from verify.placement import Listed, Placements, Shard
from verify.targets.megatron_attributes import placements_of

# A parameter, or those of all experts that a rank has of a layer, which are one.
Member = Parameter | Sequence[Parameter]


class Stacks:
    """The parameters of this stage, `own`, as parts of the contract's stacks.

    They are named as the stacks, with the number of the layer in the model behind `layers.`; the
    embedding that the last stage has a copy of, or looks tokens up in, is `lookup.weight` there, or
    `output.weight`. `layers` are those of every stage, in the order in which it has them, `copied`
    says whether there is such a copy. Sharding is what the attributes of a parameter say, and that
    experts lie on a mesh of their own.
    """

    def __init__(
        self,
        case: Case,
        own: Mapping[str, Member],
        *,
        layers: Sequence[Sequence[int]],
        copied: bool,
    ) -> None:
        self.case, self.dtype = case, getattr(torch, case.dtype)
        self.layers, self.copied = layers, copied
        # What the schedule runs is its business: it may refuse it, later.
        of_any = dataclasses.replace(
            case,
            shape={**case.shape, "microbatches": case.layout.pp},
            options={name: each for name, each in case.options.items() if name != "pipeline"},
        )
        self.promised = stacks_of(Model.of(of_any))
        self.names = tuple(self.promised)
        self._members: dict[str, list[Member]] = {name: [] for name in self.names}
        for name, member in own.items():
            self._members[self._stack_of(name)].append(member)
        for name in filter(self.is_frozen, self.names):
            for parameter in itertools.chain.from_iterable(map(_parts, self._members[name])):
                parameter.requires_grad_(False)
        self.given = {name: self.empty(name) for name in self.names}

    def is_frozen(self, name: str) -> bool:
        """Whether the case trains nothing of a stack."""
        word = str(self.case.options.get("frozen") or "")
        return bool(word) and word in name

    def parameters(self) -> Mapping[str, tuple[Parameter, Placements]]:
        """This stage's part of every stack, `given`, into which the harness writes."""
        return {name: (each, self.placements(name)) for name, each in self.given.items()}

    def fill(self) -> None:
        """Write what was given into the parameters, but not into copies that are `shared`."""
        with torch.no_grad():
            for name, stack in self.given.items():
                for value, member in zip(stack, self._members[name], strict=True):
                    values = [value] if isinstance(member, Parameter) else value
                    for each, parameter in zip(values, _parts(member), strict=True):
                        if not getattr(parameter, "shared", False):
                            parameter.copy_(each)

    def values(self) -> dict[str, Tensor]:
        """`new NAME`: what every stack has now."""
        return {
            f"new {name}": self.stacked(name, Parameter.detach, dtype=self.dtype)
            for name in self.names
        }

    def gradients(
        self, value: Callable[[Parameter], Tensor], *, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """`gradient NAME` of every stack that is trained, of the gradient of each member."""
        return {
            f"gradient {name}": self.stacked(name, value, dtype=dtype)
            for name in self.names
            if not self.is_frozen(name)
        }

    def members(self, name: str) -> list[Parameter]:
        """What this stage has of a stack, in the order of the model; each is a parameter."""
        found = []
        for each in self._members[name]:
            assert isinstance(each, Parameter)
            found.append(each)
        return found

    def stacked(
        self, name: str, value: Callable[[Parameter], Tensor], *, dtype: torch.dtype
    ) -> Tensor:
        """A tensor of every member, stacked; of none an empty one of this dtype."""
        parts = [_joined(member, value) for member in self._members[name]]
        return torch.stack(parts) if parts else self.empty(name).detach().to(dtype)

    def empty(self, name: str) -> Parameter:
        """A part of a stack with values that are not numbers."""
        members = self._members[name]
        if members:
            shape: tuple[int, ...] = tuple(_joined(members[0], Parameter.detach).shape)
        else:
            shape = self._local(name)
        full = torch.full((len(members), *shape), math.nan, dtype=self.dtype)
        return Parameter(full, requires_grad=False)

    def placements(self, name: str) -> Placements:
        """Over pp by the layers that stages have; on the ranks of a stage by the attributes."""
        held = self._held(name)
        members = self._members[name]
        if not members:
            within = {a: p for a, p in self.promised[name].placements.items() if a != "pp"}
            return {"pp": Listed(0, held), **within}
        first, expert = members[0], ".experts." in name
        within = placements_of(_parts(first)[0], axis="etp" if expert else "tp")  # type: ignore[assignment]
        later: dict[str, Any] = {"pp": Listed(0, held)}
        later |= {"ep": Shard(1)} if expert else {}
        before = 1 if isinstance(first, Parameter) else 2
        for axis, placement in within.items():
            assert isinstance(placement, Shard)
            later[axis] = Shard(placement.dim + before, placement.stride)
        return later

    def _held(self, name: str) -> tuple[tuple[int, ...], ...]:
        promised, pp = self.promised[name], self.case.layout.pp
        if name.startswith("layers."):
            members = promised.members
            return tuple(
                tuple(members.index(each) for each in own if each in members) for own in self.layers
            )
        stages = {0} if name.startswith("embedding.") else {pp - 1}
        if name == "embedding.tokens.weight" and self.copied:
            stages |= {pp - 1}
        own = tuple(range(len(promised.members)))
        return tuple(own if stage in stages else () for stage in range(pp))

    def _stack_of(self, name: str) -> str:
        """The stack of a parameter by its name in the model."""
        if name == "lookup.weight" or (name == "output.weight" and name not in self.names):
            return "embedding.tokens.weight"
        return re.sub(r"^(layers|multi_token)\.\d+\.", r"\1.", name)

    def _local(self, name: str) -> tuple[int, ...]:
        """The shape of one member on this rank, of which it has none."""
        sizes = {**self.case.layout.sizes, **self.case.layout.expert_sizes}
        shape = [0, *self.promised[name].shape]
        for axis, placement in self.promised[name].placements.items():
            if isinstance(placement, Shard):
                shape[placement.dim] //= sizes[axis]
        return tuple(shape[1:])


def _parts(member: Member) -> Sequence[Parameter]:
    return [member] if isinstance(member, Parameter) else member


def _joined(member: Member, value: Callable[[Parameter], Tensor]) -> Tensor:
    """A tensor of a member; of several experts theirs, stacked."""
    if isinstance(member, Parameter):
        return value(member)
    return torch.stack([value(each) for each in member])
