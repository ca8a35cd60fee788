"""The modules of a package and where their source is, found without importing it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from verify.errors import HarnessError


def modules_of(package: str) -> dict[str, Path]:
    """The modules of a top package and of those in it, by name, and where their source is. Raises
    HarnessError where the package is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise HarnessError(f"the package {package} is not installed; install shardproof again")
    root = Path(next(iter(spec.submodule_search_locations)))
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = [package, *path.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def short_modules_of(package: str) -> dict[str, Path]:
    """The same by names without the package, which is `__init__` itself."""
    known = modules_of(package).items()
    return {name.removeprefix(package).removeprefix(".") or "__init__": at for name, at in known}


def full_name(package: str, short: str) -> str:
    """The name of a module of a package by that without it."""
    return package if short == "__init__" else f"{package}.{short}"
