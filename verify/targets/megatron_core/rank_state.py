"""Which state megatron-core keeps once per process, found by reading its source, and its hand-over.

On a real cluster every rank is a process; in the `sim` cluster the ranks share one, so what a rank
writes into a module would be read by the next. Found here, in every imported module of a package:

* names that a function declares `global`;
* mutable module-level objects (dict, list, set, deque, an instance of the package's own classes)
  that some module of the package changes in place, through any name it is imported under;
* class attributes that a function assigns, as `Class.attribute = ...` or `cls.attribute = ...`,
  or changes in place, also through a name of its own for them.

A mutable object that no code changes is a constant and is left alone. `functools` caches and
function attributes (a `warned` flag) are listed as shared.
"""

from __future__ import annotations

import ast
import copy
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import is_not, itemgetter
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Literal

How = Literal["global", "in place", "class attribute", "shared"]

_ADD = frozenset({"add", "append", "appendleft", "extend", "insert", "setdefault", "update"})
_REMOVE = frozenset({"clear", "discard", "pop", "popitem", "popleft", "remove", "reset"})


@dataclass(frozen=True, order=True)
class Found:
    """One piece of process-global state: `owner` is a module's name, or `module.Class`."""

    owner: str
    name: str
    how: How

    def __str__(self) -> str:
        return f"{self.owner}.{self.name} ({self.how})"


class _Writes(ast.NodeVisitor):
    """The names that a module's functions write, gathered by how they are written."""

    def __init__(self) -> None:
        self.defined: set[str] = set()
        self.globals: set[str] = set()
        self.in_place: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self._classes: list[str] = []
        self._depth = 0
        # What a function calls an attribute by another name.
        self._names: dict[str, tuple[str, str]] = {}

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._classes.append(node.name)
        self.generic_visit(node)
        self._classes.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._depth += 1
        before, self._names = self._names, dict(self._names)
        self.generic_visit(node)
        self._names = before
        self._depth -= 1

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_Global(self, node: ast.Global) -> None:
        self.globals.update(node.names)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute) and node.func.attr in _ADD | _REMOVE:
            self._changed(node.func.value)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._assigned(target)
            if isinstance(target, ast.Name):
                self._named(target.id, node.value)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._assigned(node.target)
        self._changed(node.target)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._assigned(node.target)
        self.generic_visit(node)

    def visit_Delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            self._assigned(target)

    def _assigned(self, target: ast.expr) -> None:
        if isinstance(target, ast.Name) and not self._depth and not self._classes:
            self.defined.add(target.id)
        elif isinstance(target, ast.Tuple | ast.List):
            for element in target.elts:
                self._assigned(element)
        elif isinstance(target, ast.Subscript):
            self._changed(target.value)
        elif isinstance(target, ast.Attribute):
            self._changed(target.value)
            if isinstance(target.value, ast.Name) and self._depth:
                self._attribute(target.value.id, target.attr)

    def _named(self, name: str, value: ast.expr) -> None:
        self._names.pop(name, None)
        if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
            self._names[name] = (value.value.id, value.attr)

    def _attribute(self, owner: str, name: str) -> None:
        if owner == "cls" and self._classes:
            owner = self._classes[-1]
        self.attributes.add((owner, name))

    def _changed(self, value: ast.expr) -> None:
        """`value` is changed in place by a function, under its own name or as an attribute."""
        while isinstance(value, ast.Subscript):
            value = value.value
        if not self._depth:
            return
        if isinstance(value, ast.Name):
            self.in_place.add(value.id)
            if value.id in self._names:
                self._attribute(*self._names[value.id])
        elif isinstance(value, ast.Attribute):
            self.in_place.add(value.attr)
            if isinstance(value.value, ast.Name):
                self._attribute(value.value.id, value.attr)


