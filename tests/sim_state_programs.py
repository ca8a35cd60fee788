"""Rank programs that show what ranks share and what they do not."""

import os
import weakref

import torch
import torch.distributed as dist
from sim_programs import world
from torch import nn

counter = {"value": 0, "items": []}
kept: list[weakref.ref] = []


def leaves_everything_changed() -> None:
    """What a program may leave behind in its thread and in the process."""
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(77 + dist.get_rank())
    torch.set_num_threads(2)
    torch.autograd.set_multithreading_enabled(True)
    torch.set_autocast_enabled("cpu", True)
    dist.new_group([0])
    dist.barrier()


def state() -> list:
    group = dist.new_group()
    return [
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.rand(2).tolist(),
        torch.get_num_threads(),
        torch._C._is_multithreading_enabled(),
        torch.is_autocast_enabled("cpu"),
        dist.get_pg_count() if hasattr(dist, "get_pg_count") else None,
        group.group_name,
    ]


def default_dtypes() -> torch.dtype:
    """Each rank for itself, across a hand-over."""
    rank, _ = world()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if rank else torch.float16)
    dist.barrier()
    inside = torch.get_default_dtype()
    torch.set_default_dtype(before)
    dist.barrier()
    return inside


def processors_of(thread: int) -> set[int]:
    """On which processors a thread may run; 0 for the calling one."""
    return os.sched_getaffinity(thread)


def draws_and_ends() -> list[float]:
    return torch.rand(2).tolist()


def draws_with_own_seed() -> list[float]:
    rank, _ = world()
    torch.manual_seed(rank)
    first = torch.rand(2)
    dist.barrier()
    if rank == 1:
        torch.manual_seed(99)
        torch.rand(100)
    dist.barrier()
    return [*first.tolist(), *torch.rand(2).tolist()]


def counts() -> tuple[int, list[int]]:
    rank, size = world()
    for _ in range(size):
        counter["value"] += rank
        counter["items"].append(rank)
        dist.barrier()
    return counter["value"], list(counter["items"])


def changes_its_arguments(x: torch.Tensor, more: dict, layers: list) -> list:
    rank, _ = world()
    x += rank
    more["x"].add_(rank)
    layers.append(rank)
    dist.barrier()
    return [x, more["x"], layers]


def remembers_an_object() -> None:
    model = nn.Linear(2, 2)
    kept.append(weakref.ref(model))
    group = dist.new_group()
    kept.append(weakref.ref(group))
    x = model(torch.ones(2))
    x.sum().backward()
    dist.all_reduce(model.weight.grad, group=group)
    rank, size = world()
    sent, received = torch.ones(2), torch.empty(2)
    kept.extend(map(weakref.ref, (sent, received)))
    dist.send(sent, (rank + 1) % size)
    dist.recv(received, (rank - 1) % size)


def forgotten() -> int:
    """How much of it is there still, without any collection of cycles."""
    alive = sum(each() is not None for each in kept)
    kept.clear()
    return alive


def order_of_ranks(log: list[int]) -> None:
    for _ in range(3):
        ORDER.append(dist.get_rank())
        dist.barrier()


ORDER: list[int] = []


def destroys() -> bool:
    dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()
    return dist.is_initialized()
