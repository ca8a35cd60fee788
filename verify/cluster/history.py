"""What every rank communicated, in its order: to look at, to keep, and to compare."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from verify.errors import BadArgument


class _Present(threading.local):
    """The phase that the calling rank is in."""

    phase: str = ""


_PRESENT = _Present()


def mark(phase: str) -> None:
    """From now on this rank's records belong to a phase of its program, as `forward`."""
    _PRESENT.phase = phase


def phase() -> str:
    """The phase that this rank marked last."""
    return _PRESENT.phase


def step_phase(step: int) -> str:
    """The phase of a training step, counted from 0."""
    return f"step {step}"


def mark_step(step: int) -> None:
    """From now on this rank is in a training step, counted from 0: for adapters of targets that
    train in one call, so that a check can tell their steps apart."""
    mark(step_phase(step))


_COLUMNS = ("number", "operation", "group", "tensors", "settings", "site")


@dataclass(frozen=True)
class Record:
    """One call of one rank. `group` are global ranks; `tensors` are what is sent, or else what is
    received, as `float32 [2, 3]`; `elements` counts what is sent; `site` is the place of the call;
    `phase` is what the program marked last; `in_backward` says whether autograd was at work."""

    number: int
    operation: str
    group: tuple[int, ...]
    tensors: tuple[str, ...]
    settings: str
    site: str
    elements: int = 0
    phase: str = ""
    in_backward: bool = False

    @property
    def what(self) -> tuple[object, ...]:
        """All but where it was called and as which."""
        return self.operation, self.group, self.tensors, self.settings


@dataclass
class History:
    """The records of every rank, filled by a run that is given it: `cluster.run(..., history=h)`.

    Where the run failed it holds what was called until then. `under_way` are, for every rank, the
    asynchronous calls by number that it has not waited for; they are neither saved nor compared.
    """

    records: dict[int, list[Record]] = field(default_factory=dict)
    under_way: dict[int, dict[int, Record]] = field(default_factory=dict, compare=False)

    def begin(self, rank: int, record: Record) -> None:
        """An asynchronous call, which is to be waited for."""
        self.under_way.setdefault(rank, {})[record.number] = record

    def waited(self, rank: int, number: int) -> None:
        """A call was waited for."""
        mine = self.under_way.get(rank, {})
        mine.pop(number, None)
        if not mine:
            self.under_way.pop(rank, None)

    def of(self, rank: int) -> list[Record]:
        """A rank's records in its order; empty for a rank that communicated nothing."""
        return self.records.get(rank, [])

    def first_difference(self, other: History) -> tuple[int, Record | None, Record | None] | None:
        """The lowest rank that called something else in another run, and its first differing
        records (None where it had none left); None where all are the same."""
        for rank in sorted({*self.records, *other.records}):
            mine, theirs = self.of(rank), other.of(rank)
            for i in range(max(len(mine), len(theirs))):
                one = mine[i] if i < len(mine) else None
                two = theirs[i] if i < len(theirs) else None
                if one is None or two is None or one.what != two.what:
                    return rank, one, two
        return None

    def table(self, rank: int) -> str:
        """A rank's records as text, one line each."""
        rows = [_COLUMNS, *(_row(record) for record in self.of(rank))]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)

    def save(self, path: Path) -> None:
        """Write all records as JSON."""
        data = {str(rank): [asdict(each) for each in of] for rank, of in self.records.items()}
        path.write_text(json.dumps({"shardproof_history": 1, "ranks": data}))

    @staticmethod
    def load(path: Path) -> History:
        """What `save` wrote. Raises BadArgument for a file that is not that."""
        try:
            data = json.loads(path.read_text())
            ranks = data["ranks"]
            return History({int(r): [_record(each) for each in of] for r, of in ranks.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadArgument(f"history: {path} is no history: {error}") from error


def _record(data: Mapping[str, Any]) -> Record:
    # Histories of before it was kept do not have it.
    data = {"in_backward": False, **data}
    values = {each.name: data[each.name] for each in fields(Record)}
    group, tensors = tuple(values.pop("group")), tuple(values.pop("tensors"))
    return Record(group=group, tensors=tensors, **values)


def _row(record: Record) -> tuple[str, ...]:
    group = ",".join(map(str, record.group))
    return (
        str(record.number),
        record.operation,
        group,
        ", ".join(record.tensors),
        record.settings,
        record.site,
    )
