"""Where the ranks' communication meets: collectives by group and order, messages by peer and tag.

A `Call` is what one rank asks for. Members of a group must ask for the same collectives in the same
order; what `Kind` says must agree is compared as soon as a second member arrives, and the last one
to arrive computes the result for all, in the order of group ranks, so that it is deterministic.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from verify.cluster.base import CollectiveMismatch, RankFailure
from verify.cluster.history import History, Record, phase
from verify.cluster.sim.callsite import CallSite, call_site, describe
from verify.cluster.sim.collectives import KINDS, Kind, Misfit
from verify.cluster.sim.scheduler import Run

if TYPE_CHECKING:
    from verify.cluster.sim.opponent import Opponent

_SHOWN = 8
# What carries out an operation is not part of the program of the rank that happens to come last:
# its dispatch modes must not see it.


class _unseen:
    """While inside, neither autograd nor a dispatch mode of the running rank sees what is done:
    it is the cluster's, not the rank's. Cheaper than torch's own contexts."""

    __slots__ = ("_dispatch", "_grad")

    def __enter__(self) -> None:
        self._grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        self._dispatch = torch._C._DisableTorchDispatch()
        self._dispatch.__enter__()

    def __exit__(self, *error: object) -> None:
        self._dispatch.__exit__(*error)
        torch._C._set_grad_enabled(self._grad)


@dataclass(slots=True, eq=False)
class Call:
    """A rank's part in a collective, or its send or receive.

    `inputs` are read and `outputs` written when the operation is carried out; both are this rank's
    own tensors. `settings` are what
    the kind needs besides and what must agree (a reduction, a root); `own` is what need not (split
    sizes). `operation` is what it is part of until that is done; `source` the group rank whose
    message was received; `number` is its place in the history of its rank, where one is kept;
    `defect` is what is done in its place, where one is planted.
    """

    kind: str
    rank: int
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    settings: tuple[Any, ...]
    site: CallSite | None
    own: tuple[Any, ...] = ()
    asynchronous: bool = False
    done: bool = False
    waiting: bool = False
    operation: Operation | Message | None = None
    source: int | None = None
    deliver: Callable[[], None] | None = None
    number: int = 0
    defect: Callable[[Sequence[Call]], None] | None = None

    def describe(self) -> str:
        """What this rank waits for, and whom."""
        # Looked at once: another rank may do it now.
        operation = self.operation
        if operation is None:
            return f"waits for its turn after {self.text()} at {describe(self.site)}"
        where = f"{operation.where()} at {describe(self.site)}{operation.missing()}"
        return f"waits in {self.text()} {where}"

    def text(self) -> str:
        """`all_reduce of float32 [2, 3]`."""
        tensors = self.inputs or self.outputs
        if not tensors:
            return self.kind
        shown = ", ".join(shape_text(tensor) for tensor in tensors[:3])
        return f"{self.kind} of {shown}{', ...' if len(tensors) > 3 else ''}"


def shape_text(tensor: Tensor) -> str:
    """`float32 [2, 3]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


@dataclass(slots=True, eq=False)
class Operation:
    """One collective of a group, complete when every member has called it."""

    channel: Channel
    calls: list[Call | None]
    left: int
    first: Call | None = None

    def missing(self) -> str:
        """Who has not called it yet."""
        ranks = [r for r, call in zip(self.channel.ranks, self.calls, strict=True) if call is None]
        return f"; {_ranks(ranks)} did not call it" if ranks else ""

    def where(self) -> str:
        """Over which ranks."""
        return f"over {_ranks(self.channel.ranks)}"


@dataclass(slots=True, eq=False)
class Message:
    """A send or a receive that has not met its other side."""

    call: Call
    channel: Channel
    source: int | None
    target: int
    tag: int
    order: int = 0

    def missing(self) -> str:
        """What did not happen."""
        return "; no matching receive" if self.call.kind == "send" else "; no matching send"

    def where(self) -> str:
        """From or to whom."""
        ranks = self.channel.ranks
        if self.call.kind == "send":
            return f"to rank {ranks[self.target]}{self._tag()}"
        source = "any rank" if self.source is None else f"rank {ranks[self.source]}"
        return f"from {source}{self._tag()}"

    def _tag(self) -> str:
        return f" with tag {self.tag}" if self.tag else ""


class Channel:
    """One process group, as seen by all of its members. `ranks` are global, by group rank."""

    def __init__(
        self, name: str, ranks: tuple[int, ...], maker: int, site: CallSite | None
    ) -> None:
        self.name, self.ranks = name, ranks
        self.maker, self.site = maker, site
        self.counts = [0] * len(ranks)
        self.operations: dict[int, Operation] = {}
        self.sends: dict[int, deque[Message]] = {}
        self.receives: dict[int, deque[Message]] = {}
        # Symmetric operations that members called from different places, by group rank.
        self.mixed: list[list[tuple[str, CallSite | None]]] = []
        # What was sent last from a rank to another, where a defect wants to know.
        self.passed: dict[tuple[int, int], Sequence[Tensor]] = {}

    def disorder(self) -> CollectiveMismatch | None:
        """Whether two members called the same operations from the same places in different orders:
        each got the other's tensors, and nothing else tells."""
        orders: dict[tuple[tuple[str, CallSite | None], ...], int] = {}
        for member in range(len(self.ranks)) if self.mixed else ():
            orders.setdefault(tuple(calls[member] for calls in self.mixed), member)
        for (one, first), (two, other) in combinations(orders.items(), 2):
            if Counter(one) == Counter(two):
                return self._disordered(first, other)
        return None

    def _disordered(self, *members: int) -> CollectiveMismatch:
        at = next(calls for calls in self.mixed if len({calls[m] for m in members}) > 1)
        failures = [
            RankFailure(
                self.ranks[m],
                "CollectiveMismatch",
                f"calls {at[m][0]} at {describe(at[m][1])} when the other calls one from elsewhere",
                "",
            )
            for m in members
        ]
        who = _ranks([self.ranks[m] for m in members])
        headline = f"{who} issue the same calls in different orders, in the group of"
        return CollectiveMismatch(failures, f"{headline} {_ranks(self.ranks)}")

    def unfinished(self) -> Iterator[Call]:
        """Calls that never met what they needed."""
        for operation in self.operations.values():
            yield from (call for call in operation.calls if call is not None)
        for queue in (*self.sends.values(), *self.receives.values()):
            yield from (message.call for message in queue)


