"""Runs a pipeline schedule on one stage, whatever its table and whatever its chunks are.

The total loss is `scale` times the sum of all microbatches' losses, and its gradients are added to
what is in the parameters' `.grad`: for a mean over the microbatches of several runs, `scale` is one
by the number of all of them. Nothing that was accumulated before is scaled.

What is kept of a microbatch between forward and backward is its input and what autograd saved. The
output goes as soon as it is sent, unless the chunk's own backward needs its values, and all else
with backward. Of a schedule with `input` and `weight`, the first is all of backward but what
layers put off (see `impl.weight_pass`), which is kept for the second with the gradients that it
found on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import Parameter

from impl.pipeline.p2p import Incoming, Link, Outgoing, Pending
from impl.pipeline.schedules import Action, Exchange, Schedule
from impl.pipeline.timeline import Transfer
from impl.weight_pass import WeightPass


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage computes. `chunks[c](x, microbatch)` maps the activation of a microbatch to the
    next, and `parameters[c]` are those of the chunk; `loss(y, microbatch)`, of the last chunk's
    output, is a scalar, and is asked for on the last stage only."""

    chunks: Sequence[Callable[[Tensor, int], Tensor]]
    parameters: Sequence[Sequence[Parameter]]
    loss: Callable[[Tensor, int], Tensor]


@dataclass
class Outcome:
    """What a run leaves on a stage beside gradients of parameters: the losses by microbatch, not
    scaled and without a graph, on the last stage; the gradients of the inputs that require one, by
    microbatch, on the first."""

    losses: dict[int, Tensor] = field(default_factory=dict)
    input_gradients: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Kept:
    """Of one microbatch on one chunk: its input, and the way back from its output (None without
    gradients), with the shape of that."""

    x: Tensor
    edge: GradientEdge | None
    shape: tuple[int, ...]


_Key = tuple[str, int, int]


