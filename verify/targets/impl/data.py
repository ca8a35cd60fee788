"""impl's batches as subjects: what a rank has of the samples of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
        samples = Samples(inputs["text"].numpy(), case.shape["sequence"])
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
    """`Sampler` over some epochs, as `Batches` asks it, of samples whose tokens tell which."""
    count, step = case.shape["samples"], case.shape["batch"] * case.shape["microbatches"]

    def call(inputs: Tensors) -> Tensors:
        # As long as any placement needs, all its tokens alike.
        length = 2 * groups.size("cp")
        text = np.append(np.arange(count, dtype=np.uint16).repeat(length), 0)
        samples = Samples(text, length)
        own = _batches(case, groups, samples, Sampler(count=samples.count, seed=case.seed))
        seen = torch.zeros(case.shape["epochs"], count, dtype=torch.float64)
        for consumed in range(0, seen.numel(), step):
            for each in own.after(consumed):
                for sample in each.tokens[:, 0].tolist():
                    seen[consumed // count, sample] += 1
        return {"seen": seen}

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
