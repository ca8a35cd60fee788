"""Runs a program on all ranks: those that torchrun started, or a cluster of this project.

impl knows nothing of clusters (see the import rules in pyproject.toml), so one is loaded by name
when the command asks for it, and treated as what it is documented to be: something with `run`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

CLUSTERS = ("sim", "process")
_CLUSTERS = "verify.cluster"
_USAGE = ("ValueError", "CheckpointError", "BadArgument")
# A deadlock is noticed at once, whatever the time; a long run is none.
_TIMEOUT = 30.0 * 24 * 3600


class RanksFailed(Exception):
    """One or more ranks raised: what the first one said. `usage` where that was a ValueError, which
    is about what was given."""

    def __init__(self, text: str, *, usage: bool) -> None:
        super().__init__(text)
        self.usage = usage


def started_by_torchrun() -> bool:
    """Whether this process is a rank already."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def run_as_rank(program: Callable[..., T], *args: Any, world_size: int, device: str) -> T:
    """The program on this rank of torchrun's world. ValueError where that is of another size."""
    given = int(os.environ["WORLD_SIZE"])
    if given != world_size:
        raise ValueError(
            f"layout: it has {world_size} ranks and torchrun started {given}; start as many, or"
            " change --dp"
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        return program(*args)
    finally:
        dist.destroy_process_group()


def run_on_cluster(
    name: str, program: Callable[..., T], *args: Any, world_size: int, device: str
) -> list[T]:
    """The program on as many ranks of a cluster; results by rank. Raises RanksFailed."""
    open_cluster = import_module(_CLUSTERS).open_cluster
    with open_cluster(name, world_size=world_size, timeout=_TIMEOUT, device=device) as cluster:
        try:
            return cluster.run(program, *args, world_size=world_size)
        except Exception as error:
            failures = getattr(error, "failures", None)
            if not failures:
                raise
            first = failures[0]
            usage = first.kind.rpartition(".")[2] in _USAGE
            text = first.message if usage else f"rank {first.rank}: {first.kind}: {first.message}"
            raise RanksFailed(text, usage=usage) from error
