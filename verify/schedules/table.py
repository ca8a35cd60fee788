"""Tables of pipeline schedules as targets hand them out: plain data, read once and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from verify.errors import Mismatch

WORKS = ("forward", "backward", "input", "weight")
WAYS, CARRIED = ("send", "recv"), ("activation", "gradient")
# In units of one forward of a chunk: a backward takes twice as long, and splits into halves.
DURATIONS = {"forward": 1, "backward": 2, "input": 1, "weight": 1}


@dataclass(frozen=True)
class Compute:
    """A stage's work on a microbatch, on one of its chunks: `forward`, `backward`, or the parts of
    that, `input` (the gradient of the chunk's input) and `weight` (those of its parameters)."""

    work: str
    microbatch: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.work} of microbatch {self.microbatch} on chunk {self.chunk}"


@dataclass(frozen=True)
class Transfer:
    """A tensor sent to the stage `peer`, or received from it: the activation or the gradient of a
    microbatch, for the chunk `chunk` of the stage that receives it."""

    way: str
    what: str
    microbatch: int
    chunk: int
    peer: int

    def __str__(self) -> str:
        side = "to" if self.way == "send" else "from"
        what = f"{self.what} of microbatch {self.microbatch} for chunk {self.chunk}"
        return f"{self.way} of the {what} {side} stage {self.peer}"


@dataclass(frozen=True)
class Exchange:
    """Transfers that a stage begins together; it goes on when all are done."""

    transfers: tuple[Transfer, ...]


Step = Compute | Exchange
Table = tuple[tuple[Step, ...], ...]


def table_of(plain: Any) -> Table:
    """The table that plain data describes: a list of stages, each a list of steps, which are
    `[work, microbatch, chunk]` or `["exchange", [[way, what, microbatch, chunk, peer], ...]]`.

    Raises Mismatch for anything else.
    """
    return tuple(
        tuple(_step(step, f"stage {stage}, step {number}") for number, step in enumerate(steps))
        for stage, steps in enumerate(_list(plain, "the table"))
        for steps in (_list(steps, f"stage {stage}"),)
    )


def _step(plain: Any, where: str) -> Step:
    parts = _list(plain, where)
    if len(parts) == 2 and parts[0] == "exchange":
        return Exchange(tuple(_transfer(each, where) for each in _list(parts[1], where)))
    if len(parts) != 3 or parts[0] not in WORKS or not _numbers(parts[1:]):
        raise Mismatch(
            f"schedule: {where} is {plain!r}; it should be [work, microbatch, chunk], the work one"
            f" of {', '.join(WORKS)}, or ['exchange', transfers]"
        )
    return Compute(*parts)


def _transfer(plain: Any, where: str) -> Transfer:
    parts = _list(plain, where)
    named = len(parts) == 5 and parts[0] in WAYS and parts[1] in CARRIED
    if not named or not _numbers(parts[2:]):
        raise Mismatch(
            f"schedule: {where} has the transfer {plain!r}; it should be [{' or '.join(WAYS)},"
            f" {' or '.join(CARRIED)}, microbatch, chunk, peer]"
        )
    return Transfer(*parts)


def _list(plain: Any, where: str) -> Sequence[Any]:
    if not isinstance(plain, list | tuple):
        raise Mismatch(f"schedule: {where} is {plain!r}, no list")
    return plain


def _numbers(parts: Sequence[Any]) -> bool:
    return all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in parts)
