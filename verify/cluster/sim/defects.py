"""Defects of communication: what goes wrong with the calls of one place of a program.

A place is a path of calls: the innermost line of a package that communicates, and those that led
there. The code of its innermost module has to be compiled under the name of its file with `@LABEL`
behind it, the label under which the defect is `planted`; so a program in which it is and one in
which it is not live in one process. All ranks go on as if nothing was wrong: members meet and
shapes fit, only the values that arrive are others. Whole numbers that are exchanged or sent are
left alone: they are sizes of what is sent next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import CodeType, FrameType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from verify.cluster.sim.collectives import KINDS, Reduction, split, write

if TYPE_CHECKING:
    from verify.cluster.sim.exchange import Call

Calls = Sequence["Call"]
# Files and lines, the innermost first.
Path = tuple[tuple[str, int], ...]

_MARK = ".py@"
_SUMS = ("sum", "avg", "premul_sum")
_REDUCING = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor")
_GATHERING = ("all_gather", "all_gather_into_tensor")
_EXCHANGING = ("all_to_all", "all_to_all_single")
_MESSAGE = "recv"


def _perform(calls: Calls) -> None:
    KINDS[calls[0].kind].perform(calls)


def _settled(calls: Calls, *, reduction: str) -> list[Call]:
    """The calls with another reduction."""
    return [replace(each, settings=(Reduction(reduction), *each.settings[1:])) for each in calls]


def _given(call: Call, inputs: Sequence[Tensor]) -> Call:
    return replace(call, inputs=inputs)


def _copied(call: Call) -> Call:
    """The call with inputs that stay what they are while outputs are written, which may be them."""
    return _given(call, [each.detach().clone() for each in call.inputs])


def _elsewhere(call: Call) -> Call:
    """The call with outputs of which nobody hears."""
    return replace(call, outputs=[torch.empty_like(each) for each in call.outputs])


def drop(calls: Calls) -> None:
    """Every member takes what it gives for what it gets."""
    if calls[0].kind == "broadcast":
        return
    given = [_copied(each) for each in calls]
    for member, call in enumerate(given):
        _alone(call, member, given)


def _alone(call: Call, member: int, calls: Calls) -> None:
    """What a member would get if all gave what it gives, and nothing were added up."""
    if call.kind in _EXCHANGING:
        _back(call)
        return
    like = [call if each == member else _elsewhere(call) for each in range(len(calls))]
    _perform(_settled(like, reduction="max") if call.kind in _REDUCING else like)


def _back(call: Call) -> None:
    """What is to be sent is what has come, as far as it goes."""
    given = torch.cat([each.reshape(-1) for each in call.inputs])
    for output in call.outputs:
        mine, given = given[: output.numel()], given[output.numel() :]
        write(output, torch.cat([mine, mine.new_zeros(output.numel() - len(mine))]).view_as(output))


def repeat(calls: Calls) -> None:
    """What is done is done once more, to its result."""
    _perform(calls)
    _perform([_given(each, [output.detach().clone() for output in each.outputs]) for each in calls])


def maximum(calls: Calls) -> None:
    """The greatest for the sum."""
    _perform(_settled(calls, reduction="max"))


def minimum(calls: Calls) -> None:
    """The least for the greatest."""
    _perform(_settled(calls, reduction="min"))


def total(calls: Calls) -> None:
    """The sum for the greatest, the least or the average."""
    _perform(_settled(calls, reduction="sum"))


def average(calls: Calls) -> None:
    """The average for the sum."""
    _perform(calls)
    for output in (each for call in calls for each in call.outputs):
        write(output, output / len(calls))


def without_last(calls: Calls) -> None:
    """The last member is in no group with the others: they get nothing of it, and it nothing of
    them."""
    given = [_copied(each) for each in calls]
    last = len(given) - 1
    neutral = given[0].inputs if _takes_one(given[0]) else None
    missing = [
        _given(each, neutral or [torch.zeros_like(one) for one in each.inputs]) for each in given
    ]
    _perform([*given[:last], replace(missing[last], outputs=_elsewhere(given[last]).outputs)])
    rest = [replace(each, outputs=_elsewhere(each).outputs) for each in missing[:last]]
    if _takes_one(given[0]):
        rest = [_given(each, given[last].inputs) for each in rest]
    _perform([*rest, given[last]])


def _takes_one(call: Call) -> bool:
    """Whether it takes one of several, to which zero would add another."""
    return call.kind in _REDUCING and call.settings[0].name not in _SUMS


def backwards(calls: Calls) -> None:
    """Members are counted from the last."""
    given = [_copied(each) for each in calls]
    if calls[0].kind in _EXCHANGING:
        for target, call in enumerate(given):
            parts = [_part(each, target, len(given)).reshape(-1) for each in reversed(given)]
            _back(_given(call, parts))
        return
    _perform(given[::-1])


def _part(call: Call, target: int, count: int) -> Tensor:
    """What a member sends another one."""
    if call.kind == "all_to_all":
        return call.inputs[target]
    return split(call.inputs[0], call.own[0], count)[target]


def other_root(calls: Calls) -> None:
    """What the first member has that is not the root, for what the root has."""
    (root,) = calls[0].settings
    given = [_copied(each) for each in calls]
    other = min(int(root == 0), len(given) - 1)
    for call in (each for member, each in enumerate(given) if member != root):
        for output, value in zip(call.outputs, given[other].inputs, strict=True):
            write(output, value)


def nothing(calls: Calls) -> None:
    """Zeros arrive for what was sent."""
    for output in calls[-1].outputs:
        write(output, torch.zeros_like(output))


def before(calls: Calls) -> None:
    """What a rank was sent the last time arrives, the first time what it is sent."""
    sent, received = calls
    assert sent.operation is not None
    passed = sent.operation.channel.passed
    now = [each.detach().clone() for each in sent.inputs]
    last = passed.get((sent.rank, received.rank), now)
    for output, value, its in zip(received.outputs, last, now, strict=True):
        write(output, (value if value.numel() == output.numel() else its).view_as(output))
    passed[sent.rank, received.rank] = now


@dataclass(frozen=True)
class Operator:
    """What is done in the place of calls that fit, and what is wrong with it, in a sentence."""

    carry: Callable[[Calls], None]
    wrong: str
    fits: Callable[[Call], bool]


def _of(*kinds: str) -> Callable[[Call], bool]:
    return lambda call: call.kind in kinds and _can_be_other(call)


def _reducing(*names: str) -> Callable[[Call], bool]:
    return lambda call: call.kind in _REDUCING and call.settings[0].name in names


def _can_be_other(call: Call) -> bool:
    """Whether other values are no other sizes, and parts have one shape where they change places;
    and of a reduction, whether it takes one of what is given, or adds."""
    if call.kind in _REDUCING:
        return call.settings[0].name in (*_SUMS, "max", "min")
    if call.kind in _GATHERING:
        return call.kind != "all_gather" or _even(call)
    return all(each.is_floating_point() for each in (*call.inputs, *call.outputs))


def _even(call: Call) -> bool:
    """Whether all that is given and got has one shape."""
    return len({each.shape for each in (*call.inputs, *call.outputs)}) == 1


def _can_be_repeated(call: Call) -> bool:
    if call.kind == "all_reduce":
        return bool(call.settings[0].name == "sum")
    return call.kind in _EXCHANGING and _can_be_other(call) and _even(call) and not any(call.own)


OPERATORS: Mapping[str, Operator] = {
    "drop": Operator(
        drop,
        "It is left out, and what is given taken for what is got.",
        _of(*_REDUCING, *_GATHERING, *_EXCHANGING, "broadcast"),
    ),
    "repeat": Operator(
        repeat,
        "It is done twice.",
        _can_be_repeated,
    ),
    "maximum": Operator(maximum, "The greatest is taken for the sum.", _reducing("sum", "avg")),
    "minimum": Operator(minimum, "The least is taken for the greatest.", _reducing("max")),
    "total": Operator(total, "All are added up.", _reducing("max", "min", "avg")),
    "average": Operator(average, "The sum is divided by the size.", _reducing("sum")),
    "without-last": Operator(
        without_last,
        "The last rank is in no group with the others.",
        _of(*_REDUCING, *_GATHERING, *_EXCHANGING),
    ),
    "backwards": Operator(
        backwards,
        "The ranks of the group are in the reverse order.",
        _of("reduce_scatter", "reduce_scatter_tensor", *_GATHERING, *_EXCHANGING),
    ),
    "other-root": Operator(other_root, "Another rank's is told than the root's.", _of("broadcast")),
    "nothing": Operator(nothing, "Zeros arrive for what is sent.", _of(_MESSAGE)),
    "before": Operator(before, "What arrives is what was sent before.", _of(_MESSAGE)),
}


@dataclass(frozen=True)
class Defect:
    """What is wrong with the calls at `path`, which is of at most `depth` lines below the folder
    `root`."""

    root: str
    path: Path
    depth: int
    operator: Operator


_planted: dict[str, Defect] = {}
_listeners: list[tuple[str, int, Callable[[Call, Path], None]]] = []


def plant(label: str, defect: Defect) -> None:
    """From now on the defect is in programs whose innermost module is of this label."""
    _planted[label] = defect


@contextmanager
def listening(root: str, depth: int, listener: Callable[[Call, Path], None]) -> Iterator[None]:
    """While inside, tell of every call with the paths of at most so many lines of files below
    `root`; an empty path of one that begins elsewhere."""
    entry = root, depth, listener
    _listeners.append(entry)
    try:
        yield
    finally:
        _listeners.remove(entry)


def meet(call: Call, frame: FrameType) -> None:
    """A call begins below this frame: tell those who listen, and note the defect at its place."""
    for root, depth, listener in _listeners:
        listener(call, _path(frame, root, depth))
    if not _planted or call.site is None:
        return
    defect = _planted.get(_file_of(call.site[0])[1])
    if defect is None or not defect.operator.fits(call):
        return
    if _path(frame, defect.root, defect.depth) == defect.path:
        call.defect = defect.operator.carry


def _path(frame: FrameType | None, root: str, depth: int) -> Path:
    found: list[tuple[str, int]] = []
    while frame is not None and len(found) < depth:
        name, _ = _file_of(frame.f_code)
        if name.startswith(root):
            found.append((name, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)


def _file_of(code: CodeType) -> tuple[str, str]:
    """The file of code and the label behind it, if there is one."""
    name, mark, label = code.co_filename.rpartition(_MARK)
    return (f"{name}.py", label) if mark else (label, "")
