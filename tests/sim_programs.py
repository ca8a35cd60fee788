"""Rank programs with one part of torch.distributed each. Their results are plain data, so that they
run on every cluster; sums are of small integers, so that no order of adding shows."""

import torch
import torch.distributed as dist
from torch import Tensor


def values(*shape: int, rank: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Small integers, other ones on every rank."""
    own = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(100 + own)
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


def empty(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float64)


def world() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def all_reduce(op: str, dtype: torch.dtype, factor: float | None = None) -> Tensor:
    x = values(2, 3, dtype=dtype)
    reduce_op = getattr(dist.ReduceOp, op)
    if factor is not None:
        reduce_op = dist._make_nccl_premul_sum(factor)
    dist.all_reduce(x, reduce_op)
    return x


def reduce_scatter(op: str, factor: float | None = None) -> Tensor:
    _, size = world()
    reduce_op = getattr(dist.ReduceOp, op)
    if factor is not None:
        reduce_op = dist._make_nccl_premul_sum(factor)
    out = empty(2)
    dist.reduce_scatter_tensor(out, values(2 * size), reduce_op)
    return out


def all_reduce_of_no_element_and_of_a_number() -> list[Tensor]:
    nothing, number = values(0, 3), values()
    dist.all_reduce(nothing)
    dist.all_reduce(number)
    return [nothing, number]


def all_reduce_of_a_slice() -> Tensor:
    """Only the middle of a buffer is reduced."""
    buffer = values(9)
    dist.all_reduce(buffer[3:6])
    return buffer


def all_reduce_of_narrow_types() -> list[Tensor]:
    kept = [values(4, dtype=t) for t in (torch.float32, torch.float16, torch.bfloat16)]
    kept += [values(4, dtype=t) for t in (torch.int32, torch.int8)]
    for x in kept:
        dist.all_reduce(x)
    return kept


def all_gather_list() -> list[Tensor]:
    _, size = world()
    out = [empty(2, 3) for _ in range(size)]
    dist.all_gather(out, values(2, 3))
    return out


def all_gather_into_tensor() -> list[Tensor]:
    """Under its present and its former name."""
    _, size = world()
    outputs = [empty(2 * size, 3), empty(2 * size, 3)]
    for gather, output in zip(
        (dist.all_gather_single, dist.all_gather_into_tensor), outputs, strict=True
    ):
        gather(output, values(2, 3))
    return outputs


def stacked() -> list[Tensor]:
    """Forms that NCCL has and gloo has not: outputs and inputs of one dimension more."""
    _, size = world()
    whole, numbers, part = empty(size, 2, 3), empty(size), empty(2, 3)
    dist.all_gather_into_tensor(whole, values(2, 3))
    dist.all_gather_into_tensor(numbers, values())
    dist.reduce_scatter_tensor(part, values(size, 2, 3))
    return [whole, numbers, part]


def reduce_scatter_list() -> Tensor:
    rank, size = world()
    out = empty(2, 3)
    dist.reduce_scatter(out, [values(2, 3, rank=rank + 10 * i) for i in range(size)])
    return out


def reduce_scatter_tensor() -> list[Tensor]:
    """Under its present and its former name."""
    _, size = world()
    outputs = [empty(2, 3), empty(2, 3)]
    for scatter, output in zip(
        (dist.reduce_scatter_single, dist.reduce_scatter_tensor), outputs, strict=True
    ):
        scatter(output, values(2 * size, 3))
    return outputs


def all_to_all_list() -> list[Tensor]:
    rank, size = world()
    out = [empty(3, 2) for _ in range(size)]
    dist.all_to_all(out, [values(3, 2, rank=rank + 10 * i) for i in range(size)])
    return out


def all_to_all_list_uneven() -> list[Tensor]:
    """Every pair of ranks exchanges a tensor of its own shape, some empty; gloo cannot."""
    rank, size = world()
    out = [empty(abs(rank - source), 2) for source in range(size)]
    dist.all_to_all(out, [values(abs(rank - i), 2, rank=rank + 10 * i) for i in range(size)])
    return out


def all_to_all_single() -> Tensor:
    _, size = world()
    out = empty(2 * size, 3)
    dist.all_to_all_single(out, values(2 * size, 3))
    return out


def all_to_all_single_uneven() -> Tensor:
    """Rank r sends (r + target) % size rows, so some send nothing."""
    rank, size = world()
    sizes = [(rank + other) % size for other in range(size)]
    out = empty(sum(sizes), 2)
    dist.all_to_all_single(out, values(sum(sizes), 2), sizes, sizes)
    return out


def broadcast() -> list[Tensor]:
    _, size = world()
    kept = []
    for root in range(size):
        x = values(3)
        dist.broadcast(x, root)
        kept.append(x)
    return kept


def scatter() -> list[Tensor]:
    rank, size = world()
    kept = []
    for root in range(size):
        out = empty(2)
        parts = [values(2, rank=i) for i in range(size)] if rank == root else None
        dist.scatter(out, parts, src=root)
        kept.append(out)
    return kept


def gather() -> list[Tensor]:
    rank, size = world()
    kept = []
    for root in range(size):
        out = [empty(2) for _ in range(size)] if rank == root else None
        dist.gather(values(2), out, dst=root)
        kept += out or []
    return kept


def reduce() -> list[Tensor]:
    """Only what the root gets: backends leave the other ranks' tensors in different states."""
    rank, size = world()
    kept = []
    for root in range(size):
        x = values(2)
        dist.reduce(x, root)
        kept += [x] if rank == root else []
    return kept


def objects() -> list:
    rank, size = world()
    gathered, on_root = [None] * size, [None] * size
    dist.all_gather_object(gathered, {"rank": rank, "shape": [rank] * rank})
    dist.gather_object((rank, [rank]), on_root if rank == 1 else None, dst=1)
    told = [rank, {"a": 1.5}, None] if rank == size - 1 else [None] * 3
    dist.broadcast_object_list(told, src=size - 1)
    mine = [None]
    dist.scatter_object_list(mine, [{"for": i} for i in range(size)] if rank == 0 else None, src=0)
    return [gathered, on_root, told, mine]


def send_object_lists() -> list:
    rank, size = world()
    got = [None, None]
    if rank:
        dist.recv_object_list(got, src=rank - 1)
    if rank < size - 1:
        dist.send_object_list([rank, {"to": rank + 1}], dst=rank + 1)
    return got


def ring(x: Tensor) -> Tensor:
    rank, size = world()
    got = torch.empty_like(x)
    work = dist.isend(x, (rank + 1) % size)
    dist.recv(got, (rank - 1) % size)
    work.wait()
    return got


def messages_by_tag() -> list[Tensor]:
    """Received in another order than sent."""
    rank, _ = world()
    got = [empty(2) for _ in range(3)]
    if rank == 0:
        for work in [dist.isend(values(2, rank=tag), 1, tag=tag) for tag in range(3)]:
            work.wait()
    elif rank == 1:
        for tag in (2, 0, 1):
            dist.recv(got[tag], 0, tag=tag)
    return got


def messages_in_order() -> list[Tensor]:
    """The sender changes what it sent; posted receives keep their order."""
    rank, _ = world()
    got = [empty(1) for _ in range(4)]
    if rank == 0:
        x = values(1)
        for _ in range(4):
            dist.send(x, 1)
            x += 1
    elif rank == 1:
        for work in [dist.irecv(x, 0) for x in got]:
            work.wait()
    return got


def from_any_rank() -> list:
    """Rank 0 hears every other once and is told who it was."""
    rank, size = world()
    if rank:
        dist.send(values(1), 0)
        return []
    heard = {}
    for _ in range(size - 1):
        x = empty(1)
        heard[dist.recv(x)] = x
    return [(source, heard[source]) for source in sorted(heard)]


def batched_messages() -> list[Tensor]:
    rank, size = world()
    got = [empty(2), empty(2)]
    after, before = (rank + 1) % size, (rank - 1) % size
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, values(2), after),
            dist.P2POp(dist.irecv, got[0], before),
            dist.P2POp(dist.isend, values(2) + 1, before),
            dist.P2POp(dist.irecv, got[1], after),
        ]
    )
    for work in works:
        work.wait()
    return got


