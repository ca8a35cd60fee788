"""impl's pipeline as a subject: a stack of layers that `Executor` trains, and its schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from impl.groups import Groups
from impl.pipeline.executor import Executor, Stage
from impl.pipeline.p2p import Link
from impl.pipeline.schedules import Schedule, build_schedule
from impl.pipeline.schedules import forward_only as only_forward
from impl.weight_pass import linear
from verify.case import Case
from verify.layout import Layout
from verify.oracle.pipeline import OPTIONS as _OPTIONS
from verify.targets.impl.subject import Tensors
from verify.targets.pipeline_steps import ByMicrobatch, Chunk, PipelineSubject, Round

OPTIONS: Mapping[str, tuple[str, ...]] = {"pipeline": _OPTIONS}


def schedule(kind: str, layout: Layout, microbatches: int) -> list[list[list[object]]]:
    """The table of a kind as plain data. Raises ValueError where impl refuses."""
    found = build_schedule(kind, pp=layout.pp, vpp=layout.vpp, microbatches=microbatches)
    return found.to_plain()


class _Subject(PipelineSubject):
    """`Executor`'s. What is shown of gradients are those that it calls complete."""

    def __init__(self, case: Case, groups: Groups) -> None:
        pp, vpp, layers = groups.size("pp"), case.layout.vpp, case.shape["layers"]
        if layers % (pp * vpp):
            raise ValueError(
                f"layers: {layers} do not divide by the {pp * vpp} chunks of pp={pp} and vpp={vpp}"
            )
        super().__init__(case)
        self.link = Link(groups.pp, dtype=self.weight.dtype)
        self.schedule = self._schedule(case.shape["microbatches"], pp=pp)
        self._complete: dict[int, Tensors] = {}

    def run(self, round_: Round, *, forward_only: bool) -> tuple[ByMicrobatch, ByMicrobatch]:
        """One run of the executor."""
        chunks, options = round_.chunks, self.case.options
        table, sizes = self.schedule, {"pp": self.schedule.pp, "vpp": self.schedule.vpp}

        def finished(chunk: int) -> None:
            self._complete[chunk] = chunks[chunk].gradients()

        outcome = Executor(
            only_forward(**sizes, microbatches=len(round_.inputs)) if forward_only else table,
            stage=Stage(
                chunks=[partial(_forward, chunk) for chunk in chunks],
                parameters=[(*chunk.weights, *chunk.biases) for chunk in chunks],
                loss=round_.loss,
            ),
            link=self.link,
            inputs=round_.inputs,
            scale=round_.scale,
            shape=None if options.get("variable", False) else tuple(round_.inputs[0].shape),
            overlap=bool(options.get("overlap", True)),
            finished=finished,
        ).run()
        return outcome.losses, outcome.input_gradients

    def gradients(self, chunks: Sequence[Chunk]) -> Sequence[Tensors]:
        """Those that were there when the executor called them complete for the last time."""
        return [self._complete.get(index, {}) for index in range(len(chunks))]

    def _schedule(self, microbatches: int, *, pp: int) -> Schedule:
        vpp = self.case.layout.vpp
        kind = str(self.case.options.get("schedule", "default"))
        if kind == "default":
            kind = "interleaved" if vpp > 1 else "1f1b"
        if microbatches % self.rounds:
            raise ValueError(f"rounds: {self.rounds} do not divide {microbatches} microbatches")
        return build_schedule(kind, pp=pp, vpp=vpp, microbatches=microbatches // self.rounds)


def _forward(chunk: Chunk, x: Tensor, microbatch: int) -> Tensor:
    return chunk.forward(x, linear)


def pipeline(case: Case, groups: Groups) -> _Subject:
    """A stack of layers over the pipeline group."""
    return _Subject(case, groups)


BUILDERS: Mapping[str, Any] = {"pipeline": pipeline}
