"""Rank programs with one part of torch.distributed each. Their results are plain data, so that they
run on every cluster; sums are of small integers, so that no order of adding shows."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn.functional as differentiable
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


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


def groups_of_some() -> list:
    """Even and odd ranks; who is not in a group gets no group. Roots are global ranks."""
    rank, size = world()
    groups = [dist.new_group(list(range(parity, size, 2))) for parity in (0, 1)]
    x, y = values(2), values(2)
    mine = groups[rank % 2]
    dist.all_reduce(x, group=mine)
    dist.broadcast(y, src=rank % 2, group=mine)
    members = dist.get_process_group_ranks(mine)
    other = groups[1 - rank % 2]
    return [
        x,
        y,
        members,
        dist.get_rank(mine),
        dist.get_group_rank(mine, rank),
        dist.get_global_rank(mine, 0),
        other is dist.GroupMember.NON_GROUP_MEMBER,
        dist.get_rank(other),
    ]


def group_backwards() -> Tensor:
    """A group keeps its members sorted, whatever order they are given in."""
    _, size = world()
    group = dist.new_group(list(reversed(range(size))))
    out = empty(2 * size)
    dist.all_gather_into_tensor(out, values(2), group=group)
    return out


def groups_made_by_their_members() -> Tensor:
    rank, size = world()
    members = [r for r in range(size) if r % 2 == rank % 2]
    x = values(2)
    for _ in range(2):
        group = dist.new_group(members, use_local_synchronization=True)
        dist.all_reduce(x, group=group)
        dist.destroy_process_group(group)
    return x


def subgroups() -> list:
    rank, size = world()
    mine, groups = dist.new_subgroups(2)
    x = values(2)
    dist.all_reduce(x, group=mine)
    halves = [list(range(size // 2)), list(range(size // 2, size))]
    half, _ = dist.new_subgroups_by_enumeration(halves)
    y = values(2)
    dist.all_reduce(y, group=half)
    return [x, y, len(groups), dist.get_process_group_ranks(half), rank]


def groups_by_backend_name() -> Tensor:
    x = values(2)
    group = dist.new_group(backend="gloo")
    dist.all_reduce(x, group=group)
    dist.barrier(group=group)
    return x


def messages_in_a_group() -> list:
    """Peers named by global rank, and by rank in the group."""
    rank, size = world()
    group = dist.new_group([1, size - 1])
    got = [empty(1), empty(1)]
    if rank == 1:
        dist.send(values(1), size - 1, group=group)
        dist.send(values(1) + 1, group=group, group_dst=1)
    if rank == size - 1:
        dist.recv(got[0], 1, group=group)
        dist.recv(got[1], group=group, group_src=0)
    return got


def functional_collectives() -> list[Tensor]:
    _, size = world()
    group = dist.group.WORLD
    results = [
        functional.all_reduce(values(2), "sum", group),
        functional.all_reduce(values(2), "max", group),
        functional.all_gather_tensor(values(2, 3), 0, group),
        functional.all_gather_tensor(values(2, 3), 1, group),
        functional.reduce_scatter_tensor(values(2 * size, size), "sum", 0, group),
        functional.reduce_scatter_tensor(values(2, size), "sum", 1, group),
        functional.all_to_all_single(values(2 * size), None, None, group),
        functional.broadcast(values(2), 1, group),
        *functional.all_reduce_coalesced([values(2), values(3)], "sum", group),
        *functional.all_gather_into_tensor_coalesced([values(2), values(3)], group),
        *functional.reduce_scatter_tensor_coalesced(
            [values(size), values(2 * size)], "sum", [0, 0], group
        ),
    ]
    return [functional.wait_tensor(each).clone() for each in results]


def _leaf(*shape: int) -> Tensor:
    return values(*shape).requires_grad_()


def _backward(output: Tensor, leaf: Tensor) -> list[Tensor]:
    (output * values(*output.shape)).sum().backward()
    assert leaf.grad is not None
    return [output.detach().clone(), leaf.grad]


def functional_gradients() -> list[Tensor]:
    _, size = world()
    group = dist.group.WORLD
    programs = [
        (lambda x: functional.all_gather_tensor_autograd(x, 0, group), (2, 2)),
        (lambda x: functional.reduce_scatter_tensor_autograd(x, "sum", 0, group), (2 * size, 2)),
        (lambda x: functional.all_to_all_single_autograd(x, None, None, group), (size, 2)),
    ]
    kept = []
    for program, shape in programs:
        x = _leaf(*shape)
        kept += _backward(program(x), x)
    return kept


def differentiable_collectives() -> list[Tensor]:
    _, size = world()
    programs = [
        (differentiable.all_reduce, (2, 3)),
        (lambda x: torch.stack(differentiable.all_gather(x)), (2, 3)),
        (lambda x: differentiable.broadcast(x, 0), (2,)),
        (lambda x: differentiable.all_to_all_single(empty(size, 2), x), (size, 2)),
        (
            lambda x: torch.stack(
                list(differentiable.all_to_all([empty(2) for _ in range(size)], list(x)))
            ),
            (size, 2),
        ),
    ]
    kept = []
    for program, shape in programs:
        x = _leaf(*shape)
        kept += _backward(program(x), x)
    return kept


def mesh_groups() -> list:
    """A mesh of 2 x 1 x rest: its groups, slices and flattened axes."""
    _, size = world()
    mesh = init_device_mesh("cpu", (2, 1, size // 2), mesh_dim_names=("dp", "pp", "tp"))
    kept = []
    for name in ("dp", "pp", "tp"):
        group = mesh.get_group(name)
        x = values(2)
        dist.all_reduce(x, group=group)
        kept += [x, dist.get_process_group_ranks(group), mesh[name].get_local_rank()]
    inner = mesh["pp", "tp"]
    both = mesh["dp", "tp"]._flatten("dp_tp")
    x = values(2)
    dist.all_reduce(x, group=both.get_group())
    return [*kept, x, list(inner.shape), mesh.get_coordinate()]


def dtensors() -> list[Tensor]:
    """A matrix product over a 2D mesh, and its pieces redistributed."""
    _, size = world()
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
    a, b = values(4, 6, rank=1), values(6, 8, rank=2)
    left = dist.tensor.distribute_tensor(a, mesh, [Shard(0), Shard(1)])
    right = dist.tensor.distribute_tensor(b, mesh, [Replicate(), Shard(0)])
    left.requires_grad_()
    product = left @ right
    whole = product.full_tensor()
    assert torch.equal(whole, a @ b)
    product.redistribute(mesh, [Replicate(), Replicate()]).to_local().sum().backward()
    partial = DTensor.from_local(values(4, 4), mesh, [Partial(), Partial()])
    pieces = [
        partial.redistribute(mesh, placements).to_local()
        for placements in ([Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(1), Replicate()])
    ]
    swapped = left.redistribute(mesh, [Shard(1), Shard(0)]).to_local()
    return [whole, left.grad.full_tensor(), *pieces, swapped.detach()]


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


def drawn_input(size: int, rank: int, index: int) -> Tensor:
    return values(size, rank=rank + 50 * index)


def drawn_result(kind: str, inputs: list[Tensor], place: int) -> Tensor:
    """What a step leaves at a place of its group."""
    if kind == "all_reduce":
        return torch.stack(inputs).sum(0)
    if kind == "all_gather":
        return torch.cat(inputs)
    if kind == "broadcast":
        return inputs[0]
    return torch.stack([each[place] for each in inputs])


def drawn(members: list, steps: list, waits: list) -> dict[int, Tensor]:
    """Issues every step asynchronously, then waits in this rank's drawn order."""
    rank, _ = world()
    groups = [dist.new_group(ranks) for ranks in members]
    works, results = {}, {}
    for index, (number, kind) in enumerate(steps):
        ranks, group = members[number], groups[number]
        if rank not in ranks:
            continue
        x = drawn_input(len(ranks), rank, index)
        results[index] = x if kind in ("all_reduce", "broadcast") else empty(len(x))
        if kind == "all_reduce":
            works[index] = dist.all_reduce(x, group=group, async_op=True)
        elif kind == "broadcast":
            works[index] = dist.broadcast(x, ranks[0], group=group, async_op=True)
        elif kind == "all_gather":
            results[index] = empty(len(x) ** 2)
            works[index] = dist.all_gather_into_tensor(results[index], x, group, async_op=True)
        else:
            works[index] = dist.all_to_all_single(results[index], x, group=group, async_op=True)
    for index in waits[rank]:
        if index in works:
            works[index].wait()
    return results


def backend_names() -> tuple[str, str]:
    return dist.get_backend(), dist.get_backend(dist.new_group(backend="gloo"))


def in_mode(name: str, ranks: list[int]) -> list[Tensor]:
    rank, _ = world()
    mode = getattr(torch, name) if rank in ranks else torch.enable_grad
    with mode():
        x, got = values(2), empty(2)
        dist.all_reduce(x)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, values(2), 1 - rank),
                dist.P2POp(dist.irecv, got, 1 - rank),
            ]
        )
        for work in works:
            work.wait()
    return [x, got]


class _Counting(torch.utils._python_dispatch.TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations_seen() -> int:
    x, out = values(2), empty(6)
    with _Counting() as mode:
        dist.all_reduce(x)
        dist.all_gather_into_tensor(out, x)
        ring(x)
    return mode.count


def reduced_leaf() -> tuple[list[float], bool]:
    x = torch.ones(2, requires_grad=True)
    y = x * 1
    dist.all_reduce(y)
    y.sum().backward()
    return x.grad.tolist(), y.requires_grad


def transposed() -> None:
    dist.all_reduce(values(2, 3).T)
