"""The suites of properties: what is in the package `properties`, read without importing it."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from verify.errors import HarnessError

PACKAGE = "properties"


@dataclass(frozen=True)
class Suite:
    """One file of properties: its name, the first paragraph of its docstring, and its properties by
    name with the first paragraphs of theirs."""

    name: str
    summary: str
    properties: dict[str, str]


def suites() -> list[Suite]:
    """Every suite, by name."""
    return [_read(path) for path in _files()]


def suite_names() -> list[str]:
    """The names of all suites."""
    return [_name(path) for path in _files()]


def _files() -> list[Path]:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise HarnessError(f"the package {PACKAGE} is not installed; install shardproof again")
    folders = map(Path, found.submodule_search_locations)
    return sorted(path for folder in folders for path in folder.glob("test_*.py"))


def _name(path: Path) -> str:
    return path.stem.removeprefix("test_")


def _read(path: Path) -> Suite:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return Suite(_name(path), _first_paragraph(tree), dict(_properties(tree)))


def _properties(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.name.removeprefix("test_"), _first_paragraph(node)


def _first_paragraph(node: ast.Module | ast.FunctionDef) -> str:
    return " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
