"""Layouts: the parallel sizes of a run and their order, and who is where. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from verify.errors import BadArgument

AXES = ("tp", "cp", "ep", "dp", "pp")
DEFAULT_ORDER = "tp-cp-ep-dp-pp"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Parallel sizes and their order. `order` is Megatron's: the leftmost axis varies fastest."""

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    vpp: int = 1
    sequence_parallel: bool = False
    order: str = DEFAULT_ORDER

    @property
    def world_size(self) -> int:
        """Number of ranks: tp * cp * dp * pp (ep and etp re-use them)."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each axis of the dense mesh, by name."""
        return {"tp": self.tp, "cp": self.cp, "dp": self.dp, "pp": self.pp}

    def coordinates(self, rank: int) -> dict[str, int]:
        """This rank's index on each axis of the dense mesh: tp, cp, dp, pp."""
        sizes, found = self.sizes, {}
        for axis in self.order.split("-"):
            if axis in sizes:
                rank, found[axis] = divmod(rank, sizes[axis])
        return found

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Layout:
        allowed = {f.name for f in fields(Layout)}
        if not isinstance(data, Mapping) or not set(data) <= allowed:
            raise BadArgument(f"layout: unknown fields {sorted(set(data) - allowed)}; allowed are {sorted(allowed)}")
        return Layout(**data)
