"""Operators on arithmetic and on where things are in a tensor: scales, signs, slices, dimensions,
constants, masks, and what comes first."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import TypeGuard

from verify.mutants.operators.conditions import is_refusal
from verify.mutants.source import Edit, Source

Node = ast.expr | ast.stmt

_SCALES = (ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)
_SCALING_METHODS = ("mul", "mul_", "div", "div_")
_MASKS = ("masked_fill", "masked_fill_", "where", "clamp", "clamp_")
_COPIES = ("contiguous", "clone", "detach")
# The first two arguments of these are not of one kind.
_UNEQUAL = ("isinstance", "getattr", "setattr", "hasattr", "setdefault", "zip", "enumerate")
_COMMUTATIVE = ("max", "min", "maximum", "minimum", "promote_types")


def drop_scale(node: Node, source: Source) -> Iterator[Edit]:
    """A factor or divisor is left out."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, _SCALES):
        wrong = f"{source.of(node.right)} is left out of a product or quotient."
        yield source.replaced(node, f"({source.of(node.left)})", _line(wrong))
    elif isinstance(node, ast.AugAssign) and isinstance(node.op, _SCALES):
        wrong = f"{source.of(node.target)} is not scaled by {source.of(node.value)}."
        yield source.replaced(node, "pass", _line(wrong))
    elif receiver := _receiver(node, _SCALING_METHODS):
        yield source.replaced(node, source.of(receiver), "A scale is left out.")


def other_sign(node: Node, source: Source) -> Iterator[Edit]:
    """A sum is a difference, a difference a sum, a negative positive."""
    signs = {ast.Add: "-", ast.Sub: "+"}
    if isinstance(node, ast.BinOp) and type(node.op) in signs:
        sign = signs[type(node.op)]
        text = f"(({source.of(node.left)}) {sign} ({source.of(node.right)}))"
        yield source.replaced(node, text, _line(f"A sign before {source.of(node.right)}."))
    elif isinstance(node, ast.AugAssign) and type(node.op) in signs:
        text = f"{source.of(node.target)} {signs[type(node.op)]}= {source.of(node.value)}"
        yield source.replaced(node, text, _line(f"A sign before {source.of(node.value)}."))
    elif _is_negative(node) and not isinstance(node.operand, ast.Constant):
        wrong = f"{source.of(node.operand)} is not negated."
        yield source.replaced(node, f"({source.of(node.operand)})", _line(wrong))


def swap_operands(node: Node, source: Source) -> Iterator[Edit]:
    """What is subtracted, divided or multiplied as a matrix changes sides."""
    signs = {ast.Sub: "-", ast.Div: "/", ast.FloorDiv: "//", ast.MatMult: "@"}
    if isinstance(node, ast.BinOp) and type(node.op) in signs:
        sign, left, right = signs[type(node.op)], source.of(node.left), source.of(node.right)
        text = f"(({right}) {sign} ({left}))"
        yield source.replaced(node, text, "Two operands are exchanged.")


def swap_arguments(node: Node, source: Source) -> Iterator[Edit]:
    """Two arguments of a call are exchanged: the first two, or neighbours whose names end alike."""
    if not isinstance(node, ast.Call):
        return
    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
    first = node.args[:2]
    if len(first) == 2 and name not in _UNEQUAL + _COMMUTATIVE and not any(map(_is_plain, first)):
        yield from source.swapped(first[0], first[1], f"Two arguments of {name} are exchanged.")
    for one, other in zip(node.keywords, node.keywords[1:], strict=False):
        if one.arg and other.arg and one.arg.split("_")[-1] == other.arg.split("_")[-1]:
            wrong = f"{one.arg} and {other.arg} are exchanged."
            yield from source.swapped(one.value, other.value, wrong)


def swap_items(node: Node, source: Source) -> Iterator[Edit]:
    """The first two items of a tuple or list are exchanged, or the names that they are given; not
    of one that has no order: of what is caught, of what something is one of, of names that are
    given the same, of what is looked at one by one to be refused."""
    if isinstance(node, ast.Tuple | ast.List) and len(node.elts) > 1:
        one, other = node.elts[:2]
        above = source.parents[node]
        unordered = (
            isinstance(above, ast.ExceptHandler)
            or _is_refused(node, above)
            or (isinstance(above, ast.Compare) and _is_searched(node, above))
            or (isinstance(above, ast.Assign) and _are_alike(above.value))
        )
        if not (unordered or isinstance(above, ast.Subscript)) and not (
            _is_plain(one) and _is_plain(other)
        ):
            yield from source.swapped(one, other, "The first two items are exchanged.")