def asynchronous() -> list[Tensor]:
    """Everything with async_op, all in flight together, waited for last to first."""
    rank, size = world()
    x = {name: values(2 * size, 2) for name in ("reduced", "told", "summed")}
    gathered = [empty(2) for _ in range(size)]
    whole, part, swapped = empty(size * 2), empty(2), empty(size)
    parts, mine, listed = [empty(1) for _ in range(size)], empty(1), empty(1)
    works = [
        dist.all_reduce(x["reduced"], async_op=True),
        dist.broadcast(x["told"], 0, async_op=True),
        dist.reduce(x["summed"], 0, async_op=True),
        dist.all_gather(gathered, values(2), async_op=True),
        dist.all_gather_into_tensor(whole, values(2), async_op=True),
        dist.reduce_scatter_tensor(part, values(2 * size), async_op=True),
        dist.reduce_scatter(listed, list(values(size).chunk(size)), async_op=True),
        dist.all_to_all_single(swapped, values(size), async_op=True),
        dist.gather(values(1), parts if rank == 0 else None, 0, async_op=True),
        dist.scatter(mine, [values(1)] * size if rank == 0 else None, 0, async_op=True),
        dist.barrier(async_op=True),
    ]
    for work in reversed(works):
        work.wait()
    outcome = [x["reduced"], x["told"], *gathered, whole, part, listed, swapped, *parts, mine]
    return [*outcome, x["summed"]] if rank == 0 else outcome


