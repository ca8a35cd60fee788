"""Runs a program on all ranks: those that torchrun started, or a cluster of this project.

impl knows nothing of clusters (see the import rules in pyproject.toml), so one is loaded by name
when the command asks for it, and treated as what it is documented to be: something with `run`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
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
_ASKED_FOR = timedelta(seconds=10)


class RanksFailed(Exception):
    """One or more ranks raised: what the first one said. `usage` where that was a ValueError, which
    is about what was given. Not `told` where another rank failed before, and says so: what this one
    met may come of it."""

    def __init__(self, text: str, *, usage: bool, told: bool = True) -> None:
        super().__init__(text)
        self.usage, self.told = usage, told

    @staticmethod
    def of(rank: int, kind: str, message: str, *, told: bool = True) -> RanksFailed:
        """What a rank raised: an error of this kind, with a module or without."""
        usage = kind.rpartition(".")[2] in _USAGE
        text = message if usage and message else f"rank {rank}: {kind}: {message}"
        return RanksFailed(text, usage=usage, told=told)


def started_by_torchrun() -> bool:
    """Whether this process is a rank already."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def first_to_fail() -> bool:
    """Whether no other rank of torchrun's world has asked this before: the first that fails asks,
    and then speaks for all. True where nobody can be asked, as said twice is better than never."""
    if not started_by_torchrun():
        return True
    at = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    run = os.environ["TORCHELASTIC_RUN_ID"], os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = dist.TCPStore(*at, is_master=False, timeout=_ASKED_FOR)
        return store.add(f"impl.pretrain/failed/{'/'.join(run)}", 1) == 1
    except RuntimeError:
        return True


def run_as_rank(program: Callable[..., T], *args: Any, world_size: int, device: str) -> T:
    """The program on this rank of torchrun's world. ValueError where that is of another size;
    RanksFailed for what the program raises."""
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
    except Exception as error:
        # Asked while the connections are open: no rank has failed yet because this one did.
        told = first_to_fail()
        kind, rank = type(error).__name__, dist.get_rank()
        raise RanksFailed.of(rank, kind, str(error), told=told) from error
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
            raise RanksFailed.of(first.rank, first.kind, first.message) from error
