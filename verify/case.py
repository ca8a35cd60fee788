"""A case: one drawn example, JSON-serialisable and enough to replay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from verify.adversary import NONE, Adversary
from verify.errors import BadArgument
from verify.layout import Layout

Lens = Literal["exact", "fp64", "native"]
LENSES: tuple[Lens, ...] = ("exact", "fp64", "native")
DTYPES = ("float64", "float32", "bfloat16", "float16")
Option = bool | int | float | str | None
# Of every concept; verify/lens.py and verify/misfit.py say what they do to the tensors.
HARNESS_OPTIONS = ("strides", "zeros", "magnitude", "misfit")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One example of a property.

    `concept` names the thing under test (`column_linear`), `shape` its sizes, `options` its
    switches; `lens` and `dtype` the arithmetic; every tensor is generated from
    `(seed, tensor name, replica)`. `adversary` is what the `sim` cluster does to the run besides.
    """

    concept: str
    layout: Layout
    shape: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Option] = field(default_factory=dict)
    lens: Lens = "fp64"
    dtype: str = "float64"
    seed: int = 0
    adversary: Adversary = NONE

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON types from which `from_json` makes an equal case."""
        return {
            "concept": self.concept,
            "layout": self.layout.to_json(),
            "shape": dict(self.shape),
            "options": dict(self.options),
            "lens": self.lens,
            "dtype": self.dtype,
            "seed": self.seed,
            "adversary": self.adversary.to_json(),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Case:
        """The case that `to_json` described. Raises BadArgument naming the first wrong field."""
        if not isinstance(data, Mapping):
            raise BadArgument(f"case: expected an object, got {type(data).__name__}")
        allowed = {f.name for f in fields(Case)}
        if set(data) != allowed:
            missing, foreign = sorted(allowed - set(data)), sorted(set(data) - allowed)
            raise BadArgument(f"case: missing fields {missing}, unknown fields {foreign}")
        if data["lens"] not in LENSES:
            raise BadArgument(f"case.lens: {data['lens']!r} is not one of {', '.join(LENSES)}")
        if data["dtype"] not in DTYPES:
            raise BadArgument(f"case.dtype: {data['dtype']!r} is not one of {', '.join(DTYPES)}")
        layout, adversary = Layout.from_json(data["layout"]), data["adversary"]
        return Case(**{**data, "layout": layout, "adversary": Adversary.from_json(adversary)})

    def __str__(self) -> str:
        words = [self.concept, f"on {self.layout}"]
        words += [f"{name}={value}" for name, value in (*self.shape.items(), *self.options.items())]
        words += [f"under {self.adversary}"] if self.adversary else []
        return " ".join([*words, f"[{self.lens} {self.dtype} seed={self.seed}]"])
