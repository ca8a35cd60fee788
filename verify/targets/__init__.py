"""Targets by name: the built-in ones, `package.module:Class` for anybody's own, and for either
`NAME@MUTANT`, the same with a deliberate defect."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path

from verify.errors import BadArgument, HarnessError
from verify.mutants import find, import_mutated
from verify.target import Target

TARGETS = {
    "impl": "verify.targets.impl:Target",
    "megatron-core": "verify.targets.megatron_core:Target",
}

_KEPT = 8
_METHODS = ("version", "stand_ins", "supports", "rank_state", "session")


@lru_cache(maxsize=_KEPT)
def load_target(name: str) -> Target:
    """The target of a name in `TARGETS` or of `package.module:Class`, one object a process while it
    is one of those used last: of mutants there are hundreds, each of some megabytes.

    With `@MUTANT` behind it, a private copy of the target with that mutant of
    `verify.mutants.CATALOGUE` in it; the target itself is not affected.

    Relative to the Python path, and then to the working directory. Raises BadArgument, in one line,
    for a name that is neither, a module that cannot be imported, a class that is no target, and an
    unknown mutant; HarnessError for a mutant that does not fit the source.
    """
    base, at, label = name.partition("@")
    place = TARGETS.get(base, base)
    module_name, colon, attribute = place.partition(":")
    if not (colon and module_name and attribute):
        raise BadArgument(
            f"target: {name!r} is not one of {', '.join(TARGETS)}, nor package.module:Class"
        )
    if at:
        mutant = find(base, label)
        module = _import(name, module_name, lambda: import_mutated(module_name, mutant))
    else:
        module = _import(name, module_name, lambda: import_module(module_name))
    found = getattr(module, attribute, None)
    if found is None:
        raise BadArgument(f"target: {name!r}: module {module_name} has no {attribute!r}")
    missing = [part for part in _METHODS if not callable(getattr(found, part, None))]
    if not missing:
        found = found() if isinstance(found, type) else found
        missing = [] if isinstance(getattr(found, "name", None), str) else ["name"]
    if missing:
        raise BadArgument(
            f"target: {name!r} is not a target: it lacks {', '.join(missing)};"
            " see verify/target.py for what a target has"
        )
    return found


def _import(name: str, module: str, importer: Callable[[], object]) -> object:
    with _working_directory_importable():
        try:
            return importer()
        except HarnessError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise BadArgument(f"target: {name!r}: cannot import {module}: {reason}") from error


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)
