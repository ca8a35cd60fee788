"""Data parallelism: gradients accumulate in flat buffers and are summed over copies of a parameter.

Every trainable parameter gets a `main_grad`, a view of a buffer in float32 (float64 of float64),
to which each backward adds. The copies of a parameter are on the ranks of `dp_cp`, as a part of the
sequence is data too; those of experts (`allreduce` False) on the ranks of `edp`. Gradients are of
sums over tokens: they are summed, never averaged, and scaled once, by the number of tokens that
count on all ranks. A mean of ranks' means would weigh the tokens of a rank with few more.

Buckets of a buffer are reduced in one order on all ranks, whatever the order in which gradients
come, because ranks that start collectives in different orders wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module, Parameter

from impl.buckets import lay_out
from impl.collectives import (
    Pending,
    all_reduce,
    start_all_reduce_in_place,
    start_reduce_scatter,
)
from impl.groups import Groups
from impl.optimizer.distributed import ParameterBuffer
from impl.parameters import of_expert


@dataclass(frozen=True)
class Share:
    """What this rank updates of a parameter, elements from `start` on: its `values` and their
    `gradient`, flat views of the parameter and of its `main_grad`."""

    parameter: Parameter
    start: int
    values: Tensor
    gradient: Tensor


class GradientBuffer:
    """The main gradients of parameters of one dtype, whose copies are on the ranks of `group`.

    With `scatter`, a reduction leaves each rank its shard of every bucket, and the parameters move
    into a buffer of the same layout, of which it updates the same shards.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        *,
        group: ProcessGroup,
        bucket_size: int | None,
        scatter: bool,
    ) -> None:
        self.parameters, self.group, self.scatter = tuple(parameters), group, scatter
        first = parameters[0]
        numels = [parameter.numel() for parameter in parameters]
        parts = dist.get_world_size(group) if scatter else 1
        self.buckets = lay_out(numels, bucket_size=bucket_size, parts=parts)
        dtype = torch.promote_types(first.dtype, torch.float32)
        self.data = torch.zeros(self.buckets[-1].stop, dtype=dtype, device=first.device)
        self.bucket_of = {
            span.index: number for number, b in enumerate(self.buckets) for span in b.spans
        }
        for span in (span for bucket in self.buckets for span in bucket.spans):
            parameter = parameters[span.index]
            view = self.data[span.start : span.stop].view(parameter.shape)
            parameter.main_grad = view  # type: ignore[attr-defined]
        self.values = ParameterBuffer(parameters, self.buckets, group=group) if scatter else None
        self.zero()

    def zero(self) -> None:
        """Forget all gradients, padding too."""
        self.data.zero_()
        self._missing = [{span.index for span in bucket.spans} for bucket in self.buckets]
        self._pending: list[Pending] = []

    def ready(self, index: int) -> None:
        """The gradient of a parameter is complete on this rank: start what can be started.

        RuntimeError if its bucket is on its way already.
        """
        number = self.bucket_of[index]
        if number < len(self._pending) or index not in self._missing[number]:
            raise RuntimeError(
                f"gradient of a parameter {list(self.parameters[index].shape)}: it came after its"
                " last one; run every backward of a step but the last under no_sync"
            )
        self._missing[number].remove(index)
        while len(self._pending) < len(self.buckets) and not self._missing[len(self._pending)]:
            self._start()

    def finish(self) -> None:
        """Reduce what is not on its way yet, and wait for all of it. Once a step."""
        while len(self._pending) < len(self.buckets):
            self._start()
        for bucket, pending in zip(self.buckets, self._pending, strict=True):
            reduced = pending.wait()
            if self.scatter:
                mine = bucket.shard(dist.get_rank(self.group), parts=self.group.size())
                self.data[mine.start : mine.stop].copy_(reduced)

    def shares(self) -> Iterator[Share]:
        """What this rank updates of each parameter of which it updates anything."""
        for bucket in self.buckets:
            mine = range(bucket.start, bucket.stop)
            if self.scatter:
                mine = bucket.shard(dist.get_rank(self.group), parts=self.group.size())
            for span in bucket.spans:
                start, stop = max(mine.start, span.start), min(mine.stop, span.stop)
                if start >= stop:
                    continue
                parameter = self.parameters[span.index]
                if self.values is None:
                    values = parameter.detach().view(-1)
                else:
                    values = self.values.data[start:stop]
                yield Share(parameter, start - span.start, values, self.data[start:stop])

    def _start(self) -> None:
        bucket = self.buckets[len(self._pending)]
        start = start_reduce_scatter if self.scatter else start_all_reduce_in_place
        self._pending.append(start(self.data[bucket.start : bucket.stop], group=self.group))