@dataclass
class Exchange:
    """All communication of one run. `opponent` may disturb it, `history` is filled."""

    run: Run
    opponent: Opponent | None = None
    history: History | None = None
    channels: dict[str, Channel] = field(default_factory=dict)
    _orders: int = 0

    def channel(self, name: str, ranks: tuple[int, ...], rank: int) -> Channel:
        """The channel of a group by name. Members that made it of other ranks are at fault."""
        found = self.channels.get(name)
        if found is None:
            found = self.channels[name] = Channel(name, ranks, rank, call_site(sys._getframe()))
        if found.ranks != ranks:
            failures = [
                RankFailure(
                    maker,
                    "CollectiveMismatch",
                    f"makes a group of {_ranks(members)} at {describe(site)}",
                    "",
                )
                for maker, members, site in (
                    (found.maker, found.ranks, found.site),
                    (rank, ranks, call_site(sys._getframe())),
                )
            ]
            self._fail(f"ranks make group {name!r} of different members", failures)
        return found

    def join(self, channel: Channel, member: int, call: Call) -> None:
        """Take part in the next collective of a group. The last one in carries it out."""
        for each in self._admit(channel, call):
            self._join(channel, member, each)

    def _join(self, channel: Channel, member: int, call: Call) -> None:
        number = channel.counts[member]
        channel.counts[member] = number + 1
        operation = channel.operations.get(number)
        if operation is None:
            size = len(channel.ranks)
            operation = channel.operations[number] = Operation(channel, [None] * size, size)
        first = operation.first
        if first is None:
            operation.first = call
        elif first.kind != call.kind or first.settings != call.settings:
            self._differ(channel, first, call)
        elif (apart := KINDS[call.kind].apart(first, call)) is not None:
            self._differ(channel, first, call, apart)
        call.operation = operation
        operation.calls[member] = call
        operation.left -= 1
        if operation.left == 0:
            del channel.operations[number]
            self._complete(channel, operation.calls)  # type: ignore[arg-type]

    def send(self, channel: Channel, call: Call, source: int, target: int, tag: int) -> None:
        """Send to a group rank. What is sent is copied, so that the sender may go on."""
        for each in self._admit(channel, call, target):
            self._send(channel, each, source, target, tag)

    def _send(self, channel: Channel, call: Call, source: int, target: int, tag: int) -> None:
        message = Message(call, channel, source, target, tag, self._order())
        call.operation = message
        receive = _take(channel.receives.get(target), source, tag, sender=True)
        if receive is not None:
            self._pass(message, receive)
            return
        if self.opponent is None or not self.opponent.rendezvous:
            with _unseen():
                call.inputs = [tensor.detach().clone() for tensor in call.inputs]
            call.done = True
        channel.sends.setdefault(target, deque()).append(message)

    def receive(
        self, channel: Channel, call: Call, source: int | None, target: int, tag: int
    ) -> None:
        """Receive from a group rank, or from any with None."""
        for each in self._admit(channel, call, source):
            self._receive(channel, each, source, target, tag)

    def _receive(
        self, channel: Channel, call: Call, source: int | None, target: int, tag: int
    ) -> None:
        message = Message(call, channel, source, target, tag, self._order())
        call.operation = message
        sent = _take(channel.sends.get(target), source, tag, sender=False)
        if sent is not None:
            self._pass(sent, message)
        else:
            channel.receives.setdefault(target, deque()).append(message)

    def wait(self, call: Call) -> None:
        """Block the running rank until its call is done, and its outputs are there."""
        self.run.check()
        if self.history is not None:
            self.history.waited(call.rank, call.number)
        if not call.done:
            call.waiting = True
            self.run.block(call)
        if call.deliver is not None:
            call.deliver()
            call.deliver = None

    def settle(self) -> None:
        """After the last rank: raise CollectiveMismatch for calls that nobody answered, and for
        calls that fit each other although members issued them in different orders."""
        for channel in self.channels.values():
            if disorder := channel.disorder():
                raise disorder
        left = [call for channel in self.channels.values() for call in channel.unfinished()]
        if not left:
            return
        failures = [
            RankFailure(call.rank, "CollectiveMismatch", _unanswered(call), "")
            for call in sorted(left, key=lambda call: call.rank)[:_SHOWN]
        ]
        raise CollectiveMismatch(failures, "the program ended with calls that nobody answered")

    def _admit(self, channel: Channel, call: Call, peer: int | None = None) -> Sequence[Call]:
        """Take note of a call, and let the opponent at it."""
        self.run.check()
        if self.history is not None:
            _note(self.history, channel, call, peer)
        return (call,) if self.opponent is None else self.opponent.admit(call)

    def _order(self) -> int:
        self._orders += 1
        return self._orders

    def _complete(self, channel: Channel, calls: list[Call]) -> None:
        kind = KINDS[calls[0].kind]
        if (misfit := _misfit(kind, calls)) is not None:
            self._differ(channel, calls[misfit.one], calls[misfit.other], misfit.text)
        site = calls[0].site
        if any(call.site != site for call in calls) and kind.symmetric:
            channel.mixed.append([(call.text(), call.site) for call in calls])
        defects = (call.defect for call in calls)
        with _unseen():
            next(filter(None, defects), kind.perform)(calls)
        self._finish(calls)

    def _pass(self, sent: Message, received: Message) -> None:
        for one, other in zip(sent.call.inputs, received.call.outputs, strict=True):
            if one.numel() != other.numel() or one.dtype is not other.dtype:
                self._differ(sent.channel, sent.call, received.call, "the tensors differ")
            with _unseen():
                other.data.copy_(one.reshape(other.shape))
        if received.call.defect is not None:
            with _unseen():
                received.call.defect([sent.call, received.call])
        received.call.source = sent.source
        self._finish([sent.call, received.call])

    def _finish(self, calls: Iterable[Call]) -> None:
        woken = []
        for call in calls:
            # Neither keeps the other, and with it all tensors, alive.
            call.done, call.operation = True, None
            if call.waiting:
                call.waiting = False
                woken.append(call.rank)
        self.run.wake(woken)

    def _differ(self, channel: Channel, one: Call, other: Call, why: str = "") -> None:
        what = f" ({why})" if why else ""
        both = sorted((one, other), key=lambda call: call.rank)
        failures = [
            RankFailure(call.rank, "CollectiveMismatch", f"calls {_full(call)}", "")
            for call in both
        ]
        members = _ranks(channel.ranks)
        self._fail(f"calls in the group of {members} do not fit each other{what}", failures)

    def _fail(self, headline: str, failures: list[RankFailure]) -> None:
        self.run.abandon(CollectiveMismatch(failures, headline))


