"""The check `traffic`: when a training that overlaps communicates, and what stages send each other.

1. Gradients are reduced while backward goes on: within backward passes, reductions are begun over
   the ranks that hold copies of a parameter of at least as many elements as it has gradients, for
   each step but one: in the first, a target may look which gradients come. A reduction that begins
   when backward has ended has the same results, and hides behind nothing. Stages of a pipeline but
   the first may reduce in the bubble at its end, and all of several chunks between their passes.
2. A bucket ends with the tensor by which it has as many elements as asked for. So all but the last
   of a step have as many, and none has more than that and its last tensor.
3. Stages of a pipeline send each other nothing but activations and their gradients, where all have
   one shape, which every stage knows.

Of parameters that every last backward pass of a step reaches, and of a history of what all ranks
communicate, which the cluster `sim` keeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from verify.case import Case
from verify.checks.blame import Bench
from verify.checks.promises import by_ranks
from verify.checks.vacuity import unshown
from verify.cluster.base import Cluster
from verify.cluster.history import History, Record
from verify.errors import BadArgument, NotSupported
from verify.layout import Layout
from verify.lens import check_fits
from verify.oracle.contract import Contract
from verify.rank_program import Observation, contract_of, observe
from verify.replica import RankMap

_GRADIENT = "gradient "
_REDUCTIONS = ("all_reduce", "reduce_scatter", "reduce_scatter_tensor")


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
    bench.require_support(case)
    if cluster.name != "sim":
        raise NotSupported(f"the cluster {cluster.name} keeps no history of communication")
    history = History()
    observations = bench.run(
        observe, target_name, case, world_size=layout.world_size, history=history
    )
    if details := tuple(unshown(case, contract, ranks, observations)):
        raise bench.mismatch("contract", details=details)
    late = _begun_late(contract, layout, observations, history)
    cut = _cut_otherwise(contract, layout, observations, history)
    foreign = () if contract.message is None else _foreign(contract.message, layout, history)
    if details := (*late, *cut, *foreign):
        raise bench.mismatch("communication", details=details)
    return len(observations)


def _begun_late(
    contract: Contract, layout: Layout, observations: Sequence[Observation], history: History
) -> tuple[str, ...]:
    """For each group of copies, the ranks of first stages that begin fewer reductions within
    backward."""
    lines: dict[str, list[int]] = {}
    for rank, each in enumerate(observations):
        if layout.vpp > 1 or layout.coordinates(rank)["pp"]:
            continue
        begun: Counter[tuple[int, ...]] = Counter()
        for record in history.of(rank):
            if record.in_backward and record.operation in _REDUCTIONS:
                begun[record.group] += record.elements
        for group, elements in _gradients(contract, layout, rank, each).items():
            if begun[group] < elements:
                line = (
                    f"began to reduce {begun[group]} elements of gradients within backward, over"
                    f" the {len(group)} ranks with copies of them; after the first step it has"
                    f" {elements}, and is to overlap{_rest(history.of(rank), group)}"
                )
                lines.setdefault(line, []).append(rank)
    return by_ranks(lines)


def _cut_otherwise(
    contract: Contract, layout: Layout, observations: Sequence[Observation], history: History
) -> tuple[str, ...]:
    """The ranks with buckets that are too small, or have a tensor too many."""
    if contract.bucket is None:
        return ()
    lines: dict[str, list[int]] = {}
    for rank, each in enumerate(observations):
        gradients = {n: t for n, t in each.tensors.items() if n.startswith(_GRADIENT)}
        sizes = [(len(t), t[0].numel()) for t in gradients.values() if t is not None]
        steps, largest = max(sizes)[0], max(elements for _, elements in sizes)
        group = layout.group_of("dp_cp", rank)
        buckets = [
            record.elements
            for record in history.of(rank)
            if record.in_backward and record.group == group and record.operation in _REDUCTIONS
        ]
        small = sum(elements < contract.bucket for elements in buckets)
        large = max(buckets, default=0)
        if small > steps or large >= contract.bucket + largest:
            line = (
                f"reduces {', '.join(map(str, buckets))} elements in {steps} steps; a bucket is"
                f" complete with {contract.bucket}, and the largest gradient has {largest}"
            )
            lines.setdefault(line, []).append(rank)
    return by_ranks(lines)


def _gradients(
    contract: Contract, layout: Layout, rank: int, observation: Observation
) -> Mapping[tuple[int, ...], int]:
    """How many elements of gradients a rank has after the first step, by the group of their
    copies."""
    found: Counter[tuple[int, ...]] = Counter()
    for name, tensor in observation.tensors.items():
        if not name.startswith(_GRADIENT) or tensor is None:
            continue
        expert = "ep" in contract.outputs[name].placements
        group = layout.group_of("edp" if expert else "dp_cp", rank)
        if group is not None and len(group) > 1:
            found[group] += tensor[1:].numel()
    return found


def _rest(records: Iterable[Record], group: tuple[int, ...]) -> str:
    """What was reduced over the group outside of backward, the largest first."""
    late = [
        each
        for each in records
        if each.group == group and each.operation in _REDUCTIONS and not each.in_backward
    ]
    if not late:
        return ""
    most = max(late, key=lambda each: each.elements)
    return f" (outside: {len(late)} reductions, of {most.elements} elements at {most.site})"


def _foreign(elements: int, layout: Layout, history: History) -> tuple[str, ...]:
    """The ranks that send another stage something of another size than an activation."""
    lines: dict[str, list[int]] = {}
    for rank in range(layout.world_size):
        for each in _sent_to_stages(history.of(rank), layout, rank):
            if each.elements != elements:
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
