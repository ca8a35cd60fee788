"""Mutants that are generated from the source of a target, one for each place and operator.

Their names, `MODULE:LINE:OPERATOR`, with `:2` and so on where an operator applies more than once
to a line, are stable while the source is; as a target each is `impl@generated:NAME`. Left out is
what compiles to the same code as the target, or as another mutant.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

from verify.errors import BadArgument, HarnessError
from verify.mutants.operators import OPERATORS
from verify.mutants.packages import full_name, short_modules_of
from verify.mutants.source import Edit, Source

PREFIX = "generated:"


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A generated defect of one place of a module. `family` is the operator; `function` is where
    the place is, `line` the text of the line that it begins in, `snippet` its own, and it is the
    `nth` of those that are alike in all that. One of `lines` runs if the place does."""

    name: str
    family: str
    wrong: str
    module: str
    function: str
    line: str
    nth: int
    snippet: str
    replacement: str
    lines: range
    start: int
    original: str

    def applied_to(self, source: str) -> str:
        """The mutated source. Raises HarnessError unless `source` is what it was made from."""
        if source != self.original:
            raise HarnessError(f"mutant {self.name}: {self.module} is not as it was")
        end = self.start + len(self.snippet)
        return source[: self.start] + self.replacement + source[end:]


def generate(package: str, modules: tuple[str, ...] = ()) -> list[Generated]:
    """The mutants of a package, or of these modules and packages in it, in the order of the source.
    They are named without the package."""
    return [
        mutant
        for name, path in short_modules_of(package).items()
        if not modules or any(is_in(name, each) for each in modules)
        for mutant in _of_module(package, name, path).values()
    ]


def require_modules(package: str, names: Iterable[str], *, option: str) -> None:
    """Raise BadArgument, of this option, for a name of no module of a package, nor of a package in
    it; they are named without the package."""
    known = short_modules_of(package)
    for name in names:
        if not any(is_in(each, name) for each in known):
            close = get_close_matches(name, known, n=3) or sorted(known)
            raise BadArgument(f"{option}: {name!r} is no module of {package}; {', '.join(close)}")


def is_in(module: str, name: str) -> bool:
    """Whether a module is of this name, or in the package of this name."""
    return module == name or module.startswith(f"{name}.")


def find_generated(package: str, name: str) -> Generated:
    """The mutant of a name without its prefix. Raises BadArgument where there is none."""
    module = name.partition(":")[0]
    known = short_modules_of(package)
    found = _of_module(package, module, known[module]) if module in known else {}
    if name not in found:
        close = get_close_matches(name, found, n=3, cutoff=0.5)
        hint = (
            f"did you mean {', '.join(close)}?" if close else "see shardproof mutants --generated"
        )
        raise BadArgument(f"target: {package} has no generated mutant {name!r}; {hint}")
    return found[name]


@cache
def _of_module(package: str, short: str, path: Path) -> dict[str, Generated]:
    source = Source(path.read_text(encoding="utf-8"))
    seen = {_code(compile(source.tree, str(path), "exec", dont_inherit=True))}
    counts: Counter[object] = Counter()
    found = {}
    for node, operator, edit in _edits(source):
        base = f"{short}:{node.lineno}:{operator}"
        mutated = source.text[: edit.start] + edit.text + source.text[edit.end :]
        code = _code(_compiled(mutated, path, base))
        if code in seen:
            continue
        seen.add(code)
        counts[base] += 1
        name = base if counts[base] == 1 else f"{base}:{counts[base]}"
        function, line = source.function(node), source.line_at(edit.start)
        snippet = source.text[edit.start : edit.end]
        alike = function, line, operator, snippet, edit.text
        counts[alike] += 1
        found[name] = Generated(
            name=f"{PREFIX}{name}",
            family=operator,
            wrong=edit.wrong,
            module=full_name(package, short),
            function=function,
            line=line,
            nth=counts[alike],
            snippet=snippet,
            replacement=edit.text,
            lines=source.lines(node),
            start=edit.start,
            original=source.text,
        )
    return found


def _edits(source: Source) -> Iterator[tuple[ast.expr | ast.stmt, str, Edit]]:
    for node in source.nodes():
        for operator, edits in OPERATORS.items():
            for edit in edits(node, source):
                yield node, operator, edit


def _compiled(text: str, path: Path, name: str) -> CodeType:
    try:
        return compile(text, str(path), "exec", dont_inherit=True)
    except SyntaxError as error:
        raise HarnessError(f"mutant {name}: an operator made what is no Python: {error}") from error


def _code(code: CodeType) -> Any:
    """What a code object does, without where it is in its file."""
    constants = tuple(
        _code(each) if isinstance(each, CodeType) else (type(each), repr(each))
        for each in code.co_consts
    )
    names = (code.co_name, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return code.co_code, constants, names, code.co_argcount, code.co_kwonlyargcount
