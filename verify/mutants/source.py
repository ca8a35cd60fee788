"""A module's source as a syntax tree whose nodes know their text, and where code can be changed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

_NOT_COMPUTING = ("__repr__", "extra_repr")


@dataclass(frozen=True)
class Edit:
    """A span of the source, the text in its place, and in words what that makes wrong."""

    start: int
    end: int
    text: str
    wrong: str


class Source:
    """The text and the tree of a module. `parents` has the node above each."""

    def __init__(self, text: str) -> None:
        self.text, self.tree = text, ast.parse(text)
        self.parents = {
            child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)
        }
        self._lines = text.splitlines(keepends=True)
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))
        self.imports = {
            (alias.asname or alias.name).partition(".")[0]
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }

    def span(self, node: ast.expr | ast.stmt | ast.keyword) -> tuple[int, int]:
        """Where a node begins and ends in the text."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return (
            self._offset(node.lineno, node.col_offset),
            self._offset(node.end_lineno, node.end_col_offset),
        )

    def of(self, node: ast.expr | ast.stmt) -> str:
        """The text of a node."""
        start, end = self.span(node)
        return self.text[start:end]

    def line_at(self, offset: int) -> str:
        """The line that is at an offset, without its indentation."""
        first = self.text.rfind("\n", 0, offset) + 1
        return self.text[first:].partition("\n")[0].strip()

    def replaced(self, node: ast.expr | ast.stmt, text: str, wrong: str) -> Edit:
        """The edit that puts a text in the place of a node."""
        return Edit(*self.span(node), text, wrong)

    def swapped(self, one: ast.expr, other: ast.expr, wrong: str) -> Iterator[Edit]:
        """The edit that exchanges two nodes, the first of which comes first; none if they are
        equal."""
        if ast.dump(one) != ast.dump(other):
            (start, stop), (again, end) = self.span(one), self.span(other)
            between = self.text[stop:again]
            yield Edit(start, end, f"{self.of(other)}{between}{self.of(one)}", wrong)

    def nodes(self) -> Iterator[ast.expr | ast.stmt]:
        """The expressions and statements in functions that compute something: no docstrings,
        annotations and decorators, and nothing of an error's text."""
        for node in self.tree.body:
            yield from self._inside(node, function=None)

    def function(self, node: ast.AST) -> str:
        """The qualified name of the function that a node is in."""
        names = []
        above: ast.AST | None = node
        while above is not None:
            if isinstance(above, ast.FunctionDef | ast.ClassDef):
                names.append(above.name)
            above = self.parents.get(above)
        return ".".join(reversed(names))

    def lines(self, node: ast.expr | ast.stmt) -> range:
        """The lines of which one runs where a node does: those of its statement, without the
        statements in that; of a parameter, those of the function."""
        statement: ast.AST = node
        while not isinstance(statement, ast.stmt):
            statement = self.parents[statement]
        assert statement.end_lineno is not None
        body = getattr(statement, "body", None)
        if not body:
            return range(statement.lineno, statement.end_lineno + 1)
        if isinstance(statement, ast.FunctionDef):
            return range(body[0].lineno, statement.end_lineno + 1)
        return range(statement.lineno, max(body[0].lineno, statement.lineno + 1))

    def _offset(self, line: int, column: int) -> int:
        """The tree counts columns in bytes of UTF-8."""
        before = self._lines[line - 1].encode()[:column].decode()
        return self._starts[line - 1] + len(before)

    def _inside(self, node: ast.AST, function: ast.AST | None) -> Iterator[ast.expr | ast.stmt]:
        if isinstance(node, ast.Raise | ast.JoinedStr) or _is_docstring(node):
            return
        if isinstance(node, ast.keyword) and node.arg == "name":
            return
        if isinstance(node, ast.FunctionDef):
            if node.name in _NOT_COMPUTING:
                return
            for default in (*node.args.defaults, *node.args.kw_defaults):
                if default is not None:
                    yield from self._inside(default, node)
            for statement in node.body:
                yield from self._inside(statement, node)
            return
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                yield from self._inside(statement, None)
            return
        if isinstance(node, ast.AnnAssign):
            yield from self._inside(node.value, function) if node.value else ()
            return
        if function is not None and isinstance(node, ast.expr | ast.stmt):
            yield node
        for child in ast.iter_child_nodes(node):
            yield from self._inside(child, function)


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
