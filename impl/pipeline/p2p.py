"""Point-to-point communication between the stages of a pipeline.

A `Link` sends and receives several tensors at once, so that neither end waits for the other to
begin (`batch_isend_irecv`; one group call in NCCL), and knows peers by their stage: the calls of
torch take global ranks. Both ends name their tensors for each other in the same order.

Where not all activations have one shape, each is announced by a message of its sizes just before
it. A gradient has the shape of its activation, which its receiver knows. The order of all messages
between two stages is that of their transfers, however either end begins them together: if a batch
began with its announcements, they would meet tensors where the other end has another batch.
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

    def exchange(self, transfers: Sequence[Outgoing | Incoming]) -> Pending:
        """Begin the transfers, which both ends of each have in one order.

        All are begun at once, but where the shape of something to receive is announced: up to the
        announcement they are done, and then the others begin. `Pending.wait` before reading what
        comes in. Raises ValueError for a tensor of another dtype, or of more than `MOST_DIMS`
        dimensions.
        """
        operations: list[dist.P2POp] = []
        received, sent = [], []
        for each in transfers:
            if isinstance(each, Outgoing):
                for tensor in self._messages(each):
                    sent.append(tensor)
                    operations.append(self._operation(dist.isend, tensor, each.peer))
                continue
            shape = each.shape
            if shape is None:
                sizes = torch.empty(1 + MOST_DIMS, dtype=torch.int64, device=self.device)
                operations.append(self._operation(dist.irecv, sizes, each.peer))
                Pending(works=_begun(operations)).wait()
                operations, shape = [], _announced(sizes)
            received.append(torch.empty(shape, dtype=self.dtype, device=self.device))
            operations.append(self._operation(dist.irecv, received[-1], each.peer))
        return Pending(tuple(received), tuple(sent), _begun(operations))

    def _messages(self, outgoing: Outgoing) -> list[Tensor]:
        """What is sent of a tensor: its shape, if that is announced, and its values."""
        tensor = outgoing.tensor
        if tensor.dtype is not self.dtype:
            raise ValueError(f"p2p: a tensor is {tensor.dtype}; the link is {self.dtype}")
        values = [tensor.contiguous()]
        return [self._announcement(tensor), *values] if outgoing.announced else values

    def _announcement(self, tensor: Tensor) -> Tensor:
        if tensor.dim() > MOST_DIMS:
            raise ValueError(f"p2p: {tensor.dim()} dimensions; at most {MOST_DIMS} are announced")
        sizes = [tensor.dim(), *tensor.shape, *(0,) * (MOST_DIMS - tensor.dim())]
        return torch.tensor(sizes, dtype=torch.int64, device=self.device)

    def _operation(self, call: Callable[..., Any], tensor: Tensor, stage: int) -> dist.P2POp:
        return dist.P2POp(call, tensor, dist.get_global_rank(self.group, stage), self.group)


def _begun(operations: Sequence[dist.P2POp]) -> list[dist.Work]:
    """The operations under way; torch refuses a batch of none."""
    return dist.batch_isend_irecv(list(operations)) if operations else []


def _announced(answer: Tensor) -> tuple[int, ...]:
    dims, *sizes = answer.tolist()
    return tuple(sizes[:dims])
