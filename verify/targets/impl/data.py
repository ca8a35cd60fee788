"""impl's batches as subjects: what a rank has of the samples of a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import lcm
from operator import eq

import numpy as np
import torch

from impl.data.batches import Batches
from impl.data.sampler import Sampler, Samples
from impl.groups import Groups
from verify.case import Case
from verify.targets.impl.context import placement_of
from verify.targets.impl.subject import Builder, OperationSubject, Tensors

OPTIONS: Mapping[str, tuple[str, ...]] = {"batches": ("placement", "consumed")}


@dataclass(frozen=True, kw_only=True)
class _Given(Sampler):
    """An order that is given instead of drawn."""

    order: tuple[int, ...]

    def at(self, position: int) -> int:
        """The sample at a position."""
        return self.order[position]


def batches(case: Case, groups: Groups) -> OperationSubject:
    """`Batches` of a text and an order of its samples."""

    def call(inputs: Tensors) -> Tensors:
        samples = Samples(inputs["text"].cpu().numpy(), case.shape["sequence"])
        order = tuple(inputs["order"].tolist())
        sampler = _Given(count=samples.count, seed=case.seed, order=order)
        found = _batches(case, groups, samples, sampler).after(
            int(case.options.get("consumed") or 0)
        )
        names = ("tokens", "targets", "mask")
        return {
            name: torch.stack([getattr(each, name) for each in found]).double() for name in names
        }

    return OperationSubject(call)


def sample_order(case: Case, groups: Groups) -> OperationSubject:
    """`Sampler` as `Batches` asks it, of samples whose tokens tell which; and another one, asked
    for the last step first."""
    count, batch = case.shape["samples"], case.shape["batch"]
    size = case.shape["microbatches"] * batch
    steps = range(lcm(count, size) // size)
    rows = batch // groups.size("dp")
    first = groups.rank("dp") * rows

    def order(asked: Iterable[int]) -> dict[int, list[tuple[int, int]]]:
        # As long as any placement needs, all its tokens alike.
        length = 2 * groups.size("cp")
        text = np.append(np.arange(count, dtype=np.uint16).repeat(length), 0)
        samples = Samples(text, length)
        own = _batches(case, groups, samples, Sampler(count=samples.count, seed=case.seed))
        return {
            step: [
                (step * size + m * batch + first + row, sample)
                for m, each in enumerate(own.after(step * size))
                for row, sample in enumerate(each.tokens[:, 0].tolist())
            ]
            for step in asked
        }

    def call(inputs: Tensors) -> Tensors:
        found, again = order(steps), order(reversed(steps))
        seen = torch.zeros(len(steps) * size // count, count, dtype=torch.float64)
        for position, sample in (place for step in steps for place in found[step]):
            seen[position // count, sample] += 1
        alike = [sum(map(eq, found[step], again[step])) for step in steps]
        return {"seen": seen, "alike": torch.tensor(alike, dtype=torch.float64)}

    return OperationSubject(call)


def _batches(case: Case, groups: Groups, samples: Samples, sampler: Sampler) -> Batches:
    batch = case.shape["batch"]
    return Batches(
        samples=samples,
        sampler=sampler,
        size=case.shape["microbatches"] * batch,
        microbatch_size=-(-batch // groups.size("dp")),
        groups=groups,
        placement=placement_of(case),
    )


BUILDERS: Mapping[str, Builder] = {"batches": batches, "sample_order": sample_order}
