"""Who belongs with whom: the process groups of every layout.

Laws, in full in `verify.checks.group_laws`: (1) the groups of a kind partition the world, (2) ranks
ascend, (3) they are the oracle's, (4) axes meet in one rank, (5) pairs of axes are products,
(6) parts lie within their wholes, (7) members agree, and their communicator reaches just them, (8)
a rank is refused a group that it is not in, (9) none is left afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from verify.case import Case
from verify.checks.group_laws import judge
from verify.layout import Layout
from verify.runner.limits import limits
from verify.strategies.layouts import layouts_of_every_kind

cases = st.deferred(lambda: layouts_of_every_kind(limits().world_size(16))).map(
    lambda layout: Case(concept="groups", layout=layout)
)


@given(case=cases)
def test_every_rank_of_the_target_has_its_groups(check: Callable[..., None], case: Case) -> None:
    """Laws 1 to 9, of the target's groups and communicators on every rank."""
    check("groups", case)


@given(layout=layouts_of_every_kind(max_world_size=64))
def test_the_arithmetic_of_layouts(layout: Layout) -> None:
    """Laws 1 to 6, of `Layout.groups`; and what it says of one rank agrees with it."""
    judge({kind: layout.groups(kind) for kind in layout.kinds}, layout, who="Layout.groups")


@given(layout=layouts_of_every_kind(max_world_size=64), turn=st.integers(0, 63))
def test_one_rank_is_told_what_all_are_told(layout: Layout, turn: int) -> None:
    """`group_of` and the coordinates are those of `groups`."""
    rank = turn % layout.world_size
    for kind in layout.kinds:
        named = [group for group in layout.groups(kind) if rank in group]
        assert (layout.group_of(kind, rank),) == (tuple(named) or (None,))
    for place, axes in ((layout.coordinates, "tp cp dp pp"), (layout.expert_coordinates, "etp ep")):
        for axis in axes.split():
            group = layout.group_of(axis, rank)
            assert group is not None
            assert place(rank)[axis] == group.index(rank)
            others = {(a, i) for a, i in place(rank).items() if a != axis}
            assert all(others <= set(place(member).items()) for member in group)
