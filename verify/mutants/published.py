"""Published defects of frameworks for parallel training, which mutants put back in `impl`.

They are read from `published.toml`, where each has an identifier, which a mutant that stands for it
has as `seen`. One that no mutant can stand for has the reason in its place.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from verify.errors import HarnessError

PATH = Path(__file__).with_name("published.toml")


@dataclass(frozen=True)
class Published:
    """A defect in few words, and where it was published; with a `reason`, why `impl` cannot have
    it."""

    title: str
    source: str
    reason: str = ""


def read_published(path: Path = PATH) -> dict[str, Published]:
    """All of them by identifier. Raises HarnessError, in one line, for a file that is not as it
    should be."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise HarnessError(f"published defects: cannot read {path}: {error}") from error
    return {name: _entry(name, each) for name, each in data.items()}


def _entry(name: str, data: Any) -> Published:
    known = {field.name for field in fields(Published)}
    given = set(data) if isinstance(data, dict) else set()
    missing = known - {"reason"} - given
    if missing or given - known or not all(type(each) is str and each for each in data.values()):
        raise HarnessError(
            f"published defects: {name} lacks {sorted(missing)}, has {sorted(given - known)} too"
            " many, or a value that is no text"
        )
    return Published(**data)
