"""The adversary at work in one run: it sees every call before the exchange does.

Only asynchronous operations are made late, because between the call and the wait of any other the
program does not run.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections import Counter, deque
from collections.abc import Sequence

import torch
from torch import Tensor

from verify.adversary import Adversary, Fault
from verify.cluster.base import BufferRace, RankFailure
from verify.cluster.sim.callsite import call_site, describe
from verify.cluster.sim.exchange import Call
from verify.cluster.sim.scheduler import Run

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


class Killed(Exception):
    """A rank is gone, as the adversary's fault has it."""


class Opponent:
    """Disturbs the calls of a run by its settings. `fired` are the faults that took place."""

    def __init__(self, settings: Adversary, run: Run) -> None:
        self.settings, self._run = settings, run
        self.fired: list[Fault] = []
        self._numbers: Counter[int] = Counter()
        self._faults = {(fault.rank, fault.number): fault for fault in settings.faults}
        if settings.schedule is not None:
            run.choose = _Drawn(settings.schedule)

    @property
    def rendezvous(self) -> bool:
        """Whether a send waits for its receive."""
        return self.settings.rendezvous

    def admit(self, call: Call) -> Sequence[Call]:
        """The calls that take the place of this one: itself, as a rule."""
        if self.settings.schedule is not None:
            self._run.give_way()
        self._numbers[call.rank] += 1
        fault = self._faults.get((call.rank, self._numbers[call.rank]))
        calls: Sequence[Call] = (call,)
        if fault is not None:
            self.fired.append(fault)
            calls = self._inflict(fault, call)
        if self.settings.late:
            for each in calls:
                if each.asynchronous:
                    self._postpone(each)
        return calls

    def _inflict(self, fault: Fault, call: Call) -> Sequence[Call]:
        if fault.kind == "die":
            raise Killed(f"fault: {fault}, {call.text()} at {describe(call.site)}")
        if fault.kind == "flip":
            call.inputs = _with_a_flipped_bit(call.inputs)
        elif fault.kind == "drop":
            call.done = True
            return ()
        elif fault.kind == "duplicate":
            again = dataclasses.replace(call, inputs=[each.clone() for each in call.inputs])
            return (call, again)
        return (call,)

    def _postpone(self, call: Call) -> None:
        """Let the exchange work on copies, and hand over the results when they are waited for."""
        inputs, outputs = call.inputs, call.outputs
        written = {tensor.untyped_storage().data_ptr() for tensor in outputs}
        call.inputs = [tensor.detach().clone() for tensor in inputs]
        call.outputs = [torch.empty_like(tensor) for tensor in outputs]
        watched = [
            ("input", tensor, copy)
            for tensor, copy in zip(inputs, call.inputs, strict=True)
            if tensor.untyped_storage().data_ptr() not in written
        ]
        for tensor in outputs:
            _poison(tensor.data)
        watched += [("output", tensor, tensor.detach().clone()) for tensor in outputs]
        results = call.outputs

        def deliver() -> None:
            for what, tensor, before in watched:
                if not _same_bits(tensor, before):
                    self._accuse(call, what)
            for tensor, result in zip(outputs, results, strict=True):
                tensor.data.copy_(result)
            call.outputs = outputs

        call.deliver = deliver

    def _accuse(self, call: Call, what: str) -> None:
        waited = describe(call_site(sys._getframe(2)))
        failure = RankFailure(
            call.rank,
            "BufferRace",
            f"called {call.text()} at {describe(call.site)} and waited for it at {waited}; its"
            f" {what} was written in between",
            "",
        )
        self._run.abandon(BufferRace([failure], "a buffer was written while it was in flight"))


class _Drawn:
    """Takes any of the ready ranks, by seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self, ready: deque[int]) -> int:
        ready.rotate(-self._random.randrange(len(ready)))
        return ready.popleft()


def _poison(tensor: Tensor) -> None:
    """Fill with what nobody could take for a result."""
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(torch.nan)
    elif tensor.dtype is torch.bool:
        tensor.logical_not_()
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max - 7)


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat.view(_BITS[tensor.element_size()])


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(_bits(one), _bits(other))


def _with_a_flipped_bit(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies, the first element of the first tensor that has any with its second highest bit the
    other way round: for a floating-point number the top of its exponent."""
    copies = [tensor.detach().clone() for tensor in tensors]
    for tensor in copies:
        if tensor.numel():
            bits = _bits(tensor)
            bits[0] ^= 1 << (8 * bits.element_size() - 2)
            tensor.copy_(bits.view(tensor.dtype).view(tensor.shape))
            break
    return copies
