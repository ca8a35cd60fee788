"""What a target is: the protocol by which an implementation is put under test.

A target is named on the command line (`impl`, `megatron-core`, `package.module:Target`), loaded in
every process, and used only inside rank programs. It gets no tensors from the harness but through a
`Subject`, and shares no code with the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.nn import Parameter

from verify.case import Case
from verify.layout import Layout
from verify.placement import Placements


@runtime_checkable
class Subject(Protocol):
    """One built module or operation, on one rank.

    It may have `random_states()`, the states of its random generators by name: see
    `verify.checks.random_states`.
    """

    def parameters(self) -> Mapping[str, tuple[Parameter, Placements]]:
        """Every parameter by its canonical name (the reference's), with its placement."""
        ...

    def forward(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Local inputs by name to local outputs by name, differentiable. Where that is a training
        of several steps, each begins with `verify.cluster.history.mark_step`, which the check
        `traffic` needs."""
        ...

    def finish_gradients(self) -> None:
        """What the implementation does after backward: it completes gradients, say by sums."""
        ...


class Session(Protocol):
    """A target on one rank, its process groups made for one layout.

    It may have `streams()`, how to draw from the rank's random stream of every region that
    `verify.checks.stream_laws` knows; the check `streams` needs it. And `tracker()`, all of them as
    `verify.checks.stream_misuse` uses them, for the check `misuse`. And `checkpoint()`, how it
    computes a function again in backward, for `verify.checks.rerun`.
    """

    def groups(self) -> Mapping[str, tuple[int, ...]]:
        """For each kind of `verify.layout.KINDS` that the target has, this rank's members."""
        ...

    def probe(self, kind: str) -> list[int]:
        """The global ranks that an all-gather over this rank's real group of `kind` brings
        together, in group order. Collective over that group.

        Raises BadArgument for a kind that this rank has no group of.
        """
        ...

    def build(self, case: Case) -> Subject:
        """The subject that `case.concept` names, with its shapes and options, in `case.dtype`.

        Raises ValueError, AssertionError or another plain exception where it refuses.
        """
        ...


class Target(Protocol):
    """An implementation under test.

    It may have `schedule(kind, layout, microbatches)`, its table of a pipeline schedule as the
    plain data that `verify.schedules.table.table_of` reads, or ValueError where it refuses; the
    check `schedule` and the command `shardproof schedule` need it.
    """

    name: str

    def version(self) -> str:
        """The version of the implementation, for reports."""
        ...

    def stand_ins(self) -> tuple[str, ...]:
        """What in this run is not the implementation's own code, one line each; empty for most."""
        ...

    def supports(self, case: Case) -> str | None:
        """None where the target declares to support the case, else why not, in a few words."""
        ...

    def rank_state(self) -> tuple[RankState, ...]:
        """Process-global state of the implementation that each rank must have for itself."""
        ...

    def session(self, layout: Layout) -> AbstractContextManager[Session]:
        """Inside a rank, torch.distributed initialised: make the groups, undo all at the end."""
        ...


class RankState(Protocol):
    """A piece of process-global state that the `sim` cluster keeps apart for each rank."""

    def fresh(self) -> object:
        """The value a rank starts with."""
        ...

    def save(self) -> object:
        """The present value."""
        ...

    def load(self, value: object) -> None:
        """Put back a value of `fresh` or `save`."""
        ...
