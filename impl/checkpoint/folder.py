"""Where checkpoints are: one folder each, which is there in full or not at all.

    FOLDER/latest                   the name of the newest one
           step-00000200/           a checkpoint
           .step-00000300.partial/  one that is being written, or never was finished

A draft is written and flushed to the disk, renamed, and only then named by `latest`, itself
replaced by renaming. So whenever a save is killed, `latest` names a checkpoint that is whole. The
file system is one that all ranks see.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

METADATA, LATEST = "metadata.json", "latest"


@dataclass(frozen=True)
class Draft:
    """A checkpoint called `name` that is being written, to `folder`."""

    root: Path
    name: str

    @property
    def folder(self) -> Path:
        """Where its files go."""
        return self.root / f".{self.name}.partial"

    @property
    def published(self) -> Path:
        """Where they will be."""
        return self.root / self.name

    def publish(self, metadata: str) -> None:
        """Make it the newest checkpoint, when all its other files are on the disk."""
        path = self.folder / METADATA
        path.write_text(metadata, encoding="utf-8")
        synchronise(path)
        synchronise(self.folder)
        self.folder.rename(self.published)
        synchronise(self.root)
        pointer = self.root / f".{LATEST}.partial"
        pointer.write_text(f"{self.name}\n", encoding="utf-8")
        synchronise(pointer)
        pointer.replace(self.root / LATEST)
        synchronise(self.root)


def begin_draft(root: Path, *, step: int) -> Draft:
    """An empty draft of a checkpoint after `step` steps, whose name no other has, in a folder whose
    name is on the disk; drafts that were never finished go away. One rank calls it, and no save may
    be under way."""
    _make(root)
    for left in root.glob(".step-*.partial"):
        shutil.rmtree(left)
    name = f"step-{step:08d}"
    while (root / name).exists():
        name = f"{name}-again"
    draft = Draft(root, name)
    draft.folder.mkdir()
    return draft


def _make(folder: Path) -> None:
    """Have a folder and its name on the disk, whether it is there or not; so with each one above it
    that is not there."""
    if not folder.parent.is_dir():
        _make(folder.parent)
    folder.mkdir(exist_ok=True)
    synchronise(folder.parent)


def find(folder: Path) -> Path:
    """The checkpoint that `folder` is, or the newest one in it. ValueError for none."""
    if (folder / METADATA).is_file():
        return folder
    pointer = folder / LATEST
    if not pointer.is_file():
        raise ValueError(
            f"checkpoint: {folder} has neither {LATEST} nor {METADATA}; give a folder that was"
            " saved to, or a checkpoint in it"
        )
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not name or Path(name).name != name or not (folder / name / METADATA).is_file():
        raise ValueError(
            f"checkpoint: {pointer} names {name[:40]!r}, and there is no such checkpoint; name"
            " another one"
        )
    return folder / name


def synchronise(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
