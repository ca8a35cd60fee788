"""What is left in a folder by a program that is stopped at any moment while it writes there.

A process that is killed leaves what it gave to the file system. A machine that stops leaves of that
what was flushed, and of the rest anything. That is the model of Pillai et al., All File Systems Are
Not Created Equal (OSDI 2014), of what programs may rely on:

- names are made, given to something else and removed by whole operations: a file is renamed or is
  not. After fsync of a folder the operations on its names have happened; before that, any of them
  may have happened without the others;
- a file has what it had when fsync of it returned, or what was written since, or half of that, or
  nothing.

A `Disk` looks at a folder before and after every call of Python by which files are opened, flushed,
renamed or removed, in every thread of this process. So it sees what other code has written too
(safetensors in Rust, torch in C++), though not in how many steps.

Flushes are those by `os.fsync`, `os.fdatasync` and `os.sync`. What is flushed otherwise (files
opened with O_SYNC or O_DSYNC, `mmap.flush`, other languages), or by one of these that was imported
by its name before anything was watched, is taken for not flushed.
"""

from __future__ import annotations

import builtins
import io
import os
import random
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from verify.errors import HarnessError

_CHANGING: tuple[tuple[Any, str], ...] = (
    *((os, name) for name in ("open", "mkdir", "rename", "replace", "unlink", "remove", "rmdir")),
    *((os, name) for name in ("link", "symlink", "truncate", "ftruncate")),
    (builtins, "open"),
    (io, "open"),
)
_FLUSHING: tuple[tuple[Any, str], ...] = tuple(
    (os, name) for name in ("fsync", "fdatasync", "sync")
)
# How likely it is that a content that was not flushed is there, one of these each time.
_LIKELY = (0.0, 0.5, 0.5, 1.0)
_MOST_SAID = 3

_Key = tuple[int, int, int]
_Names = dict[tuple["_Node", str], "_Node"]


@dataclass(eq=False)
class _Node:
    """A file, a folder or a link, whatever its names: the moments from which on it had what, and
    those at which what was flushed."""

    kind: int
    contents: list[tuple[int, bytes]] = field(default_factory=list)
    flushed: list[tuple[int, bytes]] = field(default_factory=list)


@dataclass(eq=False)
class _Change:
    """An operation before moment `made`: in a folder, a name is another node's now, or nobody's."""

    names: list[tuple[_Node, str, _Node | None]]
    made: int
    flushed: int | None = None

    @property
    def renames(self) -> bool:
        """Whether something has another name now."""
        return len(self.names) > 1

    def __str__(self) -> str:
        taken = [name for _, name, node in self.names if node is None]
        given = [name for _, name, node in self.names if node is not None]
        return " -> ".join((*taken, *given)) if given else f"that {', '.join(taken)} is gone"


@dataclass(frozen=True)
class Stop:
    """When a program was stopped, in words, and whether it had `ended` what it was to do. Of files
    that it had not closed when it ended, `left_open` is the name of one."""

    text: str
    ended: bool
    left_open: str


