"""The pytest plugin: `pytest --pyargs properties --target NAME` checks a target.

A pytest run uses it if its arguments name the package `properties` or its files, or with
`-p shardproof`. In any other run it adds no option, no fixture and no hook that does anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

PACKAGE = "properties"
_HOME = Path(__file__).parent.parent / PACKAGE
NAME = "shardproof"


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Add the options of a run, where the run uses them."""
    config = pluginmanager.get_plugin("pytestconfig")
    if config is None or not is_used(config.invocation_params.args):
        return
    from verify.runner.options import PROFILES

    profiles = "; ".join(f"{name}: {each.meaning}" for name, each in PROFILES.items())
    group = parser.getgroup(NAME, "shardproof: check a parallel implementation")
    for name, dest, words in (
        ("--target", "target", "the implementation: impl, megatron-core, package.module:Target"),
        ("--suite", "suites", "suites to run, by name, separated by commas (default: all)"),
        ("--profile", "profile", f"how much is drawn. {profiles}"),
        ("--max-examples", "max_examples", "examples a property, instead of the profile's"),
        ("--seed", "seed", "the seed of everything that is drawn"),
        ("--cluster", "cluster", "what runs the ranks: sim, process, torchrun"),
        ("--device", "device", "where they compute: cpu, cuda"),
        ("--max-world-size", "max_world_size", "the most ranks that a case may have"),
        ("--lens", "lenses", "arithmetic, separated by commas: exact,fp64,native (default: all)"),
        ("--known", "known", "a file of findings that are known of the target and may fail"),
        ("--database", "database", "directory that keeps failing examples for --again"),
        ("--report", "report", "directory of the report (default: shardproof-report)"),
    ):
        group.addoption(name, dest=f"{NAME}_{dest}", metavar=name[2:].upper(), help=words)
    for name, dest, value, words in (
        ("--known-strict", "known_strict", True, "fail where a known finding no longer fails"),
        ("--again", "again", True, "run only the failing examples of --database"),
        ("--require-pairs", "require_pairs", True, "fail where a pair of values is not exercised"),
        (
            "--no-adversary",
            "adversary",
            False,
            "run what other clusters run: no adversary, and no machine stops",
        ),
    ):
        group.addoption(
            name, dest=f"{NAME}_{dest}", action="store_const", const=value, default=None, help=words
        )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Set the run up, where it is one."""
    if hasattr(config.option, f"{NAME}_target"):
        from verify.runner.pytest_run import set_up

        set_up(config)


def is_used(arguments: Sequence[str]) -> bool:
    """Whether arguments of pytest ask for the properties."""
    pairs = pairwise(arguments)
    if f"-p{NAME}" in arguments or ("-p", NAME) in pairs:
        return True
    return any(_names_properties(each, arguments) for each in arguments)


def _names_properties(argument: str, arguments: Sequence[str]) -> bool:
    path = argument.partition("::")[0]
    if PACKAGE not in path or path.startswith("-"):
        return False
    if "--pyargs" in arguments and path.split(".")[0] == PACKAGE:
        return True
    place = Path(path).resolve()
    return place == _HOME or _HOME in place.parents