class Executor:
    """One run of `schedule` on the stage of `link`. Collective over the pipeline's ranks.

    `inputs` are the microbatches, which the first stage reads; all are given as many, so that all
    refuse another number, with a ValueError, and none waits for another. `shape` is that of every
    activation, None if they differ and have to be announced. With `overlap` the stage goes on
    computing while tensors travel, until it needs one or has others to exchange; the results are
    the same. `finished` is called once for each chunk, when its parameters' gradients are complete:
    a reduction over replicas may begin then. The backward pass that completes them runs in the
    context of `completing`, so that a reduction may begin within it.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        stage: Stage,
        link: Link,
        inputs: Sequence[Tensor],
        scale: float,
        shape: tuple[int, ...] | None = None,
        overlap: bool,
        finished: Callable[[int], None] | None = None,
        completing: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        given = link.stages, len(stage.chunks), len(stage.parameters), len(inputs)
        if given != (schedule.pp, schedule.vpp, schedule.vpp, schedule.microbatches):
            raise ValueError(
                f"schedule: it is for pp={schedule.pp}, vpp={schedule.vpp} and"
                f" microbatches={schedule.microbatches}; there are {link.stages} stages, and here"
                f" {len(stage.chunks)} chunks, parameters of {len(stage.parameters)} and"
                f" {len(inputs)} inputs"
            )
        self.schedule, self.stage, self.link, self.inputs = schedule, stage, link, inputs
        self.scale, self.shape, self.overlap, self.finished = scale, shape, overlap, finished
        self.completing = completing
        self.outcome = Outcome()
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._late: dict[tuple[int, int], WeightPass] = {}
        self._ready: dict[_Key, Tensor] = {}
        self._leaving: dict[_Key, Tensor] = {}
        self._pending: tuple[Pending, list[_Key]] = (Pending(), [])

    def run(self) -> Outcome:
        """Go through the stage's table to its end."""
        index, chunks = self.link.stage, range(self.schedule.vpp)
        last = {}
        if self.schedule.kind != "forward":
            last = {self.schedule.last_backward(index, chunk): chunk for chunk in chunks}
        for step in self.schedule.stages[index]:
            if isinstance(step, Exchange):
                self._exchange(step.transfers)
                continue
            with self.completing() if step in last else nullcontext():
                self._act(step)
            if self.finished is not None and step in last:
                self.finished(last[step])
        self._arrived()
        return self.outcome

    def _act(self, action: Action) -> None:
        if action.work == "forward":
            self._forward(action)
        elif action.work == "input":
            self._input(action)
        elif action.work == "weight":
            self._weight(action)
        else:
            self._backward(action)

    def _forward(self, action: Action) -> None:
        m, chunk = action.microbatch, action.chunk
        training = self.schedule.kind != "forward"
        if self._place(chunk) == 0:
            given = self.inputs[m]
            x = given.detach().requires_grad_(training and given.requires_grad)
        else:
            x = self._taken("activation", m, chunk).requires_grad_(training)
        with torch.set_grad_enabled(training):
            y = self.stage.chunks[chunk](x, m)
            if self._place(chunk) == self._last:
                y = self.stage.loss(y, m)
        if training:
            edge = get_gradient_edge(y) if y.requires_grad else None
            self._kept[m, chunk] = _Kept(x, edge, tuple(y.shape))
        if self._place(chunk) == self._last:
            self.outcome.losses[m] = y.detach()
        else:
            self._leaving["activation", m, chunk] = y.detach()

    def _backward(self, action: Action) -> None:
        """All gradients at once."""
        m, chunk = action.microbatch, action.chunk
        kept, gradient = self._reached(m, chunk)
        leaves = [*self._trained(chunk), *([kept.x] if kept.x.requires_grad else [])]
        if kept.edge is not None and leaves:
            torch.autograd.backward([kept.edge], [gradient], inputs=leaves)
        self._leave_gradient(m, chunk, kept.x, kept.x.grad)

    def _input(self, action: Action) -> None:
        """The gradient of the input; those of the parameters stay in a `WeightPass`."""
        m, chunk = action.microbatch, action.chunk
        kept, gradient = self._reached(m, chunk)
        late, found = WeightPass(self._trained(chunk)), None
        if kept.edge is not None:
            found = late.back(kept.edge, gradient=gradient, x=kept.x)
        self._late[m, chunk] = late
        self._leave_gradient(m, chunk, kept.x, found)

    def _weight(self, action: Action) -> None:
        """The gradients of the parameters."""
        self._late.pop((action.microbatch, action.chunk)).run()

    def _reached(self, m: int, chunk: int) -> tuple[_Kept, Tensor]:
        """What was kept of a microbatch that backward has come to, and the gradient of its
        output."""
        kept = self._kept.pop((m, chunk))
        if self._place(chunk) == self._last:
            return kept, torch.full_like(self.outcome.losses[m], self.scale)
        return kept, self._taken("gradient", m, chunk)

    def _leave_gradient(self, m: int, chunk: int, x: Tensor, gradient: Tensor | None) -> None:
        if not x.requires_grad:
            return
        gradient = torch.zeros_like(x) if gradient is None else gradient
        if self._place(chunk) == 0:
            self.outcome.input_gradients[m] = gradient
        else:
            self._leaving["gradient", m, chunk] = gradient

    def _exchange(self, transfers: Iterable[Transfer]) -> None:
        """Begin the transfers, when those before are done, and with overlap do not wait."""
        self._arrived()
        begun: list[Outgoing | Incoming] = []
        keys: list[_Key] = []
        for each in transfers:
            activation = each.what == "activation"
            key: _Key = each.what, each.microbatch, self._own_chunk(each)
            if each.way == "send":
                announced = activation and self.shape is None
                begun.append(Outgoing(self._leaving.pop(key), each.peer, announced))
            else:
                # The gradient of an activation that went out has its shape.
                known = self.shape if activation else self._kept[key[1:]].shape
                begun.append(Incoming(each.peer, known))
                keys.append(key)
        self._pending = self.link.exchange(begun), keys
        if not self.overlap:
            self._arrived()

    def _arrived(self) -> None:
        """Wait for all transfers under way."""
        pending, keys = self._pending
        self._ready.update(zip(keys, pending.wait(), strict=True))
        self._pending = Pending(), []

    def _taken(self, what: str, m: int, chunk: int) -> Tensor:
        if (what, m, chunk) not in self._ready:
            self._arrived()
        return self._ready.pop((what, m, chunk))

    def _own_chunk(self, transfer: Transfer) -> int:
        """The chunk of this stage that a transfer comes from or is for."""
        if transfer.way == "recv":
            return transfer.chunk
        step = -1 if transfer.what == "activation" else 1
        return (transfer.chunk * self.schedule.pp + transfer.peer + step) // self.schedule.pp

    def _trained(self, chunk: int) -> list[Parameter]:
        return [each for each in self.stage.parameters[chunk] if each.requires_grad]

    def _place(self, chunk: int) -> int:
        """The index of a chunk in the model."""
        return chunk * self.schedule.pp + self.link.stage

    @property
    def _last(self) -> int:
        return self.schedule.pp * self.schedule.vpp - 1
