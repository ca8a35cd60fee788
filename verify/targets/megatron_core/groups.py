"""The process groups of megatron-core's `parallel_state`, by the kinds of `verify.layout`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch.distributed import ProcessGroup

from verify.errors import BadArgument
from verify.layout import Layout

_with_cp = partial(mpu.get_data_parallel_group, with_context_parallel=True)

# The kinds are those of `verify.layout.KINDS`.
_GETTERS: dict[str, Callable[[], ProcessGroup | None]] = {
    "tp": mpu.get_tensor_model_parallel_group,
    "cp": mpu.get_context_parallel_group,
    "dp": mpu.get_data_parallel_group,
    "pp": mpu.get_pipeline_model_parallel_group,
    "dp_cp": _with_cp,
    "tp_cp": mpu.get_tensor_and_context_parallel_group,
    "tp_dp": mpu.get_tensor_and_data_parallel_group,
    "tp_dp_cp": partial(mpu.get_tensor_and_data_parallel_group, with_context_parallel=True),
    "tp_pp": mpu.get_model_parallel_group,
    "embedding": partial(mpu.get_embedding_group, check_initialized=False),
    "position_embedding": partial(mpu.get_position_embedding_group, check_initialized=False),
    "ep": mpu.get_expert_model_parallel_group,
    "etp": mpu.get_expert_tensor_parallel_group,
    "edp": mpu.get_expert_data_parallel_group,
    "etp_ep": mpu.get_expert_tensor_and_model_parallel_group,
    "etp_ep_pp": mpu.get_expert_tensor_model_pipeline_parallel_group,
    "dp_cp_intra": partial(_with_cp, partial_data_parallel=True),
    "edp_intra": partial(mpu.get_expert_data_parallel_group, partial_expert_data_parallel=True),
    "optimizer_intra": mpu.get_intra_distributed_optimizer_instance_group,
    # Megatron makes none where there is one instance.
    "optimizer_inter": partial(
        mpu.get_inter_distributed_optimizer_instance_group, check_initialized=False
    ),
}


def initialise(layout: Layout) -> None:
    """Make Megatron's groups. Collective; raises what Megatron raises where it refuses."""
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        hierarchical_context_parallel_sizes=list(layout.hierarchical_cp or ()) or None,
        expert_model_parallel_size=layout.ep,
        num_distributed_optimizer_instances=layout.optimizer_instances,
        expert_tensor_parallel_size=layout.etp,
        order=layout.order,
    )


def destroy() -> None:
    """Forget Megatron's groups and destroy them, in the order they were made."""
    # Versions before 0.15 note none.
    made = getattr(mpu, "_global_process_group_list", None) or []
    for group in made:
        if group is not None:
            dist.destroy_process_group(group)
    mpu.destroy_model_parallel()
    # destroy_model_parallel of 0.16.1 forgets this one, and the next layout would seem to have it.
    mpu._HIERARCHICAL_CONTEXT_PARALLEL_GROUPS = None


def group_of(kind: str) -> ProcessGroup | None:
    """This rank's group of a kind, None where it is in none. Raises BadArgument if unknown."""
    getters = _getters()
    if kind not in getters:
        raise BadArgument(f"kind: {kind!r} is not one of {', '.join(getters)}")
    return getters[kind]()


def members() -> Mapping[str, tuple[int, ...]]:
    """For every kind, the global ranks of this rank's group."""
    groups = {kind: get() for kind, get in _getters().items()}
    return {
        kind: tuple(dist.get_process_group_ranks(group))
        for kind, group in groups.items()
        if group is not None
    }


def _getters() -> dict[str, Callable[[], ProcessGroup | None]]:
    """`_GETTERS`, and one for each level of hierarchical context parallelism."""
    levels = mpu.get_hierarchical_context_parallel_groups(check_initialized=False) or ()
    return _GETTERS | {f"hcp_{i}": partial(levels.__getitem__, i) for i in range(len(levels))}
