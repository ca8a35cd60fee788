"""The steps of a run as JSON lines in a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Record:
    """A step: the mean loss of its tokens before the update, the norm of the gradients before
    clipping, the learning rate of the first group, and how long it took; whether the step was
    skipped because gradients overflowed, of which the norm is 0 then; and the mean losses of
    multi-token prediction."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    consumed: int
    seconds: float
    skipped: bool = False
    further: list[float] = dataclasses.field(default_factory=list)


def read_log(path: Path) -> list[Record]:
    """The records of a file of JSON lines, none if there is no file. ValueError for another file;
    a last line that was cut off is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"log: {path} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        found.append(_record(line, f"line {number} of {path}"))
    return found


def _record(line: str, where: str) -> Record:
    """What a line says. ValueError unless it has every field that has no default, no other than
    fields, and in each what it can have."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"log: {where} is no JSON; give the log of a run") from error
    fields = dataclasses.fields(Record)
    types = {field.name: str(field.type) for field in fields}
    needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    if not isinstance(values, dict) or not needed <= values.keys() <= types.keys():
        raise ValueError(
            f"log: {where} is no step of a run, which has {', '.join(types)}; give another file"
        )
    for name, value in values.items():
        kind, fits = _KINDS[types[name]]
        if not fits(value):
            raise ValueError(f"log: {where} has {name}={value!r}, no {kind}")
    return Record(**values)


def _is_number(value: object) -> bool:
    if isinstance(value, float):
        return True
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST


# Of fields by their types: what a value is, and whether one is that.
_KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "int": (
        f"whole number up to {LARGEST}",
        lambda value: isinstance(value, int) and _is_number(value),
    ),
    "float": ("number", _is_number),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "list[float]": (
        "list of numbers",
        lambda value: isinstance(value, list) and all(map(_is_number, value)),
    ),
}


def write_log(path: Path, records: Sequence[Record]) -> None:
    """A file of these records. ValueError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(map(line_of, records)), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"log: {path}: {error.strerror}") from error


def line_of(record: Record) -> str:
    """The line of a step."""
    return json.dumps(dataclasses.asdict(record)) + "\n"
