"""Trainings that show nothing: impl's, with what they tell of their steps undone."""

import torch
import torch.distributed as dist
from vacuous_targets import EmptySubject, Spoilt, ZeroSubject, _Target

TOLD = ("loss", "further", "evaluation")


class StillSubject(Spoilt):
    """All parameters are frozen: there are no gradients, and every step leaves what it found."""

    def forward(self, inputs):
        before = {f"new {n}": p.detach().clone() for n, (p, _) in self.parameters().items()}
        found = super().forward(inputs)
        still = {n: before[n].expand(y.shape).clone() for n, y in found.items() if n in before}
        zero = [n for n in found if n.startswith("gradient ") or n == "norm"]
        return found | still | {n: torch.zeros_like(found[n]) for n in zero}


class FlatSubject(StillSubject):
    """The loss is a constant, so that nothing has a gradient."""

    def forward(self, inputs):
        found = super().forward(inputs)
        return found | {n: torch.ones_like(y) for n, y in found.items() if n in TOLD}


class UntoldSubject(Spoilt):
    """Losses and gradients are empty, whatever they are."""

    def forward(self, inputs):
        found = super().forward(inputs)
        told = [n for n in found if n.startswith("gradient ") or n in (*TOLD, "norm")]
        return found | {n: found[n][:0] for n in told}


class _OnTheLast(Spoilt):
    """One rank shows nothing, and the others are right."""

    def forward(self, inputs):
        found = super().forward(inputs)
        last = dist.get_rank() == dist.get_world_size() - 1
        return found if not last else self.undo(found)


class EmptyOnOneSubject(_OnTheLast):
    def undo(self, found):
        return {name: y[:0] for name, y in found.items()}


class ZeroOnOneSubject(_OnTheLast):
    def undo(self, found):
        return {name: 0.0 * y for name, y in found.items()}


WAYS = {
    each.__name__.removesuffix("Subject"): each
    for each in (
        EmptySubject, ZeroSubject, StillSubject, FlatSubject, UntoldSubject, EmptyOnOneSubject,
        ZeroOnOneSubject,
    )
}  # fmt: skip
for _name, _subject in WAYS.items():
    globals()[_name] = type(_name, (_Target,), {"subject": _subject})
