"""The factors of a case, each with a value: the sizes of its layout, its arithmetic, its options.

A pair is two factors of one case with their values; a row is all factors of one case.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import combinations

from verify.case import Case

Row = Mapping[str, str]
Pair = tuple[str, str, str, str]
"""Factor, value, factor, value; the factors in the order of the alphabet."""

AXES = ("tp", "cp", "pp", "dp", "ep", "etp", "vpp")
FIXED = (*AXES, "sp", "lens", "dtype")


def row_of(case: Case, defaults: Mapping[str, object]) -> dict[str, str]:
    """The factors of a case; options that it leaves out are at these defaults. Without experts the
    size of their tensor parallelism is none of them."""
    layout = case.layout
    sizes = {axis: getattr(layout, axis) for axis in AXES} | {"etp": layout.expert_tp}
    fixed = {**sizes, "sp": layout.sequence_parallel, "lens": case.lens, "dtype": case.dtype}
    if layout.etp is None and layout.ep == 1 and "etp" not in defaults:
        del fixed["etp"]
    return {name: text_of(value) for name, value in {**defaults, **fixed, **case.options}.items()}


def text_of(value: object) -> str:
    """A value as reports have it: `on` and `off` for a switch."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def pair_of(one: str, value: str, other: str, its: str) -> Pair:
    """Two factors with their values, in order."""
    return (one, value, other, its) if one < other else (other, its, one, value)


def pairs_of(row: Row) -> Iterator[Pair]:
    """All pairs of a row."""
    for (one, value), (other, its) in combinations(sorted(row.items()), 2):
        yield one, value, other, its


def alone(factor: str, value: str) -> Pair:
    """In the place of a pair, a value whatever it may be with."""
    return factor, value, "", ""


def told(pair: Pair) -> str:
    """`dtype=bfloat16 with tp=3`, or `tp=3` of a value alone."""
    one, value, other, its = pair
    return f"{one}={value}" + f" with {other}={its}" * bool(other)


def row_key(concept: str, row: Row) -> str:
    """A row as a text that is the same for equal rows."""
    return json.dumps([concept, dict(sorted(row.items()))], separators=(",", ":"))


def row_from(key: str) -> tuple[str, dict[str, str]]:
    """The concept and the row of a text of `row_key`."""
    concept, row = json.loads(key)
    return concept, row
