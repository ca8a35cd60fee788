"""Operators on decisions: a condition turned around, a bound moved, a flag that is the other way, a
refusal that does not happen."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from verify.mutants.source import Edit, Source

Node = ast.expr | ast.stmt

_BOUNDS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}
_EQUALITIES = {ast.Eq: "!=", ast.NotEq: "=="}
_FLAGS = ("sequence_parallel",)
# Of zip: it asserts what holds. Of a collective: waited for where it begins, it computes the same.
_NEUTRAL = ("strict", "async_op")


def is_refusal(node: ast.If) -> bool:
    """Whether nothing but a refusal depends on a condition."""
    return all(isinstance(each, ast.Raise) for each in node.body) and not node.orelse


def accept(node: Node, source: Source) -> Iterator[Edit]:
    """What is wrong is not refused."""
    if isinstance(node, ast.If) and is_refusal(node):
        wrong = f"Accepted: {' '.join(source.of(node.test).split())}."
        yield source.replaced(node.test, "False", wrong)


def flip(node: Node, source: Source) -> Iterator[Edit]:
    """A condition is turned around."""
    tests = []
    if isinstance(node, ast.IfExp) or (isinstance(node, ast.If) and not is_refusal(node)):
        tests.append(node.test)
    if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.DictComp | ast.SetComp):
        tests += [test for each in node.generators for test in each.ifs]
    for test in tests:
        wrong = f"Turned around: {' '.join(source.of(test).split())}."
        yield source.replaced(test, f"(not ({source.of(test)}))", wrong)


def other_bound(node: Node, source: Source) -> Iterator[Edit]:
    """A comparison takes in what is equal, or no longer does."""
    if not isinstance(node, ast.Compare):
        return
    before = node.left
    for operator, after in zip(node.ops, node.comparators, strict=True):
        if (sign := _BOUNDS.get(type(operator))) is not None:
            yield _between(before, after, sign, source, "A bound is in instead of out, or out.")
        before = after


def other_equality(node: Node, source: Source) -> Iterator[Edit]:
    """What is equal counts as different."""
    if not isinstance(node, ast.Compare) or len(node.ops) != 1:
        return
    above = source.parents[node]
    turned = isinstance(above, ast.If | ast.IfExp | ast.comprehension) and not (
        isinstance(above, ast.If) and is_refusal(above)
    )
    if (sign := _EQUALITIES.get(type(node.ops[0]))) is not None and not turned:
        yield _between(node.left, node.comparators[0], sign, source, "Equality is turned around.")


def _between(one: ast.expr, other: ast.expr, sign: str, source: Source, wrong: str) -> Edit:
    return Edit(source.span(one)[1], source.span(other)[0], f" {sign} ", wrong)


def other_connective(node: Node, source: Source) -> Iterator[Edit]:
    """And is or, or is and; of masks too."""
    if isinstance(node, ast.BoolOp):
        word = " or " if isinstance(node.op, ast.And) else " and "
        text = word.join(f"({source.of(each)})" for each in node.values)
        yield source.replaced(node, f"({text})", f"It is{word}what should be the other.")
    masks = {ast.BitAnd: "|", ast.BitOr: "&"}
    if isinstance(node, ast.BinOp) and type(node.op) in masks:
        sign = masks[type(node.op)]
        text = f"(({source.of(node.left)}) {sign} ({source.of(node.right)}))"
        yield source.replaced(node, text, f"It is {sign} between masks.")


def not_negated(node: Node, source: Source) -> Iterator[Edit]:
    """A negation is left out."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
        above = source.parents[node]
        if not (isinstance(above, ast.If | ast.IfExp | ast.comprehension)):
            yield source.replaced(node, f"({source.of(node.operand)})", "A negation is left out.")


def other_flag(node: Node, source: Source) -> Iterator[Edit]:
    """A constant flag, or sequence parallelism that is handed on, is the other way."""
    above = source.parents[node]
    if isinstance(above, ast.keyword) and above.arg in _NEUTRAL:
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield source.replaced(node, str(not node.value), f"A flag is {not node.value}.")
    if isinstance(node, ast.Constant) or not isinstance(above, ast.keyword):
        return
    if above.arg in _FLAGS:
        text = f"(not ({source.of(node)}))"
        yield source.replaced(node, text, f"{above.arg} is handed on turned around.")


OPERATORS = {
    "accept": accept,
    "flip": flip,
    "other-bound": other_bound,
    "other-equality": other_equality,
    "other-connective": other_connective,
    "not-negated": not_negated,
    "other-flag": other_flag,
}