def futures() -> list[Tensor]:
    x, total = values(2), values(2)
    future = dist.all_reduce(x, async_op=True).get_future()
    doubled = future.then(lambda done: done.value()[0] * 2)
    doubled.wait()
    work = dist.all_reduce(total, async_op=True)
    work.wait()
    return [x, *future.value(), doubled.value(), *work.result()]


def polling() -> Tensor:
    """Waits by asking again and again."""
    x = values(2)
    work = dist.all_reduce(x, async_op=True)
    while not work.is_completed():
        pass
    return x


def polling_the_store() -> bytes:
    """Rank 0 asks until the last rank has set a key."""
    rank, size = world()
    store = dist.distributed_c10d._get_default_store()
    if rank == size - 1:
        store.set("key", b"value")
        store.add("count", 2)
    while not store.check(["key", "count"]):
        pass
    assert store.add("count", rank) >= 2
    return store.get("key")


def coalesced() -> list[Tensor]:
    _, size = world()
    x = [values(2), values(3)]
    with dist._coalescing_manager() as manager:
        for each in x:
            dist.all_reduce(each)
    y = [values(2 * size), values(4 * size)]
    parts, wholes = [empty(2), empty(4)], [empty(2 * size), empty(4 * size)]
    with dist._coalescing_manager(async_ops=True) as manager:
        for part, each in zip(parts, y, strict=True):
            dist.reduce_scatter_tensor(part, each)
    manager.wait()
    with dist._coalescing_manager(async_ops=True) as manager:
        for part, whole in zip(parts, wholes, strict=True):
            dist.all_gather_into_tensor(whole, part)
    manager.wait()
    return [*x, *parts, *wholes]


def coalesced_by_name() -> list[Tensor]:
    """The list forms that came before the coalescing manager."""
    _, size = world()
    x = [values(2), values(3)]
    dist.all_reduce_coalesced(x)
    lists = [[empty(2), empty(1)] for _ in range(size)]
    dist.all_gather_coalesced(lists, [values(2), values(1)])
    return [*x, *(each for per_rank in lists for each in per_rank)]


def barriers() -> None:
    dist.barrier()
    dist.monitored_barrier()


def own_ring() -> Tensor:
    return ring(values(3))


def fractions(count: int, rank: int) -> Tensor:
    """Numbers whose float32 sum depends on the order of adding."""
    return torch.randn(count, generator=torch.Generator().manual_seed(rank)) * 10.0**rank


def rounded_sums(dtype: torch.dtype) -> list[Tensor]:
    """All-reduced, reduce-scattered and gathered again, reduced to rank 0 and broadcast."""
    rank, size = world()
    x, root = fractions(16, rank).to(dtype), fractions(16, rank).to(dtype)
    part, again = torch.empty(16 // size, dtype=dtype), torch.empty(16, dtype=dtype)
    dist.reduce_scatter_tensor(part, x)
    dist.all_gather_into_tensor(again, part)
    dist.all_reduce(x)
    dist.reduce(root, 0)
    dist.broadcast(root, 0)
    return [x, again, root]
