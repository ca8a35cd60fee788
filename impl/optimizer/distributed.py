"""The distributed optimizer's parameters: each rank updates a shard and gathers the others'.

ZeRO stage 1 (Rajbhandari et al., arXiv:1910.02054): optimizer states and main parameters exist once
on all ranks that hold copies of a parameter. Which rank updates an element depends on where in the
buffer it lies, not on whose element it is: a parameter may be updated by several ranks, and a rank
may have nothing but padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from impl.buckets import Bucket
from impl.collectives import Pending, start_all_gather_in_place


class ParameterBuffer:
    """Parameters of one dtype in one flat buffer, laid out as their gradients are.

    The parameters become views of the buffer. After an update, which writes this rank's shard of
    every bucket, `start` begins to gather all shards in place, the buckets that forward needs first
    at first. Until its bucket is waited for, a parameter may hold anything.
    """

    def __init__(
        self, parameters: Sequence[Parameter], buckets: Sequence[Bucket], *, group: ProcessGroup
    ) -> None:
        self.group, self.buckets = group, buckets
        first = parameters[0]
        self.data = torch.zeros(buckets[-1].stop, dtype=first.dtype, device=first.device)
        self._bucket_of: dict[Parameter, int] = {}
        self._pending: dict[int, Pending] = {}
        for number, bucket in enumerate(buckets):
            for span in bucket.spans:
                parameter = parameters[span.index]
                view = self.data[span.start : span.stop].view(parameter.shape)
                view.copy_(parameter.detach())
                parameter.data = view
                self._bucket_of[parameter] = number

    def start(self) -> None:
        """Begin to gather every bucket, of which none is under way. Collective."""
        for number in reversed(range(len(self.buckets))):
            bucket = self.buckets[number]
            whole = self.data[bucket.start : bucket.stop]
            self._pending[number] = start_all_gather_in_place(whole, group=self.group)

    def wait_for(self, parameter: Parameter) -> None:
        """Return when a parameter is there; at once for one that is not of this buffer."""
        pending = self._pending.pop(self._bucket_of.get(parameter, -1), None)
        if pending is not None:
            pending.wait()

    def finish(self) -> None:
        """Wait for every bucket."""
        for number in list(self._pending):
            self._pending.pop(number).wait()
