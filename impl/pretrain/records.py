"""The steps of a run as JSON lines in a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Record:
    """A step: the mean loss of its tokens before the update, the norm of the gradients before
    clipping, the learning rate of the first group, and how long it took."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    consumed: int
    seconds: float


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
        try:
            found.append(Record(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"log: line {number} of {path} is no step of a run; give another file"
            ) from error
    return found


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
