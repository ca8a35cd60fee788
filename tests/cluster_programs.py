"""Rank programs for the tests of clusters of processes."""

import ctypes
import os
import signal
import time

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


def total(start: float) -> tuple[int, int, torch.Tensor]:
    x = torch.full((3,), start + dist.get_rank(), dtype=torch.float64)
    dist.all_reduce(x)
    return dist.get_rank(), dist.get_world_size(), x


def identity(value):
    return value


def process_id() -> int:
    return os.getpid()


def raise_on(ranks: list[int]) -> None:
    if dist.get_rank() in ranks:
        raise ValueError(f"refused on {dist.get_rank()}")
    dist.all_reduce(torch.ones(2))


class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(one)
        self.lock = __import__("threading").Lock()

    def __reduce__(self):
        raise TypeError("does not pickle")


def raise_odd() -> None:
    if dist.get_rank() == 1:
        raise Odd("one", "two")
    dist.barrier()


def die(rank: int, how: str) -> None:
    dist.all_reduce(torch.ones(1))
    if dist.get_rank() == rank:
        if how == "exit":
            os._exit(3)
        if how == "segfault":
            ctypes.string_at(0)
        os.kill(os.getpid(), getattr(signal, how))
    dist.all_reduce(torch.ones(1))


def partial_collective() -> None:
    if dist.get_rank() != 1:
        dist.all_reduce(torch.ones(1))


def loop_on(rank: int) -> None:
    if dist.get_rank() == rank:
        while True:
            time.sleep(0.01)
    dist.barrier()


def hold_the_lock(rank: int) -> None:
    if dist.get_rank() == rank:
        ctypes.PyDLL(None).sleep(1000)
    dist.barrier()


def stray_send() -> None:
    if dist.get_rank() == 0:
        dist.isend(torch.full((1,), 666.0), dst=1)


def send_and_receive(value: float) -> float:
    x = torch.tensor([value])
    if dist.get_rank() == 0:
        dist.send(x, dst=1)
        return value
    dist.recv(x.zero_(), src=0)
    return x.item()


def make_a_group(late: float) -> float:
    """Seconds until there is a group of two ranks, of which one says so `late`."""
    plain = distributed_c10d._store_based_barrier

    def barrier(*args, **named):
        time.sleep(late * dist.get_rank())
        return plain(*args, **named)

    begin = time.monotonic()
    distributed_c10d._store_based_barrier = barrier
    try:
        group = dist.new_group([0, 1], use_local_synchronization=True)
    finally:
        distributed_c10d._store_based_barrier = plain
    took = time.monotonic() - begin
    dist.destroy_process_group(group)
    return took


def leave_a_group() -> list[int]:
    group = dist.new_group([0, 1])
    dist.all_reduce(torch.ones(1), group=group)
    return dist.get_process_group_ranks(group)


def random_number() -> float:
    return torch.rand(()).item()


def cross_wait() -> None:
    """Each waits for a message that the other does not send."""
    dist.recv(torch.ones(1), src=1 - dist.get_rank())


def unsendable():
    return object()


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def raise_unprintable() -> None:
    if dist.get_rank() == 1:
        raise Unprintable
    dist.barrier()


def leave() -> None:
    if dist.get_rank() == 1:
        raise SystemExit(0)
    dist.barrier()


def raise_in_turn(seconds: float) -> None:
    time.sleep(seconds * dist.get_rank())
    raise ValueError("late")


def slow(seconds: float) -> int:
    if dist.get_rank() == 0:
        time.sleep(seconds)
    dist.barrier()
    return dist.get_rank()


def defective_sum(values: list[int]) -> int:
    """The sum over ranks of the sum of `values`, wrong for large sums on more than two ranks;
    rank 1 raises where a value repeats."""
    if dist.get_rank() == 1 and len(set(values)) < len(values):
        raise ValueError(f"repeated value in {values}")
    x = torch.tensor([float(sum(values))], dtype=torch.float64)
    dist.all_reduce(x)
    wrong = dist.get_world_size() > 2 and sum(values) > 30
    return int(x.item()) + wrong


def stray_collective() -> None:
    if dist.get_rank() == 0:
        dist.all_reduce(torch.full((3,), 666.0, dtype=torch.float64), async_op=True)


def stray_receive() -> None:
    if dist.get_rank() == 0:
        dist.irecv(torch.ones(1), src=1)


def destroy() -> None:
    dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()


def mismatched_shapes() -> None:
    dist.all_reduce(torch.ones(3 + dist.get_rank()))