def _writes(module: ModuleType) -> _Writes:
    found = _Writes()
    if module.__file__ is not None and module.__file__.endswith(".py"):
        found.visit(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
    return found


def _is_mutable(value: object, package: str) -> bool:
    if isinstance(value, dict | list | set | deque):
        return True
    kind = type(value)
    return kind.__module__.startswith(package) and not isinstance(value, type | FunctionType)


_IMMUTABLE = (type(None), bool, int, float, str, bytes, type, FunctionType, ModuleType)


def _class(path: str) -> type:
    module, _, name = path.rpartition(".")
    found = vars(sys.modules[module])[name]
    if not isinstance(found, type):
        raise TypeError(f"{path} is not a class")
    return found


def _holder(owner: str) -> Any:
    """The namespace of a module or a class; a module's may be written."""
    return vars(sys.modules[owner]) if owner in sys.modules else vars(_class(owner))


def modules_of(package: str) -> list[ModuleType]:
    """The imported modules of `package`, by name."""
    names = sorted(n for n in sys.modules if n == package or n.startswith(package + "."))
    return [sys.modules[name] for name in names]


def find(package: str) -> list[Found]:
    """All process-global state in the imported modules of `package`."""
    modules = modules_of(package)
    writes = {module.__name__: _writes(module) for module in modules}
    found = {each for module in modules for each in _in_module(module, package, writes)}
    return sorted(found | set(_aliases(found, modules)))


def _aliases(found: Iterable[Found], modules: Iterable[ModuleType]) -> Iterator[Found]:
    """Names under which other modules hold the same mutable object (`from state import QUEUE`)."""
    values = [_holder(each.owner)[each.name] for each in found if each.how != "shared"]
    objects = {id(value) for value in values if not isinstance(value, _IMMUTABLE)}
    for module in modules:
        for name, value in vars(module).items():
            if id(value) in objects and not name.startswith("__"):
                yield Found(module.__name__, name, _how(found, module.__name__, name))


def _how(found: Iterable[Found], owner: str, name: str) -> How:
    known = [each.how for each in found if (each.owner, each.name) == (owner, name)]
    return known[0] if known else "in place"


def _in_module(module: ModuleType, package: str, writes: dict[str, _Writes]) -> Iterator[Found]:
    own = writes[module.__name__]
    changed = {name for each in writes.values() for name in each.in_place}
    for name, value in vars(module).items():
        if name.startswith("__"):
            continue
        if name in own.globals:
            yield Found(module.__name__, name, "global")
        elif _is_mutable(value, package) and name in changed & own.defined:
            yield Found(module.__name__, name, "in place")
        elif hasattr(value, "cache_clear") and value.__module__ == module.__name__:
            yield Found(module.__name__, name, "shared")
    yield from _attributes(module, writes)


def _attributes(module: ModuleType, writes: dict[str, _Writes]) -> Iterator[Found]:
    """Attributes of the module's classes and functions that some module's functions write."""
    written = {pair for each in writes.values() for pair in each.attributes}
    for owner, name in written:
        value = vars(module).get(owner)
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if isinstance(value, type) and name in vars(value):
            yield Found(f"{module.__name__}.{owner}", name, "class attribute")
        elif isinstance(value, FunctionType) and name in vars(value):
            yield Found(f"{module.__name__}.{owner}", name, "shared")


class _Names:
    """Some globals of one module, or attributes of one class, read and written together."""

    def __init__(self, owner: str, names: Sequence[str]) -> None:
        self.owner, self.names = owner, tuple(names)
        self._class = None if owner in sys.modules else _class(owner)
        self._namespace = _holder(owner)
        # itemgetter returns a lone value bare, so a lone name is asked for twice.
        self._asked = self.names * 2 if len(self.names) == 1 else self.names
        self.read = partial(itemgetter(*self._asked), self._namespace)
        self.start = self.read()

    def write(self, values: tuple[Any, ...]) -> None:
        if self._class is None:
            self._namespace.update(zip(self._asked, values, strict=True))
        else:
            for name, value in zip(self.names, values, strict=False):
                setattr(self._class, name, value)


class GlobalState:
    """All found state of a package as one value, swapped at every hand-over.

    A rank starts with its own deep copies of what is mutable. What is immutable at the start (None,
    most often) is the same for all ranks until one assigns it: it is watched, and swapped from then
    on. `swapped()` says which names that has come to be.
    """

    def __init__(self, found: Iterable[Found]) -> None:
        self._swapped: list[_Names] = []
        self._watched: list[_Names] = []
        by_owner: dict[str, list[str]] = {}
        for each in found:
            if each.how != "shared":
                by_owner.setdefault(each.owner, []).append(each.name)
        for owner, names in by_owner.items():
            namespace = _holder(owner)
            fixed = [name for name in names if isinstance(namespace[name], _IMMUTABLE)]
            own = [name for name in names if name not in fixed]
            self._swapped += [_Names(owner, own)] if own else []
            self._watched += [_Names(owner, fixed)] if fixed else []
        self._copy_starts()

    def _copy_starts(self) -> None:
        """Copy at once, so that what is one object under several names stays one in each copy."""
        for each, start in zip(
            self._swapped, copy.deepcopy([each.start for each in self._swapped]), strict=True
        ):
            each.start = start

    def swapped(self) -> tuple[str, ...]:
        """The full names that have been swapped so far."""
        return tuple(f"{each.owner}.{name}" for each in self._swapped for name in each.names)

    def fresh(self) -> dict[_Names, tuple[Any, ...]]:
        """A new rank's own values of what is swapped so far; the rest is as at the start."""
        starts = copy.deepcopy([each.start for each in self._swapped])
        return dict(zip(self._swapped, starts, strict=True))

    def save(self) -> dict[_Names, tuple[Any, ...]]:
        """The running rank's values."""
        for each in self._watched:
            if any(map(is_not, each.read(), each.start)):
                self._watched = [other for other in self._watched if other is not each]
                self._swapped.append(each)
        return {each: each.read() for each in self._swapped}

    def load(self, value: object) -> None:
        """Put a rank's values in place."""
        values: dict[_Names, tuple[Any, ...]] = value  # type: ignore[assignment]
        for each in self._swapped:
            each.write(values.get(each, each.start))
