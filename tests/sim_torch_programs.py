"""Rank programs that use what torch builds upon its collectives: data parallelism, sharded
parameters, pipelines, checkpoints, autograd. Each returns plain data, the same on every cluster."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from sim_programs import values, world
from torch import Tensor, nn
from torch.distributed._functional_collectives import wait_tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint as recompute


class Summed(torch.autograd.Function):
    """The sum over ranks, forward and backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        total = upstream.contiguous().clone()
        dist.all_reduce(total)
        return total


class Shifted(torch.autograd.Function):
    """The tensor of the rank before, and its gradient from the rank after."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _shift(x, 1)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        return _shift(upstream, -1)


def _shift(x: Tensor, by: int) -> Tensor:
    rank, size = world()
    got = torch.empty_like(x)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x.contiguous(), (rank + by) % size),
            dist.P2POp(dist.irecv, got, (rank - by) % size),
        ]
    )
    for work in works:
        work.wait()
    return got


def network() -> nn.Sequential:
    """The same weights on every rank: small integers over four, so that sums are exact."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    for i, parameter in enumerate(model.parameters()):
        parameter.data.copy_(values(*parameter.shape, rank=50 + i) / 4)
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    return [g.full_tensor() if isinstance(g, DTensor) else g.clone() for g in found]


def collectives_in_backward() -> list[Tensor]:
    x = values(2, 3).requires_grad_()
    y = Shifted.apply(Summed.apply(x * 2) * values(2, 3))
    (y * values(2, 3)).sum().backward()
    return [y.detach(), x.grad]


def recomputed() -> list[Tensor]:
    """Recomputation issues the collectives of forward again, in backward."""
    x = values(2, 3).requires_grad_()
    y = recompute(lambda z: Summed.apply(z * z) * values(2, 3), x, use_reentrant=False)
    z = recompute(lambda w: Shifted.apply(w), y, use_reentrant=True)
    z.sum().backward()
    return [z.detach(), x.grad]


def hooks() -> list[Tensor]:
    """Gradients reduced from hooks, one asynchronously and waited for after backward."""
    rank, _ = world()
    works = []
    x, w = values(3).requires_grad_(), values(3, rank=9).requires_grad_()
    x.register_hook(lambda gradient: Summed.apply(gradient))

    def reduce(parameter: Tensor) -> None:
        works.append(dist.all_reduce(parameter.grad, async_op=True))

    w.register_post_accumulate_grad_hook(reduce)
    (x * w * (rank + 1)).sum().backward()
    for work in works:
        work.wait()
    return [x.grad, w.grad]


def data_parallel(bucket_cap_mb: float) -> list[Tensor]:
    """DistributedDataParallel, with gradient accumulation; power-of-two worlds are exact."""
    model = nn.parallel.DistributedDataParallel(network(), bucket_cap_mb=bucket_cap_mb)
    with model.no_sync():
        model(values(3, 4)).sum().backward()
    model(values(3, 4) + 1).sum().backward()
    return gradients(model)


def fully_sharded(resharded: bool) -> list[Tensor]:
    """FSDP2: parameters gathered in forward and backward, gradients reduce-scattered."""
    model = network()
    mesh = init_device_mesh("cpu", (world()[1],))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh, reshard_after_forward=resharded)
    fully_shard(model, mesh=mesh)
    for shift in (0, 1):
        y = model(values(3, 4) + shift)
        y.sum().backward()
    return [y.detach(), *gradients(model)]


def tensor_parallel() -> list[Tensor]:
    mesh = init_device_mesh("cpu", (world()[1],))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(network(), mesh, plan)
    x = values(3, 4, rank=7).requires_grad_()
    y = model(x)
    y.sum().backward()
    return [wait_tensor(y).detach().clone(), x.grad, *gradients(model)]


def pipelined() -> list[Tensor]:
    """A stage a rank, four microbatches."""
    rank, size = world()
    layer = nn.Linear(4, 4, bias=False).double()
    layer.weight.data.copy_(values(4, 4))
    stage = PipelineStage(layer, rank, size, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=4, loss_fn=lambda y, target: (y - target).sum())
    batch, target = values(8, 4, rank=1), values(8, 4, rank=2)
    if rank == 0:
        schedule.step(batch)
    elif rank == size - 1:
        schedule.step(target=target)
    else:
        schedule.step()
    return [layer.weight.grad]


def saved_and_loaded(folder: str) -> list:
    """Saved with one sharding, loaded with another."""
    _, size = world()
    mesh = init_device_mesh("cpu", (size,))
    x = values(6, 4, rank=3)
    checkpoint.save({"x": distribute_tensor(x, mesh, [Shard(0)]), "step": 7}, checkpoint_id=folder)
    state = {"x": distribute_tensor(torch.zeros_like(x), mesh, [Shard(1)]), "step": 0}
    checkpoint.load(state, checkpoint_id=folder)
    dist.barrier()
    return [state["x"].to_local(), state["step"], torch.equal(state["x"].full_tensor(), x)]


def replicated_dropout() -> list[Tensor]:
    """A seed set on every rank; each draws on its own."""
    rank, size = world()
    torch.manual_seed(5)
    x = torch.dropout(torch.ones(64), 0.5, True)
    extra = [torch.rand(1) for _ in range(rank)]
    dist.barrier()
    y = torch.rand(3)
    mesh = init_device_mesh("cpu", (size,))
    z = distribute_tensor(y, mesh, [Replicate()]).to_local()
    return [x, y, z, *extra]
