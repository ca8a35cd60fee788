"""impl's random streams and its dropout as subjects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from impl.dropout import bias_dropout_add
from impl.groups import Groups
from impl.random import (
    CONTEXT_PARALLEL,
    DEFAULT,
    EXPERT_PARALLEL,
    TENSOR_CONTEXT_PARALLEL,
    TENSOR_PARALLEL,
    RandomTracker,
    parallel_tracker,
    stream_of,
)
from verify.case import Case
from verify.checks.stream_laws import Draw
from verify.layout import Layout
from verify.oracle.terms import in_training
from verify.targets.impl.subject import Builder, OperationSubject, Tensors

SEED = 1234
OPTIONS: Mapping[str, tuple[str, ...]] = {"dropout": ("region", "dropout", "bias", "training")}
_REGIONS = {
    "replicated": DEFAULT,
    "tensor-parallel": TENSOR_PARALLEL,
    "context-parallel": CONTEXT_PARALLEL,
    "tensor-context-parallel": TENSOR_CONTEXT_PARALLEL,
    "expert": EXPERT_PARALLEL,
}


def tracker_of(layout: Layout, *, seed: int = SEED) -> RandomTracker:
    """This rank's streams at their start."""
    device = torch.get_default_device()
    return parallel_tracker(seed, layout=layout, rank=dist.get_rank(), device=device)


def streams(layout: Layout) -> Mapping[str, Draw]:
    """How to draw from the stream of every region; of the default one outside of forks."""
    tracker = tracker_of(layout)

    def draw(name: str, count: int) -> Tensor:
        with nullcontext() if name == DEFAULT else tracker.fork(name):
            return torch.rand(count, dtype=torch.float64)

    return {region: partial(draw, name) for region, name in _REGIONS.items()}


class RandomSubject(OperationSubject):
    """An operation that draws random numbers."""

    def __init__(self, call: Callable[[Tensors], Tensors], tracker: RandomTracker) -> None:
        super().__init__(call)
        self._tracker = tracker

    def random_states(self) -> Mapping[str, Tensor]:
        """The state of every stream."""
        return self._tracker.states()


def split_stream(layout: Layout, *axes: str) -> str:
    """The stream of an activation that is split over these axes, where they have several ranks."""
    return stream_of(*(axis for axis in axes if layout.sizes[axis] > 1))


def hidden_stream(layout: Layout, *axes: str) -> str:
    """The stream of hidden states outside of tensor-parallel regions, that are split over `axes`
    besides."""
    return split_stream(layout, *(("tp",) if layout.sequence_parallel else ()), *axes)


def dropout(case: Case, groups: Groups) -> RandomSubject:
    """`bias_dropout_add` of hidden states, or of the features of a tensor-parallel region."""
    tracker = tracker_of(case.layout, seed=case.seed)
    tensor_parallel = case.options.get("region") == "tensor-parallel"
    of = split_stream(case.layout, "tp", "cp")
    name = of if tensor_parallel else hidden_stream(case.layout, "cp")
    operation = partial(
        bias_dropout_add,
        p=float(case.options.get("dropout", 0.25) or 0.0),
        stream=tracker.stream(name),
        training=in_training(case),
    )

    def call(inputs: Tensors) -> Tensors:
        y = operation(inputs["x"], bias=inputs.get("bias"), residual=inputs["residual"])
        return {"y": y}

    return RandomSubject(call, tracker)


BUILDERS: Mapping[str, Builder] = {"dropout": dropout}
