"""What the benchmark of clusters runs: rank programs, and the same arithmetic with no ranks.

Every program makes its weights from seeds, runs forward and backward, and returns a number that
tells whether the arithmetic was the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

Weights = list[Tensor]


class Copy(torch.autograd.Function):
    """The tensor itself; its gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        total = upstream.contiguous()
        dist.all_reduce(total)
        return total


class Reduce(torch.autograd.Function):
    """The sum over ranks, in place; its gradient is passed on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream


def _normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5


class Mlp:
    """Column linear, gelu, row linear: one all-reduce forward and one backward."""

    rows, hidden, ffn = 16, 64, 128

    def inputs(self) -> Tensor:
        return _normal(self.rows, self.hidden, seed=1)

    def weights(self, rank: int, size: int) -> Weights:
        ffn = self.ffn // size
        return [
            _normal(ffn, self.hidden, seed=10 + rank).requires_grad_(),
            _normal(self.hidden, ffn, seed=50 + rank).requires_grad_(),
        ]

    def blocks(self, weights: Weights) -> list[Callable[[Tensor], Tensor]]:
        """What a rank computes between the two ends of each tensor-parallel block."""
        fc1, fc2 = weights
        return [lambda x: functional.linear(functional.gelu(functional.linear(x, fc1)), fc2)]


class Layer(Mlp):
    """Attention and MLP of a transformer layer at batch one: two all-reduces each way."""

    rows, hidden, ffn, heads = 256, 512, 2048, 8

    def weights(self, rank: int, size: int) -> Weights:
        hidden = self.hidden // size
        return [
            _normal(3 * hidden, self.hidden, seed=100 + rank).requires_grad_(),
            _normal(self.hidden, hidden, seed=150 + rank).requires_grad_(),
            *super().weights(rank, size),
        ]

    def blocks(self, weights: Weights) -> list[Callable[[Tensor], Tensor]]:
        qkv, out, *mlp = weights

        def attention(x: Tensor) -> Tensor:
            y = functional.linear(functional.layer_norm(x, x.shape[-1:]), qkv)
            split = y.view(len(x), 3, -1, self.hidden // self.heads)
            q, k, v = split.permute(1, 2, 0, 3).unbind(0)
            z = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return functional.linear(z.transpose(0, 1).reshape(len(x), -1), out)

        (inner,) = super().blocks(mlp)
        return [attention, lambda x: inner(functional.layer_norm(x, x.shape[-1:]))]


WORKLOADS = {"mlp": Mlp(), "layer": Layer()}


def parallel(x: Tensor, blocks: list[Callable[[Tensor], Tensor]]) -> Tensor:
    """Forward and backward on one rank; the output."""
    for block in blocks:
        x = Reduce.apply(block(Copy.apply(x)))
    x.backward(torch.ones_like(x))
    return x


def train(name: str) -> float:
    """A rank program: one step; the squares of the gradient of the input, summed."""
    work = WORKLOADS[name]
    weights = work.weights(dist.get_rank(), dist.get_world_size())
    x = work.inputs().requires_grad_()
    parallel(x, work.blocks(weights))
    assert x.grad is not None
    return x.grad.square().sum().item()


class _Passed(torch.autograd.Function):
    """What is left of Copy and Reduce without ranks: nothing, at the cost of a function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream


def bare(name: str, size: int, functions: bool = True) -> list[float]:
    """What the ranks of `train` compute, in one thread and in the order in which ranks that take
    turns compute it: from one sum to the next one rank after another, and the sums in rank order.
    `functions`: with the autograd functions around each block that the rank program has, which the
    arithmetic alone does not need."""
    work = WORKLOADS[name]
    wrap = _Passed.apply if functions else (lambda x: x)
    blocks: list[list[Callable[[Tensor], Tensor]]] = []
    leaves: list[list[Tensor]] = []
    outputs: list[list[Tensor]] = []
    xs: list[Tensor] = []
    for rank in range(size):
        blocks.append(work.blocks(work.weights(rank, size)))
        xs.append(work.inputs())
        if rank == 0:
            leaves, outputs = ([[] for _ in blocks[0]] for _ in range(2))
        _block(blocks[rank][0], xs[rank], wrap, leaves[0], outputs[0])
    for number in range(1, len(leaves)):
        total = _sum([each.detach() for each in outputs[number - 1]])
        for rank in range(size):
            _block(blocks[rank][number], total.clone(), wrap, leaves[number], outputs[number])
    upstream = [torch.ones_like(_sum([each.detach() for each in outputs[-1]])) for _ in range(size)]
    for leaf, output in zip(reversed(leaves), reversed(outputs), strict=True):
        for rank in range(size):
            output[rank].backward(upstream[rank])
        total = _sum([each.grad for each in leaf])  # type: ignore[misc]
        upstream = [total.clone() for _ in range(size)]
    return [each.square().sum().item() for each in upstream]


def _block(
    block: Callable[[Tensor], Tensor],
    x: Tensor,
    wrap: Callable[[Tensor], Tensor],
    leaves: list[Tensor],
    outputs: list[Tensor],
) -> None:
    leaves.append(x.requires_grad_())
    outputs.append(wrap(block(wrap(x))))


def _sum(tensors: list[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total.add_(tensor)
    return total


def all_reduces(count: int) -> float:
    """A rank program: seconds for one all-reduce of 1 KiB."""
    x = torch.ones(256)
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(count):
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return (time.perf_counter() - begin) / count


def barriers(count: int) -> float:
    """A rank program: seconds for one barrier."""
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(count):
        dist.barrier()
    return (time.perf_counter() - begin) / count
