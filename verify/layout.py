"""Layouts: the parallel sizes of a run and their order, and who is where. Needs no torch.

Ranks are the points of two meshes over the same world. The dense mesh has the axes tp, cp, dp, pp;
the expert mesh, which only expert layers use, has etp, ep, edp, pp. In both the leftmost axis of
`order` varies fastest. Semantics are those of `megatron.core.parallel_state` 0.16.1, and sizes are
refused exactly where Megatron refuses them. A group of any kind is a sub-mesh, or a cut of one.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from math import gcd, prod
from typing import Any

from verify.errors import BadArgument
from verify.kinds import KINDS, Kind, Ranks

AXES = ("tp", "cp", "ep", "dp", "pp")
DEFAULT_ORDER = "tp-cp-ep-dp-pp"
DENSE = {"tp": "tp", "cp": "cp", "dp": "dp", "pp": "pp"}
EXPERT = {"tp": "etp", "ep": "ep", "dp": "edp", "pp": "pp"}

Steps = tuple[int, int]  # size and stride of an axis


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Parallel sizes and their order. `order` is Megatron's: the leftmost axis varies fastest.

    Axes of size one may be left out of `order`. `etp` None means `tp`. `hierarchical_cp` gives the
    levels of context parallelism, innermost first; `optimizer_instances` is Megatron's
    `num_distributed_optimizer_instances`. Raises BadArgument where a size does not fit.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    vpp: int = 1
    sequence_parallel: bool = False
    order: str = DEFAULT_ORDER
    optimizer_instances: int = 1
    hierarchical_cp: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.hierarchical_cp, list):
            object.__setattr__(self, "hierarchical_cp", tuple(self.hierarchical_cp))
        _check_types(self)
        _check_sizes(self)
        _check_order(self)
        _check_optimizer_instances(self)

    @staticmethod
    def for_world(world_size: int, **sizes: Any) -> Layout:
        """The layout of `world_size` ranks with these sizes; `dp` is what they leave.

        Raises BadArgument where the sizes do not divide the world.
        """
        _check_size("world_size", world_size)
        _check_names(sizes, "layout")
        model = Layout(**{name: sizes[name] for name in ("tp", "cp", "pp") if name in sizes})
        dp, rest = divmod(world_size, model.world_size)
        given = f"{world_size} ranks, tp={model.tp} cp={model.cp} pp={model.pp}"
        if rest:
            raise BadArgument(
                f"layout: {given}: tp*cp*pp = {model.world_size} must divide the number of ranks;"
                f" change a size, or use a multiple of {model.world_size} ranks"
            )
        if sizes.get("dp", dp) != dp:
            raise BadArgument(
                f"layout: {given}: dp={sizes['dp']!r} does not fit; leave it out or give {dp}"
            )
        return Layout(**{**sizes, "dp": dp})

    @property
    def world_size(self) -> int:
        """Number of ranks: tp * cp * dp * pp (ep and etp re-use them)."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each axis of the dense mesh, by name."""
        return {"tp": self.tp, "cp": self.cp, "dp": self.dp, "pp": self.pp}

    @property
    def expert_tp(self) -> int:
        """`etp`, or `tp` where it is not given."""
        return self.tp if self.etp is None else self.etp

    @property
    def edp(self) -> int:
        """Size of the expert data-parallel axis: what etp, ep and pp leave of the world."""
        return self.world_size // (self.expert_tp * self.ep * self.pp)

    @property
    def expert_sizes(self) -> dict[str, int]:
        """Size of each axis of the expert mesh, by name."""
        return {"etp": self.expert_tp, "ep": self.ep, "edp": self.edp, "pp": self.pp}

    @property
    def kinds(self) -> dict[str, Kind]:
        """`KINDS`, and one kind for each level of `hierarchical_cp`."""
        levels = range(len(self.hierarchical_cp or ()))
        getter = "get_hierarchical_context_parallel_groups"
        return dict(KINDS) | {
            f"hcp_{i}": Kind((f"cp:{i}",), f"context, level {i}", f"{getter}()[{i}]")
            for i in levels
        }

    def coordinates(self, rank: int) -> dict[str, int]:
        """This rank's index on each axis of the dense mesh: tp, cp, dp, pp."""
        return self._locate(rank, DENSE, self.sizes)

    def expert_coordinates(self, rank: int) -> dict[str, int]:
        """This rank's index on each axis of the expert mesh: etp, ep, edp, pp."""
        return self._locate(rank, EXPERT, self.expert_sizes)

    def groups(self, kind: str) -> tuple[Ranks, ...]:
        """All groups of a kind, each ascending, in the order of their first ranks."""
        found, inside, outside = self._mesh(kind)
        steps = _offsets(inside)
        groups: Iterable[Ranks] = (
            tuple(base + step for step in steps) for base in _offsets(outside)
        )
        if (cut := found.cut) is not None:
            groups = sorted(
                part for group in groups for part in cut(self.optimizer_instances, group)
            )
        return tuple(groups)

    def group_of(self, kind: str, rank: int) -> Ranks | None:
        """The group of a kind that `rank` is in, None where it is in none (an inner stage has no
        embedding group)."""
        self._check_rank(rank)
        found, inside, _ = self._mesh(kind)
        base = rank - sum(rank // stride % size * stride for size, stride in inside)
        group = tuple(base + step for step in _offsets(inside))
        parts = (group,) if found.cut is None else found.cut(self.optimizer_instances, group)
        return next((part for part in parts if rank in part), None)

    def division(self, kind: str) -> Hashable:
        """How a kind divides the world, ranks without a group standing alone: equal for two kinds
        only if they divide it in the same way. Looks at no rank, so it costs the same at any scale.
        """
        found, inside, _ = self._mesh(kind)
        merged = _merged(inside)
        if found.cut is None:
            return merged
        whole = tuple(range(prod(size for size, _ in inside)))
        parts = found.cut(self.optimizer_instances, whole)
        if parts == (whole,):
            return merged
        return () if all(len(part) == 1 for part in parts) else (merged, parts)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON types from which `from_json` makes an equal layout."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        levels = self.hierarchical_cp
        return values | {"hierarchical_cp": None if levels is None else list(levels)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Layout:
        """The layout that `to_json` described; what is left out has its default."""
        if not isinstance(data, Mapping):
            raise BadArgument(f"layout: expected an object, got {type(data).__name__}")
        _check_names(data, "layout")
        return Layout(**data)

    def __str__(self) -> str:
        """Sizes above one in the layout's order, as `tp2-cp2-dp2+sp`; `1 rank` if there is none."""
        words = []
        for axis in self._order():
            if getattr(self, axis) > 1:
                words.append(f"{axis}{getattr(self, axis)}")
            if axis == "tp" and self.expert_tp != self.tp:
                words.append(f"etp{self.expert_tp}")
            if axis == "cp" and self.hierarchical_cp is not None:
                words.append(f"hcp{'x'.join(map(str, self.hierarchical_cp))}")
            if axis == "pp" and self.vpp > 1:
                words.append(f"vpp{self.vpp}")
        text = "-".join(words) or "1 rank"
        if self.sequence_parallel:
            text += "+sp"
        if self.optimizer_instances > 1:
            text += f"+instances{self.optimizer_instances}"
        return text

    def _order(self) -> tuple[str, ...]:
        given = tuple(self.order.split("-"))
        return given + tuple(axis for axis in AXES if axis not in given)

    def _locate(
        self, rank: int, names: Mapping[str, str], sizes: Mapping[str, int]
    ) -> dict[str, int]:
        self._check_rank(rank)
        found = {}
        for name in (names[axis] for axis in self._order() if axis in names):
            rank, found[name] = divmod(rank, sizes[name])
        return found

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise BadArgument(f"rank: {rank} is not one of the {self.world_size} of {self}")

    def _mesh(self, kind: str) -> tuple[Kind, tuple[Steps, ...], tuple[Steps, ...]]:
        """The kind, and its mesh as steps, fastest first: the kind's own axes, then the others."""
        return _mesh_of(self, kind)

    def _make_mesh(self, kind: str) -> tuple[Kind, tuple[Steps, ...], tuple[Steps, ...]]:
        kinds = self.kinds
        if kind not in kinds:
            raise BadArgument(f"kind: {kind!r} is not one of {', '.join(kinds)} of {self}")
        found, stride = kinds[kind], 1
        names, sizes = (EXPERT, self.expert_sizes) if found.expert else (DENSE, self.sizes)
        inside: list[Steps] = []
        outside: list[Steps] = []
        for name in (names[axis] for axis in self._order() if axis in names):
            for part, size in self._split(name, sizes[name]):
                side = inside if {part, name} & set(found.axes) else outside
                side.append((size, stride))
                stride *= size
        return found, tuple(inside), tuple(outside)

    def _split(self, name: str, size: int) -> list[tuple[str, int]]:
        if name == "edp":
            inner = size // self.optimizer_instances
            return [("edp:inner", inner), ("edp:instance", self.optimizer_instances)]
        if name == "cp" and self.hierarchical_cp is not None:
            return [(f"cp:{level}", part) for level, part in enumerate(self.hierarchical_cp)]
        return [(name, size)]


@lru_cache(maxsize=1024)
def _mesh_of(layout: Layout, kind: str) -> tuple[Kind, tuple[Steps, ...], tuple[Steps, ...]]:
    """Kept, because every rank of a process asks for all kinds."""
    return layout._make_mesh(kind)


def _merged(steps: Iterable[Steps]) -> tuple[Steps, ...]:
    """Steps without axes of size one, and axes that continue each other as one."""
    found: list[Steps] = []
    for size, stride in steps:
        if size == 1:
            continue
        if found and found[-1][0] * found[-1][1] == stride:
            size, stride = size * found[-1][0], found.pop()[1]
        found.append((size, stride))
    return tuple(found)


def _offsets(steps: Iterable[Steps]) -> list[int]:
    """Every sum of one multiple of each stride, ascending; `steps` has the fastest axis first."""
    found = [0]
    for size, stride in steps:
        found = [index * stride + offset for index in range(size) for offset in found]
    return found


def _check_names(given: Mapping[str, Any], what: str) -> None:
    allowed = [f.name for f in fields(Layout)]
    if foreign := sorted(map(str, set(given) - set(allowed))):
        raise BadArgument(f"{what}: unknown fields {foreign}; allowed are {', '.join(allowed)}")


def _check_size(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadArgument(f"{name}: {value!r} is not a size; give a whole number from 1 up")


def _check_types(layout: Layout) -> None:
    for name in ("tp", "cp", "dp", "pp", "ep", "vpp", "optimizer_instances"):
        _check_size(f"layout.{name}", getattr(layout, name))
    if layout.etp is not None:
        _check_size("layout.etp", layout.etp)
    if not isinstance(layout.sequence_parallel, bool):
        given = layout.sequence_parallel
        raise BadArgument(f"layout.sequence_parallel: {given!r} is not one of True, False")
    if not isinstance(layout.order, str):
        raise BadArgument(f"layout.order: {layout.order!r} is not text like {DEFAULT_ORDER}")
    if not isinstance(layout.hierarchical_cp, tuple | None):
        given = layout.hierarchical_cp
        raise BadArgument(f"layout.hierarchical_cp: {given!r} is not a list of sizes like [2, 4]")
    for level, size in enumerate(layout.hierarchical_cp or ()):
        _check_size(f"layout.hierarchical_cp[{level}]", size)


def _check_sizes(layout: Layout) -> None:
    if layout.vpp > 1 and layout.pp == 1:
        raise BadArgument(
            f"layout.vpp: {layout.vpp} chunks a stage need pp above 1, got 1; raise pp or set vpp=1"
        )
    levels = layout.hierarchical_cp
    if levels is not None and (not levels or prod(levels) != layout.cp):
        raise BadArgument(
            f"layout.hierarchical_cp: {list(levels)} must multiply to cp={layout.cp},"
            f" got {prod(levels) if levels else 'no levels'}"
        )
    model = layout.expert_tp * layout.ep * layout.pp
    if layout.world_size % model:
        raise BadArgument(
            f"layout: etp={layout.expert_tp} ep={layout.ep} pp={layout.pp}: etp*ep*pp = {model}"
            f" must divide the {layout.world_size} ranks of tp*cp*dp*pp; change etp, ep or dp"
        )


def _check_order(layout: Layout) -> None:
    given = layout.order.split("-")
    if not set(given) <= set(AXES) or len(set(given)) != len(given):
        raise BadArgument(
            f"layout.order: {layout.order!r} is not a permutation of {DEFAULT_ORDER};"
            f" name each axis once, joined by '-'"
        )
    for axis in (axis for axis in AXES if axis not in given):
        size, expert = getattr(layout, axis), layout.expert_sizes.get(EXPERT.get(axis, axis), 1)
        if max(size, expert) > 1:
            name = axis if size > 1 else EXPERT[axis]
            raise BadArgument(
                f"layout.order: {layout.order!r} leaves out {axis}, but {name}={max(size, expert)};"
                f" only axes of size 1 may be left out"
            )
    _check_pipelines(layout)


def _check_pipelines(layout: Layout) -> None:
    """Both meshes must have the same pipeline groups. Megatron asks more of an order without pp
    at its end: that the data-parallel sizes agree too."""
    if layout.pp == 1:
        return
    if not layout.order.endswith("pp") and layout.edp != layout.dp:
        raise BadArgument(
            f"layout.order: {layout.order!r} does not end in pp, which needs equal data-parallel"
            f" sizes of attention and experts, got dp={layout.dp} edp={layout.edp}; put pp last"
        )
    dense, expert = (
        prod(size for axis, size in _before_pp(layout, names, sizes))
        for names, sizes in ((DENSE, layout.sizes), (EXPERT, layout.expert_sizes))
    )
    if dense != expert:
        raise BadArgument(
            f"layout.order: {layout.order!r} puts pipeline stages {dense} ranks apart for attention"
            f" and {expert} for experts, which must be equal; put pp last"
        )


def _before_pp(
    layout: Layout, names: Mapping[str, str], sizes: Mapping[str, int]
) -> Iterable[tuple[str, int]]:
    order = layout._order()
    return [(a, sizes[names[a]]) for a in order[: order.index("pp")] if a in names]


def _check_optimizer_instances(layout: Layout) -> None:
    given, dp_cp = layout.optimizer_instances, layout.dp * layout.cp
    both = gcd(dp_cp, layout.edp)
    if both % given:
        allowed = ", ".join(str(n) for n in range(1, both + 1) if both % n == 0)
        raise BadArgument(
            f"layout.optimizer_instances: {given} must divide dp*cp = {dp_cp} and"
            f" edp = {layout.edp}; allowed are {allowed}"
        )


__all__ = ["AXES", "DEFAULT_ORDER", "KINDS", "Kind", "Layout", "Ranks"]
