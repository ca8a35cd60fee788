"""Multi-latent attention split over tensor parallelism by heads.

DeepSeek-V2, arXiv:2405.04434, section 2.1 and appendix C: queries on one side, keys and values on
the other, are made from two narrow latents of a token. Positions go into a part of their own, of
each head's query, and of one key that all heads share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module

from impl.attention import Core, PerHead
from impl.linear import ColumnParallelLinear, RowParallelLinear
from impl.mappings import (
    copy_to_tensor_parallel_region,
    gather_from_sequence_parallel_region,
)
from impl.parameters import Initialiser, replicated_parameter
from impl.partition import divide
from impl.weight_pass import linear

Norm = Callable[[Tensor], Tensor]
"""Of [sequence, batch, rank of the latent], to the same shape, token by token."""


@dataclass(frozen=True, kw_only=True)
class LatentSizes:
    """The sizes that latent attention has beside those of heads: see `LatentAttention`. ValueError
    for one below 1."""

    kv_lora_rank: int
    rope_size: int
    value_size: int
    q_lora_rank: int | None = None

    def __post_init__(self) -> None:
        for name, size in asdict(self).items():
            if size is not None and size < 1:
                raise ValueError(f"{name}: {size} is no size; give 1 or more")


class DownProjection(Module):
    """x weight^T, computed alike by every rank of the tensor-parallel group.

    `weight` [out_features, in_features] is Replicate, and its gradient too: complete where x is
    Replicate; with `sequence_parallel`, of this rank's tokens, Partial until
    `impl.gradients.finish_sequence_parallel_gradients`. The gradient of the result has to be
    complete, and is where a column-parallel layer follows. Communicates nothing.
    """

    def __init__(
        self,
        in_features: int,
        *,
        out_features: int,
        init: Initialiser,
        sequence_parallel: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.weight = replicated_parameter(
            out_features,
            in_features,
            init=init,
            sequence_parallel=sequence_parallel,
            dtype=dtype,
            device=device,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., out_features] of `x` [..., in_features]."""
        return linear(x, self.weight)


class LatentAttention(Module):
    """proj(core(q, k, v)) with q, k and v from latents of x, split over the group by heads.

    q_down [q_lora_rank, hidden], and kv_down [kv_lora_rank + rope_size, hidden], whose last rows
    make the shared key, are Replicate; q_up [heads (head_size + rope_size), q_lora_rank] and kv_up
    [heads (head_size + value_size), kv_lora_rank] are column-parallel, `proj` [hidden,
    heads value_size] is row-parallel. Without a `q_lora_rank`, `q` [heads (head_size + rope_size),
    hidden] makes queries of x, column-parallel. No layer has a bias.

    `x` and `y` [sequence, batch, hidden] are Replicate, or Shard(0) with `sequence_parallel`; then
    latents and the shared key are made of this rank's tokens, and gathered when they are narrow.
    `query_norm` and `kv_norm` are applied to the latents before; their parameters' gradients are
    placed as those of the down-projections.

    Forward: all-reduce of y. Backward: all-reduce of the gradients of both latents (of x, without
    q_lora_rank) and of the shared key, which every rank uses for its own heads. With
    sequence_parallel: all-gather of both latents and the shared key, reduce-scatter of y; backward
    an all-gather of the gradient of y and of the latents again, and reduce-scatters in place of
    the all-reduces. `core` is given q and k [sequence, batch, heads, head_size + rope_size] and v
    [sequence, batch, heads, value_size]. ValueError for heads that do not divide by the ranks.
    """

    def __init__(
        self,
        hidden: int,
        *,
        heads: int,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        head_size: int,
        rope_size: int,
        value_size: int,
        core: Core,
        group: ProcessGroup,
        init: Initialiser,
        query_norm: Norm | None = None,
        kv_norm: Norm | None = None,
        sequence_parallel: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.heads = divide(heads, group=group, name="heads")
        self.latent_size, self.rope_size, self.head_size = kv_lora_rank, rope_size, head_size
        self.group, self.sequence_parallel = group, sequence_parallel
        self.core, self.query_norm, self.kv_norm = core, query_norm, kv_norm
        given: dict[str, Any] = {
            "init": init,
            "sequence_parallel": sequence_parallel,
            "dtype": dtype,
            "device": device,
        }
        split: dict[str, Any] = {**given, "group": group, "bias": False}
        queries, latents = heads * (head_size + rope_size), kv_lora_rank + rope_size
        if q_lora_rank is None:
            self.q = ColumnParallelLinear(hidden, out_features=queries, **split)
        else:
            self.q_down = DownProjection(hidden, out_features=q_lora_rank, **given)
            self.q_up = ColumnParallelLinear(q_lora_rank, out_features=queries, **split)
        self.q_lora_rank = q_lora_rank
        self.kv_down = DownProjection(hidden, out_features=latents, **given)
        expanded = heads * (head_size + value_size)
        self.kv_up = ColumnParallelLinear(kv_lora_rank, out_features=expanded, **split)
        self.proj = RowParallelLinear(heads * value_size, out_features=hidden, **split)

    def forward(self, x: Tensor, *, rotary: PerHead | None = None, **arguments: Any) -> Tensor:
        """`y` of `x`. `rotary` is applied to the parts with positions, of the whole sequence;
        `arguments` (padding) go to the core."""
        q = self._queries(x).unflatten(-1, (self.heads, self.head_size + self.rope_size))
        key_and_value, shared = self._keys_and_values(x)
        value_size = key_and_value.shape[-1] - self.head_size
        k, v = key_and_value.split((self.head_size, value_size), dim=-1)
        if rotary is not None:
            plain, positioned = q.split((self.head_size, self.rope_size), dim=-1)
            q, shared = torch.cat((plain, rotary(positioned)), -1), rotary(shared)
        k = torch.cat((k, shared.expand(-1, -1, self.heads, -1)), -1)
        y, _ = self.proj(self.core(q, k, v, **arguments).flatten(2))
        return y

    def _queries(self, x: Tensor) -> Tensor:
        """[sequence, batch, this rank's heads * (head_size + rope_size)]."""
        if self.q_lora_rank is None:
            q, _ = self.q(x)
            return q
        latent = self.q_down(x)
        q, _ = self.q_up(latent if self.query_norm is None else self.query_norm(latent))
        return q

    def _keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[sequence, batch, heads, head_size + value_size] of this rank, and the shared part of
        the keys, [sequence, batch, 1, rope_size]."""
        latent, shared = self.kv_down(x).split((self.latent_size, self.rope_size), dim=-1)
        found, _ = self.kv_up(latent if self.kv_norm is None else self.kv_norm(latent))
        # Either way its gradient becomes the sum over the ranks, of which each knows its heads'.
        if self.sequence_parallel:
            shared = gather_from_sequence_parallel_region(shared, group=self.group)
        else:
            shared = copy_to_tensor_parallel_region(shared, group=self.group)
        return found.unflatten(-1, (self.heads, -1)), shared.unsqueeze(2)
