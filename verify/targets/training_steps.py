"""What adapters of `training_steps` have in common: the spare norm, and what is told of values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from verify.case import Case


def reads_spare(case: Case, step: int, round_: int) -> bool:
    """Whether the forward pass of a round of a step, both from 0, reads the spare norm."""
    read = {"first_round": round_ == 0, "odd_steps": step % 2 == 0}
    return read.get(str(case.options.get("spare")), False)


def new_values(looks: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Tensor]]:
    """`new NAME` of every parameter, a tensor for each step. `looks` are its values in the first
    forward pass of each step, which sees what the step before has left, and at the end. The spare
    norm may be on its way then, and is told of at the end only."""
    first = {name: -1 if name.startswith("spare") else 1 for name in looks[0]}
    return {f"new {name}": [each[name] for each in looks[i:]] for name, i in first.items()}
