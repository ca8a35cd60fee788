"""Rank programs about groups, meshes, functional collectives and autograd around them, and drawn
programs; see sim_programs."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn.functional as differentiable
from sim_programs import empty, ring, values, world
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


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


def groups_made_by_their_members(again: bool = False) -> Tensor:
    """`again`: each is destroyed before the next of its name, which gloo takes for the first."""
    rank, size = world()
    members = [r for r in range(size) if r % 2 == rank % 2]
    x = values(2)
    for _ in range(2):
        group = dist.new_group(members, use_local_synchronization=True)
        dist.all_reduce(x, group=group)
        if again:
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


TRANSPOSED: dict[str, Callable[[Tensor], object]] = {
    "all_reduce": dist.all_reduce,
    "send": lambda x: dist.send(x, 1 - dist.get_rank()),
    "recv": lambda x: dist.recv(x, 1 - dist.get_rank()),
}


def transposed(operation: str) -> None:
    TRANSPOSED[operation](values(2, 3).T)
