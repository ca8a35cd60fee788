"""The check `traffic`: when a training that overlaps communicates, and what stages send each other.

1. Gradients are reduced while backward goes on. In every step but the first, in which a target may
   look which gradients come, a rank begins within backward passes to reduce at least as many
   elements as it has gradients: over all ranks that hold copies of them, or over some with other
   data, as where it reduces in levels. A reduction that begins when backward has ended has the same
   results, and hides behind nothing.
2. A bucket does not grow far beyond the size that is asked for: it has fewer elements than that and
   the largest gradient together. Nor is all reduced in pieces: a step has at most twice as many
   buckets as its elements fill, and two more for each optimizer group each time that it reduces.
   So a buffer may begin and end with a small bucket, and a bucket end before the tensor that fills
   it or with it.
3. Stages of a pipeline send each other nothing but activations and their gradients, whole or in tp
   parts, where all have one shape, which every stage knows.

Not looked at: by law 1, stages of a pipeline but the first, which may reduce in the bubble at its
end; any stage of several chunks, which may reduce between their passes; and experts, of which the
last pass of a step may have no token. By law 2, buckets of experts and of shards, which have
padding. A parameter that passes may not reach, as the spare norm, is refused.

Of a history of what all ranks communicate, which the cluster `sim` keeps, of a target that marks
its steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from verify.case import Case
from verify.checks.blame import Bench
from verify.checks.promises import by_ranks
from verify.checks.vacuity import unshown
from verify.cluster.base import Cluster
from verify.cluster.history import History, Record, step_phase
from verify.errors import BadArgument, NotSupported
from verify.layout import Layout
from verify.lens import check_fits
from verify.oracle.contract import Contract
from verify.rank_program import Observation, contract_of, observe
from verify.replica import RankMap

_GRADIENT = "gradient "
_REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor")


def traffic(case: Case, *, target_name: str, cluster: Cluster) -> int:
    """A training with `overlap` keeps the three laws."""
    bench = Bench("traffic", case, target_name, cluster)
    contract, layout = contract_of(case), case.layout
    ranks = RankMap(layout, contract.axes)
    check_fits(case, contract, ranks)
    if not case.options.get("overlap", False) or layout.dp == 1 or case.shape["steps"] == 1:
        raise BadArgument(
            f"case: {case} has nothing to overlap; give overlap, dp above 1 and steps above 1"
        )
    if case.options.get("spare"):
        raise BadArgument(
            f"case.options.spare: {case.options['spare']}; the last pass of a step may not reach"
            " the spare norm, and nothing is known of when it is reduced; leave it out"
        )
    bench.require_support(case)
    if cluster.name != "sim":
        raise NotSupported(f"the cluster {cluster.name} keeps no history of communication")
    history = History()
    observations = bench.run(
        observe, target_name, case, world_size=layout.world_size, history=history
    )
    if details := tuple(unshown(case, contract, ranks, observations)):
        raise bench.mismatch("contract", details=details)
    _require_steps(case, target_name, history)
    late = _begun_late(case, contract, observations, history)
    cut = _cut_otherwise(case, contract, observations, history)
    foreign = _foreign(contract.message, layout, history)
    if details := (*late, *cut, *foreign):
        raise bench.mismatch("traffic", details=details)
    return len(observations)


def _require_steps(case: Case, target_name: str, history: History) -> None:
    phases = {each.phase for records in history.records.values() for each in records}
    if phases and not phases & {step_phase(step) for step in range(case.shape["steps"])}:
        raise NotSupported(
            f"{target_name} does not say which step it is in; begin each with"
            " verify.cluster.history.mark_step"
        )


def _begun_late(
    case: Case, contract: Contract, observations: Sequence[Observation], history: History
) -> tuple[str, ...]:
    """The ranks of first stages that begin fewer reductions within the backward passes of a
    step."""
    layout, lines = case.layout, dict[str, list[int]]()
    for rank, each in enumerate(observations):
        if layout.vpp > 1 or layout.coordinates(rank)["pp"]:
            continue
        wanted = sum(sizes := _gradients(contract, each))
        if not sizes:
            continue
        for step in range(1, case.shape["steps"]):
            mine = [r for r in _reductions(history, layout, rank) if r.phase == step_phase(step)]
            begun = sum(record.elements for record in mine if record.in_backward)
            if begun < wanted:
                line = (
                    f"began to reduce {begun} elements of gradients within the backward passes of"
                    f" step {step + 1}, over ranks with copies of them; it has {wanted}, and is to"
                    f" overlap{_rest(mine)}"
                )
                lines.setdefault(line, []).append(rank)
                break
    return by_ranks(lines)


def _cut_otherwise(
    case: Case, contract: Contract, observations: Sequence[Observation], history: History
) -> tuple[str, ...]:
    """The ranks with a bucket that is too large, or with too many in a step."""
    size, lines = contract.bucket, dict[str, list[int]]()
    if size is None:
        return ()
    steps, groups = contract.outputs["rates"].shape
    phases = [step_phase(step) for step in range(steps)]
    for rank, each in enumerate(observations):
        if not (sizes := _gradients(contract, each)):
            continue
        largest = max(sizes)
        buckets: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for record in _reductions(history, case.layout, rank):
            if record.in_backward and record.phase in phases:
                step = 1 + phases.index(record.phase)
                buckets.setdefault((step, record.group), []).append(record.elements)
        for (step, _), found in buckets.items():
            times = -(-sum(found) // sum(sizes))
            most = 2 * groups * times + 2 * sum(found) // size
            if max(found) >= size + largest or len(found) > most:
                line = (
                    f"reduced buckets of {', '.join(map(str, found))} elements in step {step}; a"
                    f" bucket is to have about {size}, fewer than {size + largest} with the largest"
                    f" gradient, and there are to be {most} at most"
                )
                lines.setdefault(line, []).append(rank)
                break
    return by_ranks(lines)


def _gradients(contract: Contract, observation: Observation) -> list[int]:
    """The elements of each gradient of a rank, in one step, without those of experts."""
    return [
        tensor[0].numel()
        for name, tensor in observation.tensors.items()
        if name.startswith(_GRADIENT)
        and tensor is not None
        and "ep" not in contract.outputs[name].placements
    ]


def _reductions(history: History, layout: Layout, rank: int) -> list[Record]:
    """What a rank reduces over ranks with copies of its parameters. Over the ranks of cp alone not
    only gradients are reduced: attention reduces there as well."""
    copies = {*(layout.group_of("dp_cp", rank) or ())}
    sequence = {*(layout.group_of("cp", rank) or ())}
    return [
        each
        for each in history.of(rank)
        if each.operation in _REDUCTIONS
        and {*each.group} <= copies
        and not {*each.group} <= sequence
    ]


def _rest(records: Iterable[Record]) -> str:
    """What was reduced outside of backward, the largest first."""
    late = [each for each in records if not each.in_backward]
    if not late:
        return ""
    most = max(late, key=lambda each: each.elements)
    return f" (outside: {len(late)} reductions, of {most.elements} elements at {most.site})"


def _foreign(elements: int | None, layout: Layout, history: History) -> tuple[str, ...]:
    """The ranks that send another stage something of another size than an activation, or its part
    of one that all of tp have."""
    if elements is None:
        return ()
    sizes = {elements} if layout.sequence_parallel else {elements, elements / layout.tp}
    lines: dict[str, list[int]] = {}
    for rank in range(layout.world_size):
        for each in _sent_to_stages(history.of(rank), layout, rank):
            if each.elements not in sizes:
                line = (
                    f"sends {', '.join(each.tensors)} to another stage at {each.site}; an"
                    f" activation has {elements} elements, and its shape is known"
                )
                ranks = lines.setdefault(line, [])
                ranks += [rank] if rank not in ranks else []
    return by_ranks(lines)


def _sent_to_stages(records: Iterable[Record], layout: Layout, rank: int) -> Iterator[Record]:
    """A rank's messages to the ranks of its pipeline."""
    stages = layout.group_of("pp", rank) or ()
    for each in records:
        if each.operation == "send" and int(each.settings.removeprefix("to ")) in stages:
            yield each
