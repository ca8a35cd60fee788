"""The campaign on disk: units that are done, in an append-only journal, and what they reported.

campaign.json, index.html, failures/   the merged report
journal.jsonl                          one line a unit that is done, after its report is there
units/SUITE-SEED.json                  its report, as `shardproof run` wrote it
examples/                              Hypothesis' database of the failing examples
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from verify.campaign.plan import Plan, Unit
from verify.errors import BadArgument
from verify.report.files import read, write_text

Examples = Mapping[str, str]

_JOURNAL, _UNITS, _EXAMPLES = "journal.jsonl", "units", "examples"


class Journal:
    """What is known of a campaign in a directory. One process writes it at a time."""

    def __init__(self, folder: Path, plan: Plan, *, resume: bool) -> None:
        """Open it. Raises BadArgument where there is one and it is not to be resumed, or is of
        other options, and where there is none to resume."""
        self.folder, self.path = folder, folder / _JOURNAL
        head = {"campaign": plan.identity()}
        self.done: dict[Unit, bool] = {}
        if self.path.exists() != resume:
            raise BadArgument(
                f"--resume: {folder} has no campaign; leave --resume out to start one"
                if resume
                else f"--report: {folder} has a campaign; go on with --resume, or name another"
            )
        lines = self._whole_lines() if resume else []
        if lines:
            self._take(lines, head)
        self._stream = self.path_opened()
        if not lines:
            self._append(head)

    def path_opened(self) -> Any:
        """The journal, open for appending, made with its directory where it is not there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def finish(self, unit: Unit, document: Mapping[str, Any], examples: Examples) -> None:
        """Keep what a unit reported and found, and then note that it is done."""
        for name, content in examples.items():
            path = self.folder / _EXAMPLES / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(content))
        write_text(self._report(unit), json.dumps(document, indent=1) + "\n")
        self._append({"unit": unit.to_json(), "lost": False})
        self.done[unit] = False

    def lose(self, unit: Unit, reason: str) -> None:
        """Note that a unit could not be done; resumed, it is tried again."""
        self._append({"unit": unit.to_json(), "lost": True, "reason": reason})

    def documents(self) -> Iterator[tuple[Unit, dict[str, Any]]]:
        """What every unit reported that was done before. Raises BadArgument for a report that was
        removed or changed."""
        for unit in self.done:
            if not unit.again:
                yield unit, read(self._report(unit))

    def examples(self) -> dict[str, str]:
        """Every failing example, by its path in the database."""
        return read_examples(self.folder / _EXAMPLES)

    def _report(self, unit: Unit) -> Path:
        return self.folder / _UNITS / f"{unit.name}.json"

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(entry) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _whole_lines(self) -> list[str]:
        """The lines of the journal; half a line at its end, of a writer that was killed, is cut."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("r+b") as stream:
                stream.truncate(len(whole))
        return whole.decode().splitlines()

    def _take(self, lines: list[str], head: Mapping[str, Any]) -> None:
        try:
            first, *entries = map(json.loads, lines)
            before = first["campaign"]
            units = {Unit(**entry["unit"]): entry["lost"] for entry in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise BadArgument(
                f"--resume: {self.path} is no journal of a campaign, or damaged: {error}"
            ) from error
        if before != head["campaign"]:
            raise BadArgument(
                f"--resume: {self.folder} is a campaign with {' '.join(before)}; give the same"
                " options, or another --report"
            )
        self.done = {unit: False for unit, lost in units.items() if not lost}


def read_examples(folder: Path) -> dict[str, str]:
    """The files of a Hypothesis database in base64, by their paths in it."""
    return {
        str(path.relative_to(folder)): base64.b64encode(path.read_bytes()).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