class Disk:
    """The disk under the folder `root`, with all that is there when this is made."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._restart()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at what is done while inside. HarnessError where another disk of this process is
        being watched."""
        if not _Present.taken.acquire(blocking=False):
            raise HarnessError("one disk at a time can be watched, and another one is")
        # Not every system has all of them.
        every = (each for each in (*_CHANGING, *_FLUSHING) if hasattr(*each))
        plain = [(place, name, getattr(place, name)) for place, name in every]
        _Present.disk = self
        try:
            for place, name, call in plain:
                setattr(place, name, partial(_watched, (place, name) in _FLUSHING, call, name))
            yield
        finally:
            _Present.disk = None
            for place, name, call in plain:
                setattr(place, name, call)
            _Present.taken.release()
        self._look()

    def pass_over(self) -> None:
        """No stop is before what is done next."""
        self._first = len(self._calls) - 1

    def stop(self, numbers: random.Random, *, machine: bool) -> Stop:
        """Make the folder what is left of it by a process that was killed at a drawn moment, or by
        a machine that stopped then."""
        last = len(self._calls) - 1
        at = self._moment(numbers, last)
        left = self._left_by_machine if machine else self._left_by_process
        names, contents, lost = left(at, numbers)
        who = "the machine stopped" if machine else "the run was killed"
        text = f"{who} after {at - self._first} of {last - self._first} file operations"
        text += f" (the last one: {self._calls[at]})" if at > self._first else ""
        text += f" without {', '.join(lost[:_MOST_SAID])}" if lost else ""
        left_open = self._open()
        for path in self.root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        _write(self.root, self._top, names, contents)
        self._restart()
        return Stop(text, ended=at == last, left_open=left_open)

    def _open(self) -> str:
        """The name of something that this process, and no other, has open; empty for nothing."""
        found = [""]
        for number in os.listdir("/dev/fd"):
            # The one of the list itself is closed.
            with suppress(OSError):
                node = self._live.get(_key(os.fstat(int(number))))
                found += [] if node is None else [_name(self._names, node)]
        return found[-1]

    def _moment(self, numbers: random.Random, last: int) -> int:
        """Any moment; or one just after something was renamed, or what was there before written to,
        by which what is new comes into force; or the last one."""
        first = self._first
        turning = [each.made for each in self._changes if each.renames and each.made > first]
        for node in self._live.values():
            moments = [made for made, _ in node.contents]
            turning += [made for made in moments[1:] if made > first >= moments[0]]
        kind = numbers.randrange(8)
        if kind < 2:
            return last
        return numbers.choice(turning) if kind < 6 and turning else numbers.randint(first, last)

    def _restart(self) -> None:
        """What is there is on the disk."""
        self._top = _Node(stat.S_IFDIR)
        self._live: dict[_Key, _Node] = {}
        self._names: _Names = {}
        self._changes: list[_Change] = []
        # Of every moment, what was done before it.
        self._calls: list[str] = []
        self._first = 0
        self._look()
        self._calls = [""]
        for node in self._live.values():
            node.flushed = list(node.contents)
        for change in self._changes:
            change.flushed = 0

    def _changing(self, call: Callable[..., Any], name: str, *args: Any, **named: Any) -> Any:
        paths = [os.fspath(each) for each in args[:2] if isinstance(each, str | os.PathLike)]
        # A relative one may be of a folder that is open.
        if paths and not any(self._may_have(path) for path in paths):
            return call(*args, **named)
        said = f"{name}({', '.join(map(os.path.basename, paths[: 1 if name == 'open' else 2]))})"
        self._look()
        try:
            return call(*args, **named)
        finally:
            self._look(said)

    def _flushing(self, call: Callable[..., Any], name: str, *args: Any, **named: Any) -> Any:
        """Note what is flushed: all there is, or the file or folder that is given."""
        given = [*args, *named.values()][:1]
        keys = [_key(os.fstat(each if isinstance(each, int) else each.fileno())) for each in given]
        self._look()
        nodes = [self._live[key] for key in keys if key in self._live]
        if not nodes and name != "sync":
            return call(*args, **named)
        moment = len(self._calls)
        for node in nodes or self._live.values():
            node.flushed += [(moment, content) for _, content in node.contents[-1:]]
        for change in self._changes:
            folders = {folder for folder, _, _ in change.names}
            if change.flushed is None and (not nodes or folders & {*nodes}):
                change.flushed = moment
        self._calls.append(f"{name}({', '.join(_name(self._names, node) for node in nodes)})")
        # The disk is this object: to flush a file of it to a real one takes long.
        return None if nodes else call(*args, **named)

    def _may_have(self, path: str) -> bool:
        return not os.path.isabs(path) or Path(path).is_relative_to(self.root)

    def _look(self, said: str = "") -> None:
        """Note what is otherwise than before, by what was `said` to be done or by a write."""
        moment, contents = len(self._calls), dict[_Node, bytes]()
        live, names = {_key(os.stat(self.root)): self._top}, _Names()
        self._scan(os.fspath(self.root), self._top, live, names, contents)
        places = [at for at in {**self._names, **names} if self._names.get(at) is not names.get(at)]
        changes = [
            _Change([(*place, names.get(place)) for place in operation], moment)
            for operation in _operations(places, self._names, names)
        ]
        written = [n for n, c in contents.items() if not n.contents or n.contents[-1][1] != c]
        for node in written:
            node.contents.append((moment, contents[node]))
        self._changes += changes
        self._live, self._names = live, names
        if changes or written:
            writing = ", ".join((*map(str, changes), *(_name(names, node) for node in written)))
            self._calls.append(said or f"writing {writing}")

    def _scan(
        self,
        path: str,
        folder: _Node,
        live: dict[_Key, _Node],
        names: _Names,
        contents: dict[_Node, bytes],
    ) -> None:
        with os.scandir(path) as entries:
            found = list(entries)
        for entry in found:
            # Other processes may be writing here.
            with suppress(FileNotFoundError):
                key = _key(entry.stat(follow_symlinks=False))
                node = live.get(key) or self._live.get(key) or _Node(key[-1])
                if entry.is_symlink():
                    contents[node] = os.fsencode(os.readlink(entry.path))
                elif entry.is_file():
                    with io.FileIO(entry.path) as file:
                        contents[node] = file.readall()
                live[key] = names[folder, entry.name] = node
                if entry.is_dir(follow_symlinks=False):
                    self._scan(entry.path, node, live, names, contents)

    def _left_by_process(
        self, at: int, numbers: random.Random
    ) -> tuple[_Names, dict[_Node, bytes], list[str]]:
        """All of it; but for what it was just writing, which is cut."""
        names = _named([change for change in self._changes if change.made <= at])
        contents = {node: _latest(node.contents, at) for node in names.values()}
        written = [n for n in contents if any(made == at for made, _ in n.contents)]
        lost = []
        # What was made of several in one moment may have been whole before the last one was begun.
        during = self._first < at < len(self._calls) - 1
        if during and len(written) == 1 and numbers.random() < 1 / 2:
            contents[written[0]] = _half(contents[written[0]])
            lost = [f"half of {_name(names, written[0])}"]
        return names, contents, lost

    def _left_by_machine(
        self, at: int, numbers: random.Random
    ) -> tuple[_Names, dict[_Node, bytes], list[str]]:
        """What was flushed, and some of the rest."""
        made = [change for change in self._changes if change.made <= at]
        unsure = [each for each in made if each.flushed is None or each.flushed > at]
        # What has ended was to be flushed, all of it.
        all_of_it = at == len(self._calls) - 1 and numbers.random() < 1 / 2
        gone = unsure if all_of_it else _some(unsure, numbers)
        lost = [str(change) for change in made if change in gone]
        likely = numbers.choice(_LIKELY)
        names, contents = _named([change for change in made if change not in gone]), {}
        for node in names.values():
            now, flushed = _latest(node.contents, at), _latest(node.flushed, at)
            sure = now == flushed or not stat.S_ISREG(node.kind) or numbers.random() < likely
            contents[node] = now if sure else numbers.choice((flushed, _half(now), b""))
            if contents[node] != now:
                lost.append(f"the content of {_name(names, node)}")
        return names, contents, lost


