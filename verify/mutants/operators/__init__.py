"""Operators: what is done to a node of the source to make a mutant, by name in `OPERATORS`."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping

from verify.mutants.operators import collectives, conditions, tensors
from verify.mutants.source import Edit, Source

Operator = Callable[[ast.expr | ast.stmt, Source], Iterator[Edit]]

OPERATORS: Mapping[str, Operator] = {
    **collectives.OPERATORS,
    **tensors.OPERATORS,
    **conditions.OPERATORS,
}
