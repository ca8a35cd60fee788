"""Clusters: whatever runs N ranks. `open_cluster` opens one by name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from verify.cluster.base import (
    Cluster,
    CollectiveMismatch,
    Deadlock,
    RankFailure,
    RankFailures,
)
from verify.errors import BadArgument

CLUSTERS = {
    "sim": ("verify.cluster.sim", "SimCluster"),
    "process": ("verify.cluster.process", "ProcessCluster"),
    "torchrun": ("verify.cluster.torchrun", "TorchrunCluster"),
}

# The backend of real processes that compute on each.
DEVICES = {"cpu": "gloo", "cuda": "nccl"}


def open_cluster(
    name: str = "sim", *, world_size: int, device: str | None = None, **options: Any
) -> Cluster:
    """A cluster of at most `world_size` ranks; use it as a context manager or `close()` it.

    `device` cpu or cuda is where ranks compute: in `sim` all on one GPU, in the others over nccl, a
    GPU a rank. By default it is the CPU, but in `torchrun` the GPUs where every rank has one.
    `options` are those of the cluster's class.

    Raises BadArgument for an unknown name, a world size below one, and GPUs that are not there.
    """
    if name not in CLUSTERS:
        raise BadArgument(f"cluster: {name!r} is not one of {', '.join(CLUSTERS)}")
    if world_size < 1:
        raise BadArgument(f"world_size: {world_size} is below 1")
    if device is not None:
        if device not in DEVICES:
            raise BadArgument(f"device: {device!r} is not one of {', '.join(DEVICES)}")
        options |= {"device": device} if name == "sim" else {"backend": DEVICES[device]}
    module, attribute = CLUSTERS[name]
    return getattr(import_module(module), attribute)(world_size=world_size, **options)


__all__ = [
    "CLUSTERS",
    "DEVICES",
    "Cluster",
    "CollectiveMismatch",
    "Deadlock",
    "RankFailure",
    "RankFailures",
    "open_cluster",
]
