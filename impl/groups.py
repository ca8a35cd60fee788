"""The process groups of one rank, as a frozen bundle that is passed explicitly.

Which ranks belong together is arithmetic and lives in `verify.layout`; here the groups become
communicators. A field is named as its kind in `verify.layout.KINDS`.

Creation is lean in two ways, and both matter at scale:

- Only the members of a group create it (`use_local_synchronization`). Otherwise every rank takes
  part in creating every group, tens of thousands of them on each of 16,384 ranks.
- Kinds that divide the world in the same way share one process group: with cp=1, `dp` and `dp_cp`
  are one communicator, which saves its buffers and connections. The price is that overlapping
  collectives of the two kinds queue behind each other.

torch derives the name under which members meet from their ranks and from *how many* groups the
process has. So every rank must create equally many groups, in one order: sharing is decided for the
whole division, not for one rank's members, and where a rank has no group of a kind (the embedding
group, on an inner pipeline stage) it creates one of its own alone and does not publish it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from verify.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Groups:
    """This rank's process group of every kind. Made by `build_groups`; group ranks ascend with
    global ranks. `hcp` has the levels of hierarchical context parallelism, innermost first, and is
    empty without `layout.hierarchical_cp`."""

    layout: Layout
    tp: ProcessGroup
    cp: ProcessGroup
    dp: ProcessGroup
    pp: ProcessGroup
    dp_cp: ProcessGroup
    tp_cp: ProcessGroup
    tp_dp: ProcessGroup
    tp_dp_cp: ProcessGroup
    tp_pp: ProcessGroup
    embedding: ProcessGroup | None
    position_embedding: ProcessGroup | None
    ep: ProcessGroup
    etp: ProcessGroup
    edp: ProcessGroup
    etp_ep: ProcessGroup
    etp_ep_pp: ProcessGroup
    dp_cp_intra: ProcessGroup
    edp_intra: ProcessGroup
    optimizer_intra: ProcessGroup
    optimizer_inter: ProcessGroup
    hcp: tuple[ProcessGroup, ...] = ()
    made: tuple[ProcessGroup, ...] = field(default=(), repr=False)

    def group(self, kind: str) -> ProcessGroup | None:
        """The process group of a kind, None where this rank is in none. ValueError if unknown."""
        if kind not in self.layout.kinds:
            raise ValueError(f"kind: {kind!r} is not one of {', '.join(self.layout.kinds)}")
        name, _, level = kind.partition("_")
        found: ProcessGroup | None = self.hcp[int(level)] if name == "hcp" else getattr(self, kind)
        return found

    def size(self, kind: str) -> int:
        """Number of ranks in this rank's group of a kind. ValueError where it is in none."""
        return dist.get_world_size(self._member_of(kind))

    def rank(self, kind: str) -> int:
        """This rank's index in its group of a kind. ValueError where it is in none."""
        return dist.get_rank(self._member_of(kind))

    def ranks(self, kind: str) -> tuple[int, ...]:
        """The global ranks of this rank's group of a kind, in the order of their group ranks.

        Broadcasts and point-to-point calls take global ranks, so a peer's index in the group must
        be looked up here. ValueError where this rank is in no such group.
        """
        return tuple(dist.get_process_group_ranks(self._member_of(kind)))

    def destroy(self) -> None:
        """Destroy the process groups. Every rank calls it; the bundle is of no use afterwards."""
        for group in self.made:
            dist.destroy_process_group(group)

    def _member_of(self, kind: str) -> ProcessGroup:
        found = self.group(kind)
        if found is None:
            raise ValueError(f"kind: rank {dist.get_rank()} is in no {kind} group of {self.layout}")
        return found


def build_groups(layout: Layout, *, backend: str | None = None) -> Groups:
    """Create this rank's groups. Collective: every rank of the world calls it with equal arguments.

    `backend` is torch's (`gloo`, `nccl`), None for that of the default group. Raises ValueError
    where the layout is not that of the world.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if layout.world_size != world_size:
        raise ValueError(
            f"layout: {layout} has {layout.world_size} ranks, the world has {world_size};"
            f" give a layout of {world_size} ranks"
        )
    by_division: dict[Hashable, ProcessGroup] = {}
    by_kind: dict[str, Any] = {}
    for kind in layout.kinds:
        division = layout.division(kind)
        members = layout.group_of(kind, rank)
        if division not in by_division:
            by_division[division] = dist.new_group(
                list(members or (rank,)),
                backend=backend,
                use_local_synchronization=True,
                group_desc=kind,
            )
        by_kind[kind] = by_division[division] if members is not None else None
    levels = [by_kind.pop(f"hcp_{level}") for level in range(len(layout.hierarchical_cp or ()))]
    return Groups(layout=layout, hcp=tuple(levels), made=tuple(by_division.values()), **by_kind)
