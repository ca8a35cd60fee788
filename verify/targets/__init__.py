"""Targets by name: the built-in ones, and `package.module:Class` for anybody's own."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from pathlib import Path

from verify.errors import BadArgument
from verify.target import Target

TARGETS = {
    "impl": "verify.targets.impl:Target",
    "megatron-core": "verify.targets.megatron_core:Target",
}

_METHODS = ("version", "stand_ins", "supports", "rank_state", "session")


@cache
def load_target(name: str) -> Target:
    """The target of a name in `TARGETS` or of `package.module:Class`, one object a process.

    Relative to the Python path, and then to the working directory. Raises BadArgument, in one line,
    for a name that is neither, a module that cannot be imported, and a class that is no target.
    """
    place = TARGETS.get(name, name)
    module_name, colon, attribute = place.partition(":")
    if not (colon and module_name and attribute):
        raise BadArgument(
            f"target: {name!r} is not one of {', '.join(TARGETS)}, nor package.module:Class"
        )
    found = getattr(_import(name, module_name), attribute, None)
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


def _import(name: str, module: str) -> object:
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        return import_module(module)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise BadArgument(f"target: {name!r}: cannot import {module}: {reason}") from error
    finally:
        if added:
            sys.path.remove(here)