class _Present:
    """The disk that is watched in this process."""

    taken = threading.Lock()
    disk: Disk | None = None


def _watched(
    flushes: bool, call: Callable[..., Any], name: str, /, *args: Any, **named: Any
) -> Any:
    """A call that the present disk sees. A module that is imported now may keep this for good."""
    disk = _Present.disk
    if disk is None:
        return call(*args, **named)
    return (disk._flushing if flushes else disk._changing)(call, name, *args, **named)


def _key(status: os.stat_result) -> _Key:
    return status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode)


def _operations(
    places: Sequence[tuple[_Node, str]], before: _Names, after: _Names
) -> list[list[tuple[_Node, str]]]:
    """Changed places by operation: what a node is called now and what it was called belong
    together."""
    found: list[tuple[set[_Node], list[tuple[_Node, str]]]] = []
    for place in places:
        nodes = {each for each in (before.get(place), after.get(place)) if each is not None}
        joined = [each for each in found if each[0] & nodes]
        found = [each for each in found if not each[0] & nodes]
        together = [at for _, group in joined for at in group]
        found.append((nodes.union(*(each for each, _ in joined)), [*together, place]))
    return [group for _, group in found]


def _some(changes: Sequence[_Change], numbers: random.Random) -> list[_Change]:
    """Some of them: each or not, all but one, one (as often one that renames), or all."""
    if not changes:
        return []
    renames = [change for change in changes if change.renames]
    one = numbers.choice(numbers.choice((changes, renames)) or changes)
    each_or_not = [change for change in changes if numbers.random() < 1 / 2]
    all_but_one = [change for change in changes if change is not one]
    return numbers.choice((each_or_not, all_but_one, [one], [one], list(changes)))


def _named(changes: Sequence[_Change]) -> _Names:
    """What has which name after these operations."""
    found: _Names = {}
    for folder, name, node in (each for change in changes for each in change.names):
        if node is None:
            found.pop((folder, name), None)
        else:
            found[folder, name] = node
    return found


def _latest(contents: Sequence[tuple[int, bytes]], at: int) -> bytes:
    return next((content for made, content in reversed(contents) if made <= at), b"")


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _name(names: _Names, node: _Node) -> str:
    return next((name for (_, name), each in names.items() if each is node), ".")


def _write(path: Path, folder: _Node, names: _Names, contents: dict[_Node, bytes]) -> None:
    """Make what is in a folder."""
    for (parent, name), node in names.items():
        if parent is not folder:
            continue
        if stat.S_ISDIR(node.kind):
            (path / name).mkdir()
            _write(path / name, node, names, contents)
        elif stat.S_ISLNK(node.kind):
            os.symlink(os.fsdecode(contents[node]), path / name)
        else:
            (path / name).write_bytes(contents[node])


__all__ = ["Disk", "Stop"]
