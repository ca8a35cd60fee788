"""Point-to-point communication between the stages of a pipeline.

A `Link` sends and receives several tensors at once, so that neither end waits for the other to
begin (`batch_isend_irecv`; one group call in NCCL), and knows peers by their stage: the calls of
torch take global ranks. Both ends name their tensors for each other in the same order.

Where not all activations have one shape, each is announced by a message of its sizes. A gradient
has the shape of its activation, which its receiver knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

MOST_DIMS = 7


@dataclass(frozen=True)
class Outgoing:
    """A tensor to send to the stage `peer`; `announced` if that does not know its shape."""

    tensor: Tensor
    peer: int
    announced: bool = False


@dataclass(frozen=True)
class Incoming:
    """A tensor to receive from the stage `peer`; of a shape that is announced if it is None."""

    peer: int
    shape: tuple[int, ...] | None = None


@dataclass
class Pending:
    """Transfers under way. Keeps what is sent alive until it is done."""

    received: tuple[Tensor, ...] = ()
    sent: tuple[Tensor, ...] = ()
    works: Sequence[dist.Work] = ()

    def wait(self) -> tuple[Tensor, ...]:
        """What was received, complete; what was sent may be freed. May be called again."""
        for work in self.works:
            work.wait()
        self.works, self.sent = (), ()
        return self.received


class Link:
    """One stage's end of the pipeline `group`, for activations and gradients of `dtype`."""

    def __init__(
        self, group: ProcessGroup, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        self.group, self.dtype, self.device = group, dtype, device
        self.stage, self.stages = dist.get_rank(group), dist.get_world_size(group)

    def exchange(self, outgoing: Sequence[Outgoing], incoming: Sequence[Incoming]) -> Pending:
        """Begin all transfers. Announced shapes are exchanged, and waited for, before.

        Returns at once otherwise: `Pending.wait` before reading what comes in. Raises ValueError
        for a tensor of another dtype, or of more than `MOST_DIMS` dimensions.
        """
        for each in outgoing:
            if each.tensor.dtype is not self.dtype:
                raise ValueError(f"p2p: a tensor is {each.tensor.dtype}; the link is {self.dtype}")
        shapes = self._shapes(outgoing, incoming)
        sent = tuple(each.tensor.detach().contiguous() for each in outgoing)
        received = tuple(
            torch.empty(shape, dtype=self.dtype, device=self.device) for shape in shapes
        )
        operations = [
            *self._operations(dist.isend, sent, [each.peer for each in outgoing]),
            *self._operations(dist.irecv, received, [each.peer for each in incoming]),
        ]
        return Pending(received, sent, _begun(operations))

    def _shapes(
        self, outgoing: Sequence[Outgoing], incoming: Sequence[Incoming]
    ) -> list[tuple[int, ...]]:
        """The shapes of what comes in. Communicates if one is announced."""
        told = [each for each in outgoing if each.announced]
        asked = [each for each in incoming if each.shape is None]
        sizes = [self._announcement(each.tensor) for each in told]
        answers = [torch.empty(1 + MOST_DIMS, dtype=torch.int64, device=self.device) for _ in asked]
        operations = [
            *self._operations(dist.isend, sizes, [each.peer for each in told]),
            *self._operations(dist.irecv, answers, [each.peer for each in asked]),
        ]
        for work in _begun(operations):
            work.wait()
        announced = iter(_announced(answer) for answer in answers)
        return [next(announced) if each.shape is None else each.shape for each in incoming]

    def _announcement(self, tensor: Tensor) -> Tensor:
        if tensor.dim() > MOST_DIMS:
            raise ValueError(f"p2p: {tensor.dim()} dimensions; at most {MOST_DIMS} are announced")
        sizes = [tensor.dim(), *tensor.shape, *(0,) * (MOST_DIMS - tensor.dim())]
        return torch.tensor(sizes, dtype=torch.int64, device=self.device)

    def _operations(
        self, operation: Callable[..., Any], tensors: Sequence[Tensor], stages: Sequence[int]
    ) -> list[dist.P2POp]:
        return [
            dist.P2POp(operation, tensor, self._global_rank(stage), self.group)
            for tensor, stage in zip(tensors, stages, strict=True)
        ]

    def _global_rank(self, stage: int) -> int:
        return dist.get_global_rank(self.group, stage)


def _begun(operations: Sequence[dist.P2POp]) -> list[dist.Work]:
    """The operations under way; torch refuses a batch of none."""
    return dist.batch_isend_irecv(list(operations)) if operations else []


def _announced(answer: Tensor) -> tuple[int, ...]:
    dims, *sizes = answer.tolist()
    return tuple(sizes[:dims])