def _take(
    queue: deque[Message] | None, source: int | None, tag: int, *, sender: bool
) -> Message | None:
    """Take the first message of a queue that fits; a receive without source fits every sender."""
    for message in queue or ():
        whom = message.source if sender else source
        given = source if sender else message.source
        if message.tag == tag and (whom is None or whom == given):
            queue.remove(message)  # type: ignore[union-attr]
            return message
    return None


def _misfit(kind: Kind, calls: list[Call]) -> Misfit | None:
    try:
        kind.fit(calls)
    except Misfit as misfit:
        return misfit
    return None


def _note(history: History, channel: Channel, call: Call, peer: int | None) -> None:
    tensors = call.inputs or call.outputs
    settings = _settings(call)
    if call.kind in ("send", "recv"):
        whom = "any" if peer is None else channel.ranks[peer]
        settings = f"to {whom}" if call.kind == "send" else f"from {whom}"
    records = history.records.setdefault(call.rank, [])
    call.number = len(records) + 1
    record = Record(
        number=call.number,
        operation=call.kind,
        group=channel.ranks,
        tensors=tuple(shape_text(tensor) for tensor in tensors),
        settings=settings,
        site=describe(call.site),
        elements=sum(tensor.numel() for tensor in call.inputs),
        phase=phase(),
        in_backward=torch._C._current_graph_task_id() != -1,
    )
    records.append(record)
    if call.asynchronous:
        history.begin(call.rank, record)


def _full(call: Call) -> str:
    return f"{call.text()} {_settings(call)}".rstrip() + f" at {describe(call.site)}"


def _settings(call: Call) -> str:
    """A reduction by its name, a root as `root 1`."""
    return " ".join(
        f"root {each}" if isinstance(each, int) else str(each) for each in call.settings
    )


def _unanswered(call: Call) -> str:
    operation = call.operation
    where = f" {operation.where()}{operation.missing()}" if operation is not None else ""
    return f"called {call.text()} at {describe(call.site)}{where}"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN])) + (", ..." if len(ranks) > _SHOWN else "")
    return f"rank{'s' * (len(ranks) != 1)} {shown}"
