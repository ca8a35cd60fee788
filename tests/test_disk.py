"""What is left of what was written, for every way to write it."""

import os
import random
from pathlib import Path

import pytest

from verify.disk import Disk
from verify.errors import HarnessError

OLD, NEW = b"the old one", b"the new one"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def in_place(root: Path) -> None:
    (root / "file").write_bytes(NEW)
    _flush(root / "file")


def renamed(root: Path) -> None:
    (root / "draft").write_bytes(NEW)
    (root / "draft").replace(root / "file")
    _flush(root)


def flushed_and_renamed(root: Path) -> None:
    (root / "draft").write_bytes(NEW)
    _flush(root / "draft")
    (root / "draft").replace(root / "file")


def with_its_name(root: Path) -> None:
    flushed_and_renamed(root)
    _flush(root)


def nothing(root: Path) -> None:
    (root / "file").read_bytes()


def left(root: Path, write, *, machine: bool) -> set[tuple[bytes | None, bool]]:
    """All that may be in a file after a program that writes to it was stopped, and whether it had
    ended then."""
    found = set()
    for seed in range(150):
        place = root / f"{write.__name__}-{machine}-{seed}"
        place.mkdir()
        (place / "file").write_bytes(OLD)
        disk = Disk(place)
        with disk.watching():
            write(place)
        stop = disk.stop(random.Random(seed), machine=machine)
        file = place / "file"
        found.add((file.read_bytes() if file.exists() else None, stop.ended))
    return found


HALF = NEW[: len(NEW) // 2]
# What there may be while it is written, and when it was.
EXPECTED = {
    (nothing, False): (set(), {OLD}),
    (in_place, False): ({OLD, b"", HALF, NEW}, {NEW}),
    (renamed, False): ({OLD, NEW}, {NEW}),
    (nothing, True): (set(), {OLD}),
    (in_place, True): ({OLD, b"", HALF, NEW}, {NEW}),
    (renamed, True): ({OLD, b"", HALF, NEW}, {b"", HALF, NEW}),
    (flushed_and_renamed, True): ({OLD}, {OLD, NEW}),
    (with_its_name, True): ({OLD, NEW}, {NEW}),
}


@pytest.mark.parametrize(("write", "machine"), EXPECTED)
def test_what_is_left_of_a_file(tmp_path, write, machine):
    found = left(tmp_path, write, machine=machine)
    during, after = EXPECTED[write, machine]
    assert {content for content, ended in found if ended} == after
    assert {content for content, ended in found if not ended} == during


def test_a_new_folder_is_lost_with_all_in_it_unless_its_name_is_flushed(tmp_path):
    lost = set()
    for seed in range(40):
        place = tmp_path / str(seed)
        place.mkdir()
        disk = Disk(place)
        with disk.watching():
            (place / "folder").mkdir()
            (place / "folder" / "file").write_bytes(NEW)
            _flush(place / "folder" / "file")
            _flush(place / "folder")
        stop = disk.stop(random.Random(seed), machine=True)
        if stop.ended:
            lost.add((place / "folder" / "file").exists())
    assert lost == {True, False}


def test_what_stays_open_and_when_it_was_stopped_is_told(tmp_path):
    disk = Disk(tmp_path)
    with disk.watching():
        file = open(tmp_path / "file", "wb")  # noqa: SIM115
    with file:
        stop = disk.stop(random.Random(0), machine=False)
    assert stop.left_open == "file"
    assert "of 1 file operations" in stop.text
    assert disk.stop(random.Random(0), machine=False).left_open == ""
    # Nothing is watched any more.
    assert not hasattr(os.open, "func")


def test_all_is_flushed_by_sync_and_the_files_of_others_as_ever(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    root.mkdir()
    other.write_bytes(OLD)
    for seed in range(20):
        disk = Disk(root)
        with disk.watching():
            (root / "file").write_bytes(b"%d" % seed)
            os.sync()
            with open(other, "rb") as file:
                os.fsync(fd=file.fileno())
                os.fsync(file)
        if disk.stop(random.Random(seed), machine=True).ended:
            assert (root / "file").read_bytes() == b"%d" % seed


def test_one_disk_at_a_time_is_watched_and_what_outlives_that_watches_nothing(tmp_path):
    disk = Disk(tmp_path)
    before = os.fsync, open
    with disk.watching():
        kept = os.fsync
        with pytest.raises(HarnessError, match="one disk at a time"), Disk(tmp_path).watching():
            pass
        assert kept is os.fsync
    assert (os.fsync, open) == before
    with open(tmp_path / "file", "wb") as file:
        kept(file)
    assert disk.stop(random.Random(0), machine=False).ended
    assert not (tmp_path / "file").exists()
