"""The laws of process groups, for whoever made them: `Layout.groups` or a target.

`judge` holds a table of groups against laws 1 to 6; `groups_check` asks a target on every rank, and
probes its real communicators. What is right, `verify.oracle.groups` says.

1. Every rank is in exactly one group of a kind, all of its size (embedding kinds: in one or none).
2. Ranks ascend within a group.
3. The groups are the oracle's.
4. Groups of two axes of a mesh meet in one rank only.
5. The group of a pair of axes is the union of the one axis' groups over the other's members.
6. A part of a group lies within it.
7. Every member of a group names the same members, and an all-gather over the real process group
   brings together these ranks in this order.
8. A rank that asks for a group that it is not in, or of a kind that there is not, is refused.
9. After the session the process has no more groups than before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from verify.case import Case
from verify.cluster.base import Cluster
from verify.errors import BadArgument, HarnessError, Mismatch
from verify.layout import Layout
from verify.oracle import groups as oracle
from verify.rank_program import session_of, target_code
from verify.target import Session
from verify.targets import load_target

Ranks = tuple[int, ...]
Table = Mapping[str, Sequence[Ranks]]
Groups = Mapping[str, Mapping[int, Ranks]]

_NO_KIND = "none"
# Kinds that some ranks may have no group of.
PARTIAL = ("embedding", "position_embedding")
MESHES = (("tp", "cp", "dp", "pp"), ("etp", "ep", "edp", "pp"))
PRODUCTS = {
    "dp_cp": ("dp", "cp"),
    "tp_cp": ("tp", "cp"),
    "tp_dp": ("tp", "dp"),
    "tp_dp_cp": ("tp", "dp_cp"),
    "tp_pp": ("tp", "pp"),
    "etp_ep": ("etp", "ep"),
    "etp_ep_pp": ("etp_ep", "pp"),
    "edp": ("edp_intra", "optimizer_inter"),
    "optimizer_intra": ("etp_ep_pp", "edp_intra"),
}
WITHIN = {
    "embedding": "pp",
    "position_embedding": "embedding",
    "dp_cp_intra": "dp_cp",
    "edp_intra": "edp",
    "optimizer_inter": "edp",
    "etp_ep_pp": "optimizer_intra",
}
LAWS = {
    1: "every rank is in exactly one group of a kind, and all groups of a kind have its size",
    2: "the ranks of a group ascend",
    3: "the groups are those of the layout",
    4: "groups of two axes of a mesh meet in one rank",
    5: "the group of two axes is the union of one axis' groups over the other's members",
    6: "a part of a group lies within it",
    7: "every member names the same members, and its communicator reaches them in this order",
    8: "a rank is refused a group that it is not in",
}


def judge(table: Table, layout: Layout, *, who: str) -> None:
    """Hold the groups of `table`, made by `who`, against laws 1 to 6. Raises Mismatch.

    A kind that is not in the table is not judged, but an axis of size above one must be there.
    """
    court = _Court(layout, who)
    court.complete(table)
    for kind, groups in table.items():
        court.partition(kind, groups)
        for group in groups:
            if list(group) != sorted(group):
                raise court.mismatch(2, kind, min(group), group)
    of = {kind: {r: g for g in groups for r in g} for kind, groups in table.items()}
    court.meetings(of)
    court.products(of)
    court.containments(of)
    for kind in table:
        for rank in range(layout.world_size):
            if of[kind].get(rank) != court.expected(kind, rank):
                raise court.mismatch(3, kind, rank, of[kind].get(rank))


def groups_check(case: Case, *, target_name: str, cluster: Cluster) -> tuple[str, ...]:
    """Hold a target's groups for `case.layout` against laws 1 to 9, on every rank of a cluster.

    Returns the kinds of the layout that the target does not have, which were not judged. Raises
    Mismatch with the kind, the rank, and what was expected; and what the cluster raises.
    """
    layout = case.layout
    views = cluster.run(_views, target_name, layout, world_size=layout.world_size)
    court = _Court(layout, target_name)
    members = [view.members for view in views]
    named = {kind for each in members for kind in each}
    kinds = [kind for kind in layout.kinds if kind in named]
    court.complete(dict.fromkeys(named, ()))
    for kind in kinds:
        court.agreement(kind, [each.get(kind) for each in members])
    table = {kind: sorted({m[kind] for m in members if kind in m}) for kind in kinds}
    judge(table, layout, who=target_name)
    for rank, view in enumerate(views):
        if view.gathered is None:
            raise HarnessError(f"groups: rank {rank} of {layout} did not probe its groups")
        for kind, gathered in view.gathered.items():
            if tuple(gathered) != view.members[kind]:
                raise court.mismatch(7, kind, rank, gathered)
        for kind in view.granted:
            raise court.mismatch(8, kind, rank, "a group all the same")
        if view.left:
            raise Mismatch(
                f"groups: rank {rank} of {layout} has {view.left} process groups of {target_name}"
                " after its session, which destroys what it made"
            )
    return tuple(kind for kind in layout.kinds if kind not in kinds)


@dataclass(frozen=True)
class _View:
    """What one rank has: the members of its groups by kind, and what an all-gather over each
    brought together; None where the ranks disagree, so that it would hang. `granted` are kinds of
    groups that it is in none of, though others are, and was not refused. `left` is how many process
    groups the session left behind."""

    members: dict[str, Ranks]
    gathered: dict[str, list[int]] | None
    granted: tuple[str, ...] = ()
    left: int = 0


def _views(target_name: str, layout: Layout) -> _View:
    """Rank program. Collective over the world, then over each group in the order of kinds."""
    before = len(distributed_c10d._world.pg_map)
    view = _view(target_name, layout)
    return replace(view, left=len(distributed_c10d._world.pg_map) - before)


def _view(target_name: str, layout: Layout) -> _View:
    with session_of(load_target(target_name), layout) as session:
        with target_code("naming its groups"):
            members = {kind: tuple(ranks) for kind, ranks in session.groups().items()}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, members)
        if not _coherent(everyone):
            return _View(members, None)
        with target_code("communicating in its groups"):
            gathered = {kind: session.probe(kind) for kind in layout.kinds if kind in members}
        named = dict.fromkeys(kind for each in everyone for kind in each)
        others = [kind for kind in (*named, _NO_KIND) if kind not in members]
        with target_code("being asked for a group that it is not in"):
            granted = [kind for kind in others if not _refuses(session, kind)]
        return _View(members, gathered, tuple(granted))


def _refuses(session: Session, kind: str) -> bool:
    try:
        session.probe(kind)
    except BadArgument:
        return True
    return False


def _coherent(everyone: Sequence[Mapping[str, Ranks]]) -> bool:
    return all(
        rank in group
        and all(0 <= r < len(everyone) and everyone[r].get(kind) == group for r in group)
        for rank, named in enumerate(everyone)
        for kind, group in named.items()
    )


class _Court:
    """The laws one by one, for the groups that `who` made for a layout."""

    def __init__(self, layout: Layout, who: str) -> None:
        self.layout, self.who = layout, who
        self.right = oracle.groups(layout)

    def expected(self, kind: str, rank: int) -> Ranks | None:
        """The oracle's group of a rank; None where it has none."""
        return next((group for group in self.right.get(kind, ()) if rank in group), None)

    def complete(self, table: Table) -> None:
        """No unknown kind, and every axis of size above one."""
        if foreign := sorted(set(table) - set(self.right)):
            allowed = ", ".join(self.right)
            raise Mismatch(f"groups: {self.who} has kinds {foreign}; {self.layout} has {allowed}")
        for kind in {axis: None for mesh in MESHES for axis in mesh}:
            if kind not in table and (size := len(self.right[kind][0])) > 1:
                raise Mismatch(
                    f"groups: {self.who} has no {kind} group on any rank of {self.layout},"
                    f" where {kind} is {size}"
                )

    def partition(self, kind: str, groups: Sequence[Ranks]) -> None:
        """Law 1."""
        holders: dict[int, list[Ranks]] = {}
        for group in groups:
            for rank in group:
                holders.setdefault(rank, []).append(group)
        for rank in sorted(set(holders) | set(range(self.layout.world_size))):
            found = holders.get(rank, [])
            if len(found) > 1 or (not found and kind not in PARTIAL):
                raise self.mismatch(1, kind, rank, " and ".join(map(_text, found)) or None)
            if rank >= self.layout.world_size:
                raise self.mismatch(1, kind, rank, found[0])
        size = len(self.right[kind][0])
        for group in groups:
            if kind not in PARTIAL and len(group) != size:
                raise self.mismatch(1, kind, group[0], group)

    def meetings(self, of: Groups) -> None:
        """Law 4."""
        for mesh in MESHES:
            for one, other in combinations([axis for axis in mesh if axis in of], 2):
                for rank, group in of[one].items():
                    if set(group) & set(of[other][rank]) != {rank}:
                        raise self.relation(4, (one, other), rank, of)

    def products(self, of: Groups) -> None:
        """Law 5."""
        for kind, (one, other) in PRODUCTS.items():
            if not {kind, one, other} <= set(of):
                continue
            for rank, group in of[kind].items():
                if set(group) != {r for member in of[one][rank] for r in of[other][member]}:
                    raise self.relation(5, (one, other, kind), rank, of)

    def containments(self, of: Groups) -> None:
        """Law 6."""
        levels = {kind: "cp" for kind in of if kind.startswith("hcp_")}
        for kind, whole in (WITHIN | levels).items():
            if not {kind, whole} <= set(of):
                continue
            for rank, group in of[kind].items():
                if not set(group) <= set(of[whole].get(rank, ())):
                    raise self.relation(6, (whole, kind), rank, of)

    def relation(self, law: int, kinds: Sequence[str], rank: int, of: Groups) -> Exception:
        """The error for kinds that do not go together at `rank`: it names the one that is wrong."""
        for kind in kinds:
            for each in (rank, *range(self.layout.world_size)):
                if of[kind].get(each) != self.expected(kind, each):
                    return self.mismatch(law, kind, each, of[kind].get(each))
        return HarnessError(
            f"groups: the oracle's {', '.join(kinds)} break law {law} ({self.layout})"
        )

    def agreement(self, kind: str, named: Sequence[Ranks | None]) -> None:
        """Law 7, by what each rank names: `named[rank]` is its group, None where it has none."""
        for rank, group in enumerate(named):
            if group is not None and rank not in group:
                raise self.mismatch(7, kind, rank, group)
            for other in group or ():
                if not 0 <= other < len(named):
                    raise self.mismatch(7, kind, rank, group)
                if named[other] != group:
                    right = group == self.expected(kind, rank)
                    wrong, peer = (other, rank) if right else (rank, other)
                    got = f"{_text(named[wrong])} (rank {peer} names {_text(named[peer])})"
                    raise self.mismatch(7, kind, wrong, got)

    def mismatch(self, law: int, kind: str, rank: int, got: object) -> Mismatch:
        """The error that says which group of which rank is wrong, and how to see it again."""
        expected = self.expected(kind, rank)
        return Mismatch(
            f"groups: the {kind} group of rank {rank} of {self.layout}, made by {self.who}\n"
            f"  expected {_text(expected)}\n"
            f"  got      {_text(got)}\n"
            f"  law {law}: {LAWS[law]}\n"
            f"  layout   {json.dumps(self.layout.to_json())}"
        )


def _text(ranks: Any) -> str:
    if ranks is None:
        return "no group"
    return ranks if isinstance(ranks, str) else str(list(ranks))
