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


def open_cluster(name: str = "sim", *, world_size: int, **options: Any) -> Cluster:
    """A cluster of at most `world_size` ranks; use it as a context manager or `close()` it.

    Raises BadArgument for an unknown name or a world size below one.
    """
    if name not in CLUSTERS:
        raise BadArgument(f"cluster: {name!r} is not one of {', '.join(CLUSTERS)}")
    if world_size < 1:
        raise BadArgument(f"world_size: {world_size} is below 1")
    module, attribute = CLUSTERS[name]
    return getattr(import_module(module), attribute)(world_size=world_size, **options)


__all__ = [
    "CLUSTERS",
    "Cluster",
    "CollectiveMismatch",
    "Deadlock",
    "RankFailure",
    "RankFailures",
    "open_cluster",
]