def _is_refused(node: Node, above: ast.AST) -> bool:
    """Whether it is gone through by a loop that only refuses."""
    return (
        isinstance(above, ast.For)
        and above.iter is node
        and all(isinstance(each, ast.If) and is_refusal(each) for each in above.body)
    )


def _is_searched(node: Node, above: ast.Compare) -> bool:
    """Whether it is asked if something is one of these items."""
    return isinstance(above.ops[0], ast.In | ast.NotIn) and node in above.comparators


def _are_alike(value: ast.expr) -> bool:
    """Whether the first two of these values are the same: constants, or empty."""
    if not isinstance(value, ast.Tuple):
        return False
    first, second = value.elts[:2]
    plain = isinstance(first, ast.Constant) or not getattr(first, "elts", [first])
    return plain and ast.dump(first) == ast.dump(second)


def other_slice(node: Node, source: Source) -> Iterator[Edit]:
    """A slice begins or ends elsewhere: one further, one earlier, not at all."""
    if not isinstance(node, ast.Slice):
        return
    for bound, word, shift in ((node.lower, "begins", "+"), (node.upper, "ends", "-")):
        if bound is None:
            continue
        if not (isinstance(bound, ast.Constant) and bound.value == 0):
            yield source.replaced(bound, "", f"A slice {word} with the dimension.")
        text = f"({source.of(bound)}) {shift} 1"
        yield source.replaced(bound, text, f"A slice {word} one off.")


def first_part(node: Node, source: Source) -> Iterator[Edit]:
    """A part of a dimension is the first one."""
    if not isinstance(node, ast.Call) or not _receiver(node, ("narrow",)) or len(node.args) != 3:
        return
    if not isinstance(node.args[1], ast.Constant):
        yield source.replaced(node.args[1], "0", "A part is the first of its dimension.")


def drop_mask(node: Node, source: Source) -> Iterator[Edit]:
    """Nothing is masked."""
    if receiver := _receiver(node, _MASKS):
        assert isinstance(node, ast.Call)
        # torch.where(condition, a, b) has its receiver elsewhere.
        if source.of(receiver) == "torch":
            receiver = node.args[1]
        yield source.replaced(node, source.of(receiver), "Nothing is masked or bounded.")


def drop_copy(node: Node, source: Source) -> Iterator[Edit]:
    """No copy is made, or none that has its own place in memory or is out of autograd."""
    if receiver := _receiver(node, _COPIES):
        assert isinstance(node, ast.Call)
        assert isinstance(node.func, ast.Attribute)
        yield source.replaced(node, source.of(receiver), f"{node.func.attr} is left out.")


def leave_out(node: Node, source: Source) -> Iterator[Edit]:
    """A statement that is there for its effect is left out."""
    effect = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
        effect = True
    if isinstance(node, ast.AugAssign) and not isinstance(node.op, _SCALES):
        effect = True
    if effect and "super()" not in source.of(node):
        yield source.replaced(node, "pass", _line(f"Left out: {source.of(node)}."))


def other_constant(node: Node, source: Source) -> Iterator[Edit]:
    """A number is one more; as an argument or index, 0 is -1 and -1 is 0."""
    above = source.parents[node]
    value = _number(node)
    if value is None or _is_negative(above):
        return
    place = isinstance(above, ast.Call | ast.keyword | ast.Subscript)
    other = f"{value + 1}"
    if place and isinstance(value, int) and value in (0, -1):
        other = f"{-1 - value}"
    yield source.replaced(node, other, f"{value} is {other}.")


def _receiver(node: Node, methods: tuple[str, ...]) -> ast.expr | None:
    """What a method of these names is called on, where the node is such a call."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.value if node.func.attr in methods else None
    return None


def _number(node: Node) -> int | float | None:
    """The number that a node is, with its sign."""
    negative = _is_negative(node)
    inner = node.operand if _is_negative(node) else node
    value = inner.value if isinstance(inner, ast.Constant) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return -value if negative else value


def _is_negative(node: ast.AST) -> TypeGuard[ast.UnaryOp]:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)


def _is_plain(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant | ast.Starred | ast.UnaryOp)


def _line(text: str) -> str:
    return " ".join(text.split())


OPERATORS = {
    "drop-scale": drop_scale,
    "other-sign": other_sign,
    "swap-operands": swap_operands,
    "swap-arguments": swap_arguments,
    "swap-items": swap_items,
    "other-slice": other_slice,
    "first-part": first_part,
    "drop-mask": drop_mask,
    "drop-copy": drop_copy,
    "leave-out": leave_out,
    "other-constant": other_constant,
}
