"""Which rank this process is in the world that torchrun or Slurm started, and where ranks meet."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from verify.errors import BadArgument, HarnessError

_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


@dataclass(frozen=True)
class Place:
    """This process in the world that was started: from torchrun's variables, or Slurm's."""

    rank: int
    world_size: int
    local_rank: int
    master: str

    @staticmethod
    def from_environment() -> Place:
        """Read RANK, WORLD_SIZE, LOCAL_RANK (or Slurm's) and MASTER_ADDR, MASTER_PORT.

        Raises BadArgument naming what is missing.
        """
        found = {}
        for name, slurm in _NAMES.items():
            text = os.environ.get(name, os.environ.get(slurm, ""))
            if not text.isdigit():
                raise BadArgument(
                    f"cluster: torchrun needs {name} (or {slurm}) in the environment, found "
                    f"{text!r}; start with torchrun or srun"
                )
            found[name] = int(text)
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise BadArgument(
                    f"cluster: torchrun needs {name} in the environment; torchrun sets it, under "
                    "srun export the first node's name and a free port (ci/slurm)"
                )
        rank, world_size, local_rank = found.values()
        return Place(rank, world_size, local_rank, os.environ["MASTER_ADDR"])

    def device(self) -> int | None:
        """The index of this rank's GPU: its local rank, or 0 where Slurm shows each task only its
        own; None without one."""
        count = torch.cuda.device_count()
        if self.local_rank < count:
            return self.local_rank
        return 0 if count == 1 and "SLURM_PROCID" in os.environ else None

    def store(self, timeout: float) -> dist.Store:
        """The store at which the ranks meet. Raises HarnessError where they do not."""
        try:
            store, _, _ = next(
                dist.rendezvous(
                    "env://", self.rank, self.world_size, timeout=timedelta(seconds=timeout)
                )
            )
        except (RuntimeError, ValueError) as error:
            address = f"{self.master}:{os.environ['MASTER_PORT']}"
            raise HarnessError(f"rank {self.rank} met nobody at {address}: {error}") from error
        return store