class DataParallel:
    """The gradients of a model's trainable parameters, over ranks that hold copies of them.

    `bucket_size` is in elements, None for one bucket. With `overlap`, a bucket is reduced while
    backward goes on to the gradients that it does not hold, and parameters are gathered while
    forward goes on to modules whose parameters are there: a parameter has to be used by the module
    that owns it, in a call of that module. With `distributed`, each rank keeps the sum of its shard
    only, to update it (ZeRO stage 1, Rajbhandari et al., arXiv:1910.02054). All the parameters of a
    rank may be frozen. `zero`, of no dimension, has the dtype and device of main gradients.

    Backward: with `overlap` one asynchronous all-reduce (`distributed`: reduce-scatter) a bucket.
    """

    def __init__(
        self,
        module: Module,
        *,
        groups: Groups,
        bucket_size: int | None = None,
        overlap: bool = False,
        distributed: bool = False,
    ) -> None:
        self.overlap, self.distributed, self._synchronizes = overlap, distributed, True
        self.parameters = [each for each in module.parameters() if each.requires_grad]
        first = next(module.parameters())
        main = torch.promote_types(first.dtype, torch.float32)
        self.zero = torch.zeros((), dtype=main, device=first.device)
        by_place: dict[tuple[torch.dtype, bool, bool], list[Parameter]] = {}
        for parameter in self.parameters:
            place = parameter.dtype, of_expert(parameter), of_tied_embedding(parameter)
            by_place.setdefault(place, []).append(parameter)
        self.buffers = [
            GradientBuffer(
                parameters,
                group=groups.edp if expert else groups.dp_cp,
                bucket_size=bucket_size,
                scatter=distributed,
            )
            for (_, expert, _), parameters in by_place.items()
        ]
        for buffer in self.buffers:
            for index, parameter in enumerate(buffer.parameters):
                hook = partial(self._accumulate, buffer, index)
                parameter.register_post_accumulate_grad_hook(hook)
        if distributed and overlap:
            for each in module.modules():
                each.register_forward_pre_hook(self._wait_for_parameters)

    def no_sync(self) -> AbstractContextManager[None]:
        """Inside, backward only accumulates: for every backward of a step but the last."""
        return self._synchronizing(False)

    def sync(self) -> AbstractContextManager[None]:
        """Inside, also within `no_sync`, backward is a parameter's last of the step."""
        return self._synchronizing(True)

    @contextmanager
    def _synchronizing(self, whether: bool) -> Iterator[None]:
        before, self._synchronizes = self._synchronizes, whether
        try:
            yield
        finally:
            self._synchronizes = before

    def zero_gradients(self) -> None:
        """Begin a step: all gradients are zero."""
        for buffer in self.buffers:
            buffer.zero()

    def finish(self) -> None:
        """End the backward passes of a step: main gradients, or with `distributed` this rank's
        shards of them, are summed over the ranks that hold copies. Collective; once a step."""
        for buffer in self.buffers:
            buffer.finish()
        # Those too that no forward pass has waited for, before they are updated.
        self.finish_parameters()

    def scale(self, factor: Tensor | float) -> None:
        """Multiply all main gradients, before or after `finish` but not in between."""
        for buffer in self.buffers:
            buffer.data.mul_(factor)

    def shares(self) -> list[Share]:
        """What this rank updates of the parameters; in all where not `distributed`."""
        return [share for buffer in self.buffers for share in buffer.shares()]

    def gather_parameters(self) -> None:
        """Bring what each rank has updated to all others; with `overlap` only begin to. Collective.
        Does nothing where every rank updates everything."""
        for buffer in self.buffers:
            if buffer.values is not None:
                buffer.values.start()
        if not self.overlap:
            self.finish_parameters()

    def finish_parameters(self) -> None:
        """Wait for all parameters, to read them outside of a forward pass."""
        for buffer in self.buffers:
            if buffer.values is not None:
                buffer.values.finish()

    def _accumulate(self, buffer: GradientBuffer, index: int, parameter: Parameter) -> None:
        assert parameter.grad is not None
        parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
        parameter.grad = None
        if self.overlap and self._synchronizes:
            buffer.ready(index)

    def _wait_for_parameters(self, module: Module, inputs: object) -> None:
        for parameter in module.parameters(recurse=False):
            for buffer in self.buffers:
                if buffer.values is not None:
                    buffer.values.wait_for(parameter)


def of_tied_embedding(parameter: Parameter) -> bool:
    """Whether a parameter has a copy on another stage. Both are alone in a buffer, so that their
    shards are of the same elements, and their sum over the two stages is one of finished shards."""
    return getattr(parameter, "shared_embedding", False)


def sum_over_tokens(loss: Tensor, tokens: Tensor, *, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """This rank's sum of losses and its number of tokens that count, both of no dimension, summed
    over a group, `dp_cp` for all data; in float64, which counts beyond what float32 can."""
    both = torch.stack([loss.detach().double(), tokens.double()])
    total, count = all_reduce(both, group=group)
    return total, count
