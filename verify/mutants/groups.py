"""Mutants of `impl.groups`: who belongs with whom."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_mutant = partial(Mutant, family="groups", module="impl.groups", caught_by=("groups",))

_MEMBERS = "members = layout.group_of(kind, rank)"
_RANKS = "return tuple(dist.get_process_group_ranks(self._member_of(kind)))"

MUTANTS = (
    _mutant(
        name="groups-of-first-replica",
        wrong="Every rank believes that its group is that of the first replica.",
        snippet=_RANKS,
        replacement="return self.layout.groups(kind)[0]",
        seen="GRP-05",
    ),
    _mutant(
        name="groups-relative-ranks",
        wrong="Ranks within the group are given out as global ranks.",
        snippet=_RANKS,
        replacement="return tuple(range(self.size(kind)))",
        seen="GRP-04",
    ),
    _mutant(
        name="groups-descending",
        wrong="The members of a group are told in descending order.",
        snippet=_RANKS,
        replacement=("return tuple(reversed(dist.get_process_group_ranks(self._member_of(kind))))"),
    ),
    _mutant(
        name="groups-data-without-context",
        wrong="The data group with context is the data group without.",
        snippet=_MEMBERS,
        replacement='members = layout.group_of("dp" if kind == "dp_cp" else kind, rank)',
    ),
    _mutant(
        name="groups-one-data-group-a-pipeline",
        wrong="The data group is created one loop too far out, for the last stage only.",
        snippet=_MEMBERS,
        replacement=(
            "members = layout.group_of(kind, rank)\n"
            '        if kind == "dp" and layout.coordinates(rank)["pp"] != layout.pp - 1:\n'
            "            members = None"
        ),
        seen="GRP-02",
    ),
    _mutant(
        name="groups-shared-by-size",
        wrong="Kinds of equal size share a communicator, whoever its members are.",
        snippet="        if division not in by_division:",
        replacement=(
            "        division = frozenset({tuple(range(len(members or ())))})\n"
            "        if division not in by_division:"
        ),
    ),
    _mutant(
        name="groups-embedding-everywhere",
        wrong="Inner pipeline stages have an embedding group, of themselves alone.",
        snippet="by_kind[kind] = by_division[division] if members is not None else None",
        replacement="by_kind[kind] = by_division[division]",
    ),
    _mutant(
        name="groups-experts-as-dense",
        wrong="Expert tensor and data groups ignore the size of expert tensor parallelism.",
        snippet=_MEMBERS,
        replacement=('members = layout.group_of({"etp": "tp", "edp": "dp"}.get(kind, kind), rank)'),
    ),
    _mutant(
        name="groups-default-order",
        wrong="The order of the layout is ignored.",
        snippet="    by_division: dict[Hashable, ProcessGroup] = {}",
        replacement=(
            '    layout = Layout(**(layout.to_json() | {"order": "tp-cp-ep-dp-pp"}))\n'
            "    by_division: dict[frozenset[tuple[int, ...]], ProcessGroup] = {}"
        ),
    ),
    _mutant(
        name="groups-outermost-level-first",
        wrong="The levels of hierarchical context parallelism are in reverse.",
        snippet="for level in range(len(layout.hierarchical_cp or ()))]",
        replacement="for level in reversed(range(len(layout.hierarchical_cp or ())))]",
    ),
    _mutant(
        name="groups-one-optimizer-instance",
        wrong="The data group of one optimizer instance spans all instances.",
        snippet=_MEMBERS,
        replacement='members = layout.group_of(kind.replace("dp_cp_intra", "dp_cp"), rank)',
    ),
)
