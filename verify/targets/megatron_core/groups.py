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
}


def initialise(layout: Layout) -> None:
    """Make Megatron's groups. Collective; raises what Megatron raises where it refuses."""
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        order=layout.order,
    )


def destroy() -> None:
    """Forget Megatron's groups and destroy them, in the order they were made."""
    made = mpu._global_process_group_list or []
    for group in made:
        if group is not None:
            dist.destroy_process_group(group)
    mpu.destroy_model_parallel()


def group_of(kind: str) -> ProcessGroup | None:
    """This rank's group of a kind, None where it is in none. Raises BadArgument if unknown."""
    if kind not in _GETTERS:
        raise BadArgument(f"kind: {kind!r} is not one of {', '.join(_GETTERS)}")
    return _GETTERS[kind]()


def members() -> Mapping[str, tuple[int, ...]]:
    """For every kind, the global ranks of this rank's group."""
    groups = {kind: get() for kind, get in _GETTERS.items()}
    return {
        kind: tuple(dist.get_process_group_ranks(group))
        for kind, group in groups.items()
        if group is not None
    }
