"""Private copies of packages, in which the source of a module may be another.

The copies live beside the originals in one process. While they are imported, and again for the
length of every import statement that their own code executes later, they take the originals' place
in `sys.modules`; the rest of the time nothing shows that they exist. What is not covered: code of a
copy that calls `importlib.import_module`, or that looks itself up in `sys.modules`.
"""

from __future__ import annotations

import builtins
import importlib
import linecache
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import decode_source
from pathlib import Path
from threading import RLock
from types import CodeType, ModuleType
from typing import Any

from verify.errors import HarnessError
from verify.mutants.generated import Generated
from verify.mutants.history import Historic
from verify.mutants.mutant import Mutant

_LOCK = RLock()
_ABSENT = object()
_HARNESS = "verify"
_CODES: dict[tuple[str, int], CodeType] = {}

Change = Callable[[str], str]


def import_mutated(module: str, mutant: Mutant | Generated | Historic) -> ModuleType:
    """A private copy of `module`, a target's, and of all that it and the mutant's module belong to,
    with the mutant in it.

    Copied are the top packages of both, but of the harness the target's own module only. Raises
    HarnessError where the snippet does not occur once, or the target does not import the mutant's
    module; and what the import raises.
    """
    tops = {name: name.partition(".")[0] for name in (module, mutant.module)}
    packages = {module if top == _HARNESS else top for top in tops.values()}
    copies = PrivateCopies(packages, {mutant.module: mutant.applied_to}, label=mutant.name)
    found = copies.import_module(module)
    if mutant.module not in copies.modules:
        raise HarnessError(
            f"mutant {mutant.name}: importing {module} does not import a copy of {mutant.module}"
        )
    return found


class PrivateCopies(MetaPathFinder):
    """Copies of `packages`, in which `changes` give other source for modules by name.

    Tracebacks show the changed source, under the name of its file with `@label` at the end.
    """

    def __init__(self, packages: set[str], changes: Mapping[str, Change], *, label: str) -> None:
        self.packages, self.changes, self.label = frozenset(packages), changes, label
        self.modules: dict[str, ModuleType] = {}
        self._inside = False

    def import_module(self, name: str) -> ModuleType:
        """The private copy of a module of the packages."""
        with self._in_place():
            return importlib.import_module(name)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where the original is, with a loader that makes a copy of it."""
        if not self._covers(name):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = self._loader(name, spec, spec.loader)
                return spec
        return None

    def _loader(self, name: str, spec: ModuleSpec, loader: Loader) -> Loader:
        if name not in self.changes:
            return _Copied(loader, self._import)
        source = self.changes[name](_source_of(spec, self.label))
        return _Copied(_Changed(source, f"{spec.origin}@{self.label}"), self._import)

    def _covers(self, name: str) -> bool:
        return any(name == each or name.startswith(f"{each}.") for each in self.packages)

    def _import(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """`__import__` for the code of the copies, and for what it calls that is not Python: that
        may import often, and what has nothing to do with the copies."""
        top = name.partition(".")[0]
        if top and all(top != each.partition(".")[0] for each in self.packages):
            return builtins.__import__(name, *args, **kwargs)
        with self._in_place():
            return builtins.__import__(name, *args, **kwargs)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The copies in place of the originals in `sys.modules`, and on the packages above them."""
        with _LOCK:
            if self._inside:
                yield
                return
            originals, links = self._exchange(self.modules, self._links(self.modules))
            sys.meta_path.insert(0, self)
            self._inside = True
            try:
                yield
            finally:
                self._inside = False
                sys.meta_path.remove(self)
                self.modules, _ = self._exchange(originals, links)

    def _links(self, modules: Mapping[str, ModuleType]) -> dict[str, object]:
        """What the packages above hold of the packages, if these modules are in place."""
        return {package: modules.get(package, _ABSENT) for package in self.packages}

    def _exchange(
        self, modules: Mapping[str, ModuleType], links: Mapping[str, object]
    ) -> tuple[dict[str, ModuleType], dict[str, object]]:
        """Put these modules and links in place; what was there before."""
        before = {name: module for name, module in sys.modules.items() if self._covers(name)}
        for name in before:
            del sys.modules[name]
        sys.modules.update(modules)
        return before, {package: _link(package, links[package]) for package in self.packages}


def _link(package: str, wanted: object) -> object:
    """Set, or remove if absent, a package as an attribute of the one above; what it was."""
    above, _, attribute = package.rpartition(".")
    parent = sys.modules.get(above)
    if parent is None:
        return _ABSENT
    had = vars(parent).pop(attribute, _ABSENT)
    if wanted is not _ABSENT:
        setattr(parent, attribute, wanted)
    return had


def _source_of(spec: ModuleSpec, label: str) -> str:
    if not spec.has_location or not str(spec.origin).endswith(".py"):
        raise HarnessError(f"mutant {label}: {spec.name} has no source to change")
    return decode_source(Path(str(spec.origin)).read_bytes())


class _Copied(Loader):
    """Another loader, with an `__import__` of its own for the module's code."""

    def __init__(self, original: Loader, importer: Callable[..., Any]) -> None:
        self.original, self.importer = original, importer

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": self.importer}
        if isinstance(self.original, InspectLoader):
            exec(_code_of(self.original, module.__name__), module.__dict__)
        else:
            # pytest's, which rewrites assertions, keeps the code to itself.
            self.original.exec_module(module)

    def get_source(self, name: str) -> str | None:
        """For tracebacks, which ask the loader where a file cannot be read."""
        return self.original.get_source(name) if isinstance(self.original, InspectLoader) else None


def _code_of(loader: InspectLoader, name: str) -> CodeType:
    """The code of a module, compiled once for all copies while its file stays as it is."""
    if not isinstance(loader, SourceFileLoader):
        code = loader.get_code(name)
    else:
        path = loader.get_filename(name)
        key = path, os.stat(path).st_mtime_ns
        code = _CODES.get(key) or loader.get_code(name)
        if code is not None:
            _CODES[key] = code
    if code is None:
        raise HarnessError(f"{name} has no code to copy")
    return code


class _Changed(InspectLoader):
    """A module from text, and the name of the file under which tracebacks show it."""

    def __init__(self, source: str, filename: str) -> None:
        self.source, self.filename = source, filename
        lines = source.splitlines(keepends=True)
        linecache.cache[filename] = (len(source), None, lines, filename)

    def get_source(self, name: str) -> str:
        return self.source

    def get_code(self, name: str) -> CodeType:
        return compile(self.source, self.filename, "exec", dont_inherit=True)
