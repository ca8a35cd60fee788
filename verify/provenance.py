"""What a report says of where it comes from: versions, platform, and the target as it was."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

from verify.targets import load_target

_DISTRIBUTIONS = ("torch", "hypothesis", "pytest", "numpy")


def shardproof_version() -> str:
    """The version of this harness; `unknown` where it is not installed."""
    return _version("shardproof")


def versions() -> dict[str, str]:
    """Python and the distributions that decide what a case computes."""
    return {"python": platform.python_version()} | {d: _version(d) for d in _DISTRIBUTIONS}


def machine() -> str:
    """The platform in words."""
    return platform.platform()


def target_facts(name: str) -> dict[str, Any]:
    """A target's name, version, and what in this run is not its own code."""
    target = load_target(name)
    return {
        "name": name,
        "version": target.version(),
        "stand_ins": list(target.stand_ins()),
    }


def changes(recorded: Mapping[str, str]) -> list[str]:
    """How the versions of a report differ from those here, one phrase each."""
    here = {"shardproof": shardproof_version(), **versions()}
    return [
        f"{name} {version} then, {here[name]} now"
        for name, version in recorded.items()
        if name in here and here[name] != version
    ]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
