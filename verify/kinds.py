"""The kinds of process groups that Megatron has, each as axes of a mesh of `verify.layout`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Ranks = tuple[int, ...]
# (optimizer instances, a group) to the parts of the group that are groups of the kind.
Cut = Callable[[int, Ranks], tuple[Ranks, ...]]


@dataclass(frozen=True)
class Kind:
    """A kind of group: the ranks that differ only along `axes` of one mesh, then cut if need be.

    Axes that are split (`edp`, and `cp` if hierarchical) may be named in part, as `edp:instance`.
    `megatron` is the getter of `megatron.core.parallel_state` that answers with this group.
    `covers` is False where some ranks may be in no group of the kind.
    """

    axes: tuple[str, ...]
    meaning: str
    megatron: str
    cut: Cut | None = None
    covers: bool = True

    @property
    def expert(self) -> bool:
        """Whether the axes are those of the expert mesh."""
        return any(part.partition(":")[0] in ("etp", "ep", "edp") for part in self.axes)


def _ends(instances: int, stages: Ranks) -> tuple[Ranks, ...]:
    return (stages if len(stages) == 1 else (stages[0], stages[-1]),)


def _first(instances: int, stages: Ranks) -> tuple[Ranks, ...]:
    return (stages[:1],)


def _runs(instances: int, replicas: Ranks) -> tuple[Ranks, ...]:
    length = len(replicas) // instances
    return tuple(replicas[i : i + length] for i in range(0, len(replicas), length))


# The kinds that every layout has. A layout with `hierarchical_cp` also has hcp_0, hcp_1, ...:
# one kind a level, innermost first (`get_hierarchical_context_parallel_groups`).
KINDS: Mapping[str, Kind] = {
    "tp": Kind(("tp",), "tensor", "get_tensor_model_parallel_group"),
    "cp": Kind(("cp",), "context", "get_context_parallel_group"),
    "dp": Kind(("dp",), "data", "get_data_parallel_group"),
    "pp": Kind(("pp",), "pipeline", "get_pipeline_model_parallel_group"),
    "dp_cp": Kind(
        ("dp", "cp"), "data with context", "get_data_parallel_group(with_context_parallel=True)"
    ),
    "tp_cp": Kind(("tp", "cp"), "tensor and context", "get_tensor_and_context_parallel_group"),
    "tp_dp": Kind(("tp", "dp"), "tensor and data", "get_tensor_and_data_parallel_group"),
    "tp_dp_cp": Kind(
        ("tp", "dp", "cp"),
        "tensor and data with context",
        "get_tensor_and_data_parallel_group(with_context_parallel=True)",
    ),
    "tp_pp": Kind(("tp", "pp"), "model (tensor and pipeline)", "get_model_parallel_group"),
    "embedding": Kind(
        ("pp",), "first and last stage", "get_embedding_group", cut=_ends, covers=False
    ),
    "position_embedding": Kind(
        ("pp",), "first stage", "get_position_embedding_group", cut=_first, covers=False
    ),
    "ep": Kind(("ep",), "expert", "get_expert_model_parallel_group"),
    "etp": Kind(("etp",), "expert tensor", "get_expert_tensor_parallel_group"),
    "edp": Kind(("edp",), "expert data", "get_expert_data_parallel_group"),
    "etp_ep": Kind(
        ("etp", "ep"), "expert tensor and expert", "get_expert_tensor_and_model_parallel_group"
    ),
    "etp_ep_pp": Kind(
        ("etp", "ep", "pp"),
        "expert tensor, expert and pipeline",
        "get_expert_tensor_model_pipeline_parallel_group",
    ),
    "dp_cp_intra": Kind(
        ("dp", "cp"),
        "data with context, of one optimizer instance",
        "get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True)",
        cut=_runs,
    ),
    "edp_intra": Kind(
        ("edp:inner",),
        "expert data, of one optimizer instance",
        "get_expert_data_parallel_group(partial_expert_data_parallel=True)",
    ),
    "optimizer_intra": Kind(
        ("etp", "ep", "edp:inner", "pp"),
        "all ranks of one optimizer instance",
        "get_intra_distributed_optimizer_instance_group",
    ),
    "optimizer_inter": Kind(
        ("edp:instance",),
        "the same shard in every optimizer instance",
        "get_inter_distributed_optimizer_instance_group",
    ),
}
