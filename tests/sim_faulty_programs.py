"""Rank programs that go wrong."""

import os
import threading
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from sim_programs import values, world

released = threading.Event()


def total() -> tuple[int, float]:
    x = torch.tensor([1.0 + dist.get_rank()])
    dist.all_reduce(x)
    return dist.get_world_size(), x.item()


def missing_rank() -> None:
    if dist.get_rank() != 1:
        dist.all_reduce(torch.ones(2, 3))


def crossed_receives() -> None:
    dist.recv(torch.ones(2), src=1 - dist.get_rank())


def crossed_groups() -> None:
    """Ranks 0 and 1 take two groups in opposite orders."""
    rank, _ = world()
    groups = [dist.new_group([0, 1]), dist.new_group([0, 1])]
    for group in groups if rank == 0 else groups[::-1]:
        if rank < 2:
            dist.all_reduce(torch.ones(1), group=group)


def waits_for_a_key() -> None:
    rank, _ = world()
    store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        store.set("there", "yes")
    store.get("there" if rank == 0 else "never")


def waits_late() -> None:
    """Issues at one place and waits at another; the other rank ends."""
    if dist.get_rank() == 0:
        work = dist.all_reduce(torch.ones(5), async_op=True)
        work.wait()


class Stuck(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        dist.broadcast(upstream.clone(), 0)
        return upstream


def stuck_in_backward() -> None:
    x = torch.ones(2, requires_grad=True)
    y = Stuck.apply(x) if dist.get_rank() == 0 else x * 2
    y.sum().backward()


def other_operation() -> None:
    x = values(2)
    if dist.get_rank() == 1:
        dist.broadcast(x, 0)
    else:
        dist.all_reduce(x)


def other_shape() -> None:
    dist.all_reduce(values(2 + (dist.get_rank() == 1), 3))


def other_dtype() -> None:
    dist.all_reduce(values(2, dtype=torch.float32 if dist.get_rank() == 1 else torch.float64))


def other_reduction() -> None:
    dist.all_reduce(values(2), dist.ReduceOp.MAX if dist.get_rank() == 1 else dist.ReduceOp.SUM)


def other_root() -> None:
    dist.broadcast(values(2), src=int(dist.get_rank() == 1))


def other_reduce_root() -> None:
    dist.reduce(values(2), dst=int(dist.get_rank() == 1))


def other_gather_shape() -> None:
    rank, size = world()
    out = [torch.empty(2, dtype=torch.float64) for _ in range(size)] if rank == 0 else None
    dist.gather(values(2 + (rank == 1)), out, dst=0)


def other_list_shape() -> None:
    rank, size = world()
    out = [torch.empty(2, dtype=torch.float64) for _ in range(size)]
    dist.all_gather(out, values(3) if rank == 1 else values(2))


def other_scatter_shape() -> None:
    rank, size = world()
    out = torch.empty(2 + (rank == 1), dtype=torch.float64)
    dist.scatter(out, [values(2)] * size if rank == 0 else None, src=0)


def other_splits() -> None:
    """Rank 1 expects another share from rank 0 than rank 0 sends."""
    rank, size = world()
    sizes = [1] * size
    expected = [2, 0, *sizes[2:]] if rank == 1 else sizes
    out = torch.empty(size, 2, dtype=torch.float64)
    dist.all_to_all_single(out, values(size, 2), expected, sizes)


def other_list_of_exchange() -> None:
    rank, size = world()
    out = [torch.empty(2, dtype=torch.float64) for _ in range(size)]
    given = [values(2 + (rank == 1 and other == 0)) for other in range(size)]
    dist.all_to_all(out, given)


def other_number_of_tensors() -> None:
    dist.all_reduce_coalesced([values(2)] * (2 if dist.get_rank() == 1 else 1))


def other_order() -> None:
    x = values(2)
    for kind in ("sum", "told") if dist.get_rank() != 1 else ("told", "sum"):
        if kind == "sum":
            dist.all_reduce(x)
        else:
            dist.broadcast(x, 0)


def other_members() -> None:
    """Rank 1 takes the group to be of other ranks than the rest."""
    group = dist.new_group([0, 1] if dist.get_rank() == 1 else [0, 1, 2])
    dist.all_reduce(values(1), group=group)


def other_message_shape() -> None:
    if dist.get_rank() == 0:
        dist.send(values(3), 1)
    elif dist.get_rank() == 1:
        dist.recv(values(2), 0)


def other_message_dtype() -> None:
    if dist.get_rank() == 0:
        dist.send(values(2), 1)
    elif dist.get_rank() == 1:
        dist.recv(values(2, dtype=torch.float32), 0)


def in_a_subgroup() -> None:
    """Only ranks 2 and 3 disagree, in a group of their own."""
    rank, _ = world()
    group, _ = dist.new_subgroups(2)
    dist.all_reduce(values(2 + (rank == 3)), group=group)


def raises(ranks: list[int]) -> None:
    if dist.get_rank() in ranks:
        raise ValueError(f"refused on {dist.get_rank()}")
    dist.all_reduce(torch.ones(2))


def raises_after_a_collective(ranks: list[int]) -> None:
    dist.all_reduce(torch.ones(2))
    if dist.get_rank() in ranks:
        raise KeyError("late")


def raises_while_others_compute() -> str:
    """Rank 1 fails first; rank 2 then fails on its own, rank 0 finishes."""
    rank, _ = world()
    dist.barrier()
    if rank == 0:
        return "finished"
    raise ValueError(f"refused on {rank}")


def swallows() -> int:
    """Goes on after whatever is raised where it communicates."""
    caught = 0
    if dist.get_rank() == 1:
        raise ValueError("refused on 1")
    for _ in range(20):
        try:
            dist.all_reduce(torch.ones(2))
        except BaseException:
            caught += 1
    return caught


def communicates(kind: str) -> None:
    if dist.get_rank() == 1:
        raise ValueError("refused on 1")
    if kind == "reduces":
        dist.all_reduce(torch.ones(1))


def cleans_up() -> None:
    """A `finally` that communicates, as frameworks have; it meets the others' all-reduce."""
    try:
        communicates("reduces")
    finally:
        dist.barrier()


def cleans_up_alone() -> None:
    try:
        communicates("nothing")
    finally:
        if dist.get_rank() == 1:
            dist.barrier()


def raises_and_the_others_differ() -> None:
    rank, _ = world()
    if rank == 0:
        raise ValueError("refused on 0")
    group = dist.new_group([1, 2], use_local_synchronization=True)
    if rank == 1:
        dist.all_reduce(values(1), group=group)
    else:
        dist.broadcast(values(1), 1, group=group)


def raises_and_another_loops() -> None:
    rank, _ = world()
    if rank == 0:
        raise ValueError("refused on 0")
    while rank == 1:
        time.sleep(0.001)


def leaves(kind: str) -> None:
    if dist.get_rank() == 1:
        raise {"exit": SystemExit(3), "interrupt": KeyboardInterrupt()}[kind]
    dist.barrier()


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def raises_unprintable() -> None:
    if dist.get_rank() == 1:
        raise Unprintable
    dist.barrier()


def loops(rank: int) -> None:
    if dist.get_rank() == rank:
        while True:
            time.sleep(0.001)
    dist.barrier()


def loops_and_swallows() -> None:
    """Does not end when it is asked to, until the test says so."""
    if dist.get_rank() == 0:
        while not released.is_set():
            try:
                time.sleep(0.01)
            except BaseException:
                continue
    dist.barrier()


def loops_on_communication() -> None:
    """Ranks 0 and 1 never stop; the rest wait for them."""
    rank, _ = world()
    while rank < 2:
        dist.isend(torch.ones(1), 1 - rank)
        dist.recv(torch.ones(1), 1 - rank)
    dist.barrier()


def stray_send() -> None:
    if dist.get_rank() == 0:
        dist.isend(values(2), 1)


def stray_receive() -> None:
    if dist.get_rank() == 0:
        dist.irecv(values(2), 1)


def stray_collective() -> None:
    if dist.get_rank() == 0:
        dist.all_reduce(values(2), async_op=True)


def sleeps_then(seconds: float) -> None:
    time.sleep(seconds)
    dist.barrier()


def nested(cluster) -> None:
    cluster.run(total, world_size=1)


@dataclass(frozen=True)
class Argument:
    tensor: torch.Tensor
    numbers: list[int]


def changed(argument: Argument) -> Argument:
    argument.tensor.add_(dist.get_rank())
    argument.numbers.append(dist.get_rank())
    return argument


def processors() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0))


def echo(value: object) -> object:
    return value
