"""Operators on communication: a collective dropped or repeated, over another group, by another
reduction; a rank taken for another; a gradient left out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from verify.kinds import KINDS
from verify.mutants.source import Edit, Source

Node = ast.expr | ast.stmt

_NAMES = re.compile(
    r"(start_|_)?(all_reduce|all_gather|reduce_scatter|all_to_all|broadcast|copy_to|reduce_from"
    r"|scatter_to|gather_from|split)(_.*)?"
)
_SUMS = re.compile(r"(all_reduce|reduce_scatter|reduce_from|copy_to)(_.*)?")
# Its result has the shape of what goes in, so that it can be done twice.
_REPEATABLE = re.compile(r"(all_reduce|all_to_all|reduce_from|copy_to)(_.*)?")


def _name(call: ast.Call) -> str:
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr if isinstance(function.value, ast.Name) else ""
    return function.id if isinstance(function, ast.Name) else ""


def _of_dist(call: ast.Call) -> bool:
    function = call.func
    return isinstance(function, ast.Attribute) and ast.dump(function.value) == _DIST


_DIST = ast.dump(ast.Name("dist", ast.Load()))


def _keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((each.value for each in call.keywords if each.arg == name), None)


def _collective(node: Node) -> ast.Call | None:
    """The node as a collective of a tensor: a call with a group, of a name that says so."""
    if not isinstance(node, ast.Call) or not node.args or _keyword(node, "group") is None:
        return None
    return node if _NAMES.fullmatch(_name(node)) else None


def _asynchronous(call: ast.Call) -> bool:
    return _keyword(call, "async_op") is not None


def drop(node: Node, source: Source) -> Iterator[Edit]:
    """A collective gives back its input."""
    call = _collective(node)
    if call is None or _name(call).startswith("start_"):
        return
    wrong = f"{_name(call)} is left out, and its input taken for its result."
    if _asynchronous(call):
        yield source.replaced(call, "None", wrong)
    elif isinstance(source.parents[call], ast.Expr):
        to, *others = (source.of(each) for each in call.args)
        yield source.replaced(call, f"{to}.copy_({others[0]})" if others else to, wrong)
    else:
        yield source.replaced(call, f"({source.of(call.args[0])})", wrong)


def repeat(node: Node, source: Source) -> Iterator[Edit]:
    """A collective is done to its own result."""
    call = _collective(node)
    if call is not None and _REPEATABLE.fullmatch(_name(call)) and not _of_dist(call):
        yield source.replaced(call.args[0], source.of(call), f"{_name(call)} is done twice.")


def average(node: Node, source: Source) -> Iterator[Edit]:
    """A sum over a group is an average."""
    call = _collective(node)
    if call is None or not _SUMS.fullmatch(_name(call)) or _of_dist(call):
        return
    group = _keyword(call, "group")
    assert group is not None
    text = f"({source.of(call)} / ({source.of(group)}).size())"
    yield source.replaced(call, text, f"{_name(call)} averages.")


def other_reduction(node: Node, source: Source) -> Iterator[Edit]:
    """A reduction takes the maximum for the sum, or the minimum for the maximum."""
    if isinstance(node, ast.Attribute) and node.attr in ("SUM", "MAX", "MIN"):
        other = {"SUM": "MAX", "MAX": "MIN", "MIN": "MAX"}[node.attr]
        text = f"{source.of(node.value)}.{other}"
        yield source.replaced(node, text, f"A reduction is {other}, not {node.attr}.")


def other_group(node: Node, source: Source) -> Iterator[Edit]:
    """A call is given the world for a group, or groups of another kind."""
    if isinstance(node, ast.Call):
        group = _keyword(node, "group")
        if group is not None and not isinstance(group, ast.Constant):
            wrong = f"{source.of(node.func)} is given the world for its group."
            yield source.replaced(group, "None", wrong)
    kind = _kind(node, source)
    if kind is not None:
        other = "dp_cp" if kind == "tp" else "tp"
        text = (
            f"{source.of(node.value)}.{other}" if isinstance(node, ast.Attribute) else repr(other)
        )
        yield source.replaced(node, text, f"The group is that of {other}, not of {kind}.")


def _kind(node: Node, source: Source) -> str | None:
    """The kind of a group that a node names: `groups.tp`, or `"tp"` given to a method of groups."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.attr in KINDS:
        return node.attr if source.of(node.value).endswith("groups") else None
    above = source.parents.get(node)
    if isinstance(node, ast.Constant) and node.value in KINDS and isinstance(above, ast.Call):
        return str(node.value) if "groups." in source.of(above.func) else None
    return None


def other_rank(node: Node, source: Source) -> Iterator[Edit]:
    """A rank is taken for the first of its group, or for the one at its other end."""
    if isinstance(node, ast.Call) and _name(node) == "get_rank":
        text = source.of(node)
        size = text.replace("get_rank", "get_world_size", 1)
        yield source.replaced(node, "0", "Every rank takes itself for the first.")
        wrong = "Ranks count from the end."
        yield source.replaced(node, f"({size} - 1 - {text})", wrong)


def one_rank(node: Node, source: Source) -> Iterator[Edit]:
    """A group is taken to have one rank."""
    if isinstance(node, ast.Call) and _name(node) == "get_world_size":
        yield source.replaced(node, "1", "A group is taken to have one rank.")


def no_gradient(node: Node, source: Source) -> Iterator[Edit]:
    """A backward leaves out a gradient."""
    if not isinstance(node, ast.Return) or not source.function(node).endswith(".backward"):
        return
    value = node.value
    for place, each in enumerate(value.elts if isinstance(value, ast.Tuple) else ()):
        if not isinstance(each, ast.Constant):
            yield source.replaced(each, "None", f"Backward gives no gradient of input {place}.")


OPERATORS = {
    "drop-collective": drop,
    "repeat-collective": repeat,
    "average": average,
    "other-reduction": other_reduction,
    "other-group": other_group,
    "other-rank": other_rank,
    "one-rank": one_rank,
    "no-gradient": no_gradient,
}
