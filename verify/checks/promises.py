"""What a concept promises beside its results: what is communicated, and what is kept in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from verify.cluster.history import History, Record
from verify.layout import Layout
from verify.oracle.contract import Contract, Step
from verify.rank_program import Observation
from verify.replica import ranks_text

PHASES = ("forward", "backward", "finish")
# By another name the same exchange.
_FAMILIES = {
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}


def promises_communication(contract: Contract) -> bool:
    """Whether something is promised about communication."""
    return any(getattr(contract, phase) is not None for phase in PHASES)


def miscommunicated(contract: Contract, layout: Layout, history: History) -> tuple[str, ...]:
    """For each phase, how what ranks communicated differs from what is promised, one line for every
    set of ranks that differ alike. Groups of one rank communicate nothing."""
    lines: dict[str, list[int]] = {}
    for rank in range(layout.world_size):
        for phase in PHASES:
            promised = getattr(contract, phase)
            if promised is None:
                continue
            steps = promised(layout.coordinates(rank)) if callable(promised) else promised
            wanted = _promised(steps, layout, rank)
            sending = dict.fromkeys(step.kind for step in steps if step.operation == "send")
            found = _found(history.of(rank), phase, layout, rank, sending)
            if found != wanted:
                wrong = _text(found - wanted, "too much") + _text(wanted - found, "missing")
                lines.setdefault(f"in {phase}: {wrong[:-2]}", []).append(rank)
    return by_ranks(lines)


def kept_too_much(contract: Contract, observations: Sequence[Observation]) -> tuple[str, ...]:
    """The ranks on which autograd keeps more elements than promised, one line for each amount."""
    lines: dict[str, list[int]] = {}
    for rank, each in enumerate(observations):
        if contract.kept is not None and each.kept > contract.kept:
            line = f"kept {each.kept} elements for backward; promised are at most {contract.kept}"
            lines.setdefault(line, []).append(rank)
    return by_ranks(lines)


def not_waited_for(history: History) -> tuple[str, ...]:
    """What ranks began and never waited for, one line for each place."""
    lines: dict[str, list[int]] = {}
    for rank, records in sorted(history.under_way.items()):
        for each in records.values():
            line = f"never waits for {each.operation} of {', '.join(each.tensors)} at {each.site}"
            ranks = lines.setdefault(line, [])
            ranks += [rank] if rank not in ranks else []
    return by_ranks(lines)


Counted = Counter[tuple[str, str, int]]


def _promised(steps: Sequence[Step], layout: Layout, rank: int) -> Counted:
    found: Counted = Counter()
    for step in steps:
        group = layout.group_of(step.kind, rank)
        if group is not None and len(group) > 1 and step.elements:
            found[step.operation, _kind(group, layout, rank), step.elements] += 1
    return found


def _found(
    records: Sequence[Record], phase: str, layout: Layout, rank: int, sending: Iterable[str]
) -> Counted:
    """What a rank communicated in a phase. A message counts for a kind of group in `sending` that
    both its ranks are in, whatever group they named it by: that only says where it travels, as
    when megatron-core sends the one way over two stages in the group of all ranks."""
    found: Counted = Counter()
    for record in records:
        if record.phase != phase or len(record.group) == 1 or record.operation == "barrier":
            continue
        operation = _FAMILIES.get(record.operation, record.operation)
        if operation != "recv" and record.elements:
            group = record.group
            if operation == "send":
                pair = {rank, int(record.settings.removeprefix("to "))}
                groups = (layout.group_of(kind, rank) for kind in sending)
                among = [each for each in groups if each is not None and pair <= {*each}]
                group = group if group in among else next(iter(among), group)
            found[operation, _kind(group, layout, rank), record.elements] += 1
    return found


def _kind(group: tuple[int, ...], layout: Layout, rank: int) -> str:
    """The first kind of group of the layout that has these members."""
    for kind in layout.kinds:
        if layout.group_of(kind, rank) == group:
            return kind
    return f"ranks {', '.join(map(str, group))}"


def by_ranks(lines: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """`ranks 0, 1 did this`, of what each line says of ranks."""
    return tuple(f"{ranks_text(ranks)} {line}" for line, ranks in lines.items())


def _text(steps: Counted, what: str) -> str:
    if not steps:
        return ""
    shown = [
        f"{count} x {operation} of {elements} elements over {kind}"
        for (operation, kind, elements), count in sorted(steps.items())
    ]
    return f"{what}: {', '.join(shown)}; "
