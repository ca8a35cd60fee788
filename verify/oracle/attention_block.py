"""What a block may do to queries and keys before attention: normalise, and turn by position."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from verify.case import Case
from verify.errors import BadArgument
from verify.oracle.contract import Tensors
from verify.oracle.norm import normalised
from verify.oracle.positions import BASE, rotated
from verify.oracle.terms import exclude, one_of, switches

IN_BLOCKS = ("norm", "rotary", "interleaved")
NORMS = ("none", "rms", "layer")


def norm_weights(case: Case, features: Mapping[str, int]) -> dict[str, tuple[int]]:
    """The weights, and for layer norms biases, of norms of so many features, by the option `norm`.

    Raises BadArgument for an unknown norm.
    """
    kind = one_of(case, "norm", NORMS)
    parts = {"none": (), "rms": ("weight",), "layer": ("weight", "bias")}[kind]
    return {f"{name}.{part}": (size,) for name, size in features.items() for part in parts}


def in_norm(case: Case, x: Tensor, parameters: Tensors, name: str) -> Tensor:
    """`x` [..., features] normalised as the option `norm` says."""
    kind = one_of(case, "norm", NORMS)
    if kind == "none":
        return x
    return normalised(x, parameters, f"{name}.", kind=kind, zero_centered=False)


def check_rotary(case: Case, size: int) -> None:
    """Raise BadArgument for the option `rotary` with heads whose features are no pairs, and for
    pairs that are `interleaved` where none turn."""
    on = _switches(case)
    if on["interleaved"] and not on["rotary"]:
        exclude(case, "interleaved", True, why="rotary is off; the two go together")
    if on["rotary"] and size % 2:
        raise BadArgument(f"case.options.rotary: {size} features of a head are not pairs")


def positioned(case: Case, x: Tensor) -> Tensor:
    """`x` [sequence, batch, heads, features] turned, where the option `rotary` is on; with
    `interleaved` the pairs are neighbours."""
    on = _switches(case)
    if not on["rotary"]:
        return x
    places = torch.arange(x.shape[0], dtype=torch.float64)
    return rotated(x, places, dim=None, base=BASE, interleaved=on["interleaved"])


def _switches(case: Case) -> dict[str, bool]:
    return switches(case, {"rotary": False, "interleaved": False})
