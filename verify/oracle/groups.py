"""Who belongs with whom: every process group of a layout, by slicing an array of ranks.

Semantics are those that `megatron.core.parallel_state` 0.16.1 documents. Reads a layout's sizes and
its order, and shares no code with `verify.layout`'s arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from verify.layout import Layout

Ranks = tuple[int, ...]

_DENSE_AXES = {
    "tp": ("tp",),
    "cp": ("cp",),
    "dp": ("dp",),
    "pp": ("pp",),
    "dp_cp": ("dp", "cp"),
    "tp_cp": ("tp", "cp"),
    "tp_dp": ("tp", "dp"),
    "tp_dp_cp": ("tp", "dp", "cp"),
    "tp_pp": ("tp", "pp"),
}
_EXPERT_AXES = {
    "etp": ("tp",),
    "ep": ("ep",),
    "edp": ("dp",),
    "etp_ep": ("tp", "ep"),
    "etp_ep_pp": ("tp", "ep", "pp"),
}


def groups(layout: Layout) -> dict[str, list[Ranks]]:
    """Every group of every kind that a layout has, from its sizes and its order."""
    size = {"tp": layout.tp, "cp": layout.cp, "dp": layout.dp, "pp": layout.pp}
    world = prod(size.values())
    etp = size["tp"] if layout.etp is None else layout.etp
    edp = world // (etp * layout.ep * size["pp"])
    dense = _Mesh(layout.order, size)
    expert = _Mesh(layout.order, {"tp": etp, "ep": layout.ep, "dp": edp, "pp": size["pp"]})
    found = {name: dense.along(*axes) for name, axes in _DENSE_AXES.items()}
    found |= {name: expert.along(*axes) for name, axes in _EXPERT_AXES.items()}

    count = layout.optimizer_instances
    stages, replicas = found["pp"], found["edp"]
    found["embedding"] = stages[:, sorted({0, size["pp"] - 1})]
    found["position_embedding"] = stages[:, :1]
    found["dp_cp_intra"] = np.vstack(np.split(found["dp_cp"], count, axis=1))
    found["edp_intra"] = np.vstack(np.split(replicas, count, axis=1))
    found["optimizer_inter"] = np.vstack(
        [replicas[:, start :: edp // count] for start in range(edp // count)]
    )
    by_replica = np.vstack([expert.at("dp", index) for index in range(edp)])
    found["optimizer_intra"] = by_replica.reshape(count, -1)
    for level, length in enumerate(layout.hierarchical_cp or ()):
        inner = prod((layout.hierarchical_cp or ())[:level])
        blocks = found["cp"].reshape(-1, length, inner)
        found[f"hcp_{level}"] = blocks.swapaxes(1, 2).reshape(-1, length)
    return {kind: _rows(groups) for kind, groups in found.items()}


def _rows(groups: np.ndarray) -> list[Ranks]:
    return sorted(tuple(sorted(map(int, row))) for row in groups)


class _Mesh:
    """The ranks as an array with one dimension an axis, the slowest axis first."""

    def __init__(self, order: str, sizes: Mapping[str, int]) -> None:
        named = [axis for axis in order.split("-") if axis in sizes]
        self.axes = [axis for axis in sizes if axis not in named] + named[::-1]
        self.ranks = np.arange(prod(sizes.values())).reshape([sizes[a] for a in self.axes])

    def along(self, *names: str) -> np.ndarray:
        """One row a group of the ranks that differ along these axes only, ascending."""
        moved = [self.axes.index(name) for name in names]
        length = prod(self.ranks.shape[dim] for dim in moved)
        last = np.moveaxis(self.ranks, moved, range(-len(moved), 0))
        return np.sort(last.reshape(-1, length), axis=1)

    def at(self, name: str, index: int) -> np.ndarray:
        """The ranks at one index of an axis, as one row."""
        return self.ranks.take(index, axis=self.axes.index(name)).reshape(1, -1)
