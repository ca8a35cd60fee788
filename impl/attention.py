"""Attention over the heads of one rank, and the self-attention block split over tensor parallelism.

q is [queries, batch, heads, d], k [keys, batch, groups, d], v [keys, batch, groups, e]: the heads
fall into as many equal, consecutive groups as k and v have heads, and share those of their group
(multi-head with heads = groups; grouped, arXiv:2305.13245; multi-query with one). A rank has some
of the heads, and needs nothing of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module
from torch.nn.init import zeros_

from impl.dropout import check_probability
from impl.dropout import dropout as dropped
from impl.linear import ColumnParallelLinear, RowParallelLinear
from impl.mappings import all_gather_last_dim_from_tensor_parallel_region
from impl.masking import alibi_bias, alibi_slopes, allowed_pairs, last_positions
from impl.parameters import Initialiser, sharded_parameter
from impl.partition import divide
from impl.random import Stream

Core = Callable[..., Tensor]
"""core(q, k, v, **arguments) to [queries, batch, heads, e], of this rank's heads."""
PerHead = Callable[[Tensor], Tensor]
"""Of [sequence, batch, heads, d], to the same shape."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    layer_number: int,
    dropout: float,
    dropout_stream: Stream = nullcontext,
) -> Tensor:
    """softmax(scale q k^T + bias) v over the keys, [queries, batch, heads, e], in q's dtype.

    `allowed` (bool) and `bias` broadcast to [batch, heads, queries, keys]. A query that no key is
    allowed to gives zeros. `sink` [heads] is one more score of every query, whose share of the
    softmax goes nowhere (arXiv:2309.17453, learnable as in gpt-oss). The softmax is computed in
    float32, or float64 for float64. `layer_number` divides the products of q and k, which are in
    q's dtype, and multiplies them again in that of the softmax, so that float16 does not overflow.
    `dropout` is the probability of dropping a share after the softmax.

    Communicates nothing. Keeps for backward q, k, v and the shares [batch, heads, queries, keys],
    these twice in 16 bits, and three times with dropout.
    """
    _check_shapes(q, k, v)
    heads, groups = q.shape[2], k.shape[2]
    if heads % groups:
        raise ValueError(
            f"k: its {groups} heads do not divide the {heads} heads of q;"
            " give q a multiple of the heads of k and v"
        )
    batch, queries, keys = q.shape[1], q.shape[0], k.shape[0]
    grouped = (batch * groups, heads // groups * queries)
    query = _by_head(q * (scale / layer_number)).view(*grouped, -1)
    key, value = _by_head(k).flatten(0, 1), _by_head(v).flatten(0, 1)
    scores = (query @ key.transpose(1, 2)).view(batch, heads, queries, keys)
    shares = _shares(scores, allowed, bias, sink, layer_number).to(q.dtype)
    shares = dropped(shares, p=dropout, stream=dropout_stream)
    out = (shares.view(*grouped, keys) @ value).view(batch, heads, queries, -1)
    if allowed is not None:
        out = out.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    return out.permute(2, 0, 1, 3)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Products would broadcast a batch of one, or read memory as other heads."""
    fits = {q.dim(), k.dim(), v.dim()} == {4} and k.shape[:3] == v.shape[:3]
    if not fits or q.shape[1::2] != k.shape[1::2]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: give [sequence, batch,"
            " heads, d], the batch the same, d of q and k, and all but d of k and v"
        )


def _by_head(x: Tensor) -> Tensor:
    """[sequence, batch, heads, d] as [batch, heads, sequence, d]: always a copy, so that a fused
    tensor of which `x` is a part is not kept for backward."""
    return x.permute(1, 2, 0, 3).clone(memory_format=torch.contiguous_format)


def _shares(
    scores: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    sink: Tensor | None,
    layer_number: int,
) -> Tensor:
    """The softmax of the scores. In rows without an allowed key it is finite, and means nothing."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if layer_number != 1:
        scores = scores * layer_number
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        # As a summand, because autograd would keep the mask of a masked_fill.
        forbidden = ~allowed & allowed.any(-1, keepdim=True)
        scores = scores + torch.zeros_like(allowed, dtype=scores.dtype).masked_fill(
            forbidden, -math.inf
        )
    if sink is None:
        return torch.softmax(scores, -1)
    column = sink.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1]


def checked_layer_number(number: int | None) -> int:
    """The number, 1 for None, which scales by nothing. ValueError for one below 1."""
    if number is not None and number < 1:
        raise ValueError(f"layer_number: {number} is below 1; layers count from 1")
    return 1 if number is None else number


class CoreAttention(Module):
    """Attention of this rank's heads, out of `heads` over the group.

    `causal` attends to keys up to the query's position, `window` to so many keys that end, or
    unless causal also begin, at the query's own. The queries are the last of the keys' positions.
    `alibi` biases by distance (`impl.masking`). `sink` gives each head a learnable one, [heads]
    Shard(0). `scale` is 1 / sqrt(d) unless given. `layer_number`, from 1 in the whole model and not
    in one pipeline stage, turns on the scaling of queries and keys by it. Dropout draws from
    `dropout_stream`, which must differ on ranks of the group, because they have different heads.

    Communicates nothing. ValueError for heads that do not divide by the size of the group, and for
    a `window`, `layer_number` or `dropout` out of range.
    """

    slopes: Tensor | None

    def __init__(
        self,
        heads: int,
        *,
        group: ProcessGroup,
        causal: bool = True,
        window: int | None = None,
        alibi: bool = False,
        sink: bool = False,
        scale: float | None = None,
        layer_number: int | None = None,
        dropout: float = 0.0,
        dropout_stream: Stream = nullcontext,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.heads = divide(heads, group=group, name="heads")
        if window is not None and window < 1:
            raise ValueError(f"window: {window} is below 1; give 1 for the query's own key only")
        self.layer_number = checked_layer_number(layer_number)
        check_probability(dropout, name="dropout")
        self.causal, self.window, self.scale = causal, window, scale
        self.dropout, self.dropout_stream = dropout, dropout_stream
        slopes = alibi_slopes(heads, group=group).to(device) if alibi else None
        self.register_buffer("slopes", slopes, persistent=False)
        self.sink = (
            sharded_parameter(
                heads, dim=0, name="heads", group=group, init=zeros_, dtype=dtype, device=device
            )
            if sink
            else None
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, padding: Tensor | None = None) -> Tensor:
        """[queries, batch, heads, e]. `padding`, bool [batch, keys], is True where a key is not to
        be attended to."""
        if q.shape[2] != self.heads:
            raise ValueError(f"q: {q.shape[2]} heads; this rank has {self.heads}")
        queries, keys = last_positions(q.shape[0], keys=k.shape[0], device=q.device)
        allowed = allowed_pairs(queries, keys=keys, causal=self.causal, window=self.window)
        if padding is not None:
            if padding.shape != (q.shape[1], keys.numel()):
                raise ValueError(
                    f"padding: {list(padding.shape)} does not mark the keys; give [{q.shape[1]},"
                    f" {keys.numel()}], the batch first"
                )
            real = ~padding[:, None, None, :]
            allowed = real if allowed is None else allowed & real
        bias = None
        if self.slopes is not None:
            slopes = self.slopes.to(torch.promote_types(q.dtype, torch.float32))
            bias = alibi_bias(slopes, queries=queries, keys=keys)
        return attention(
            q,
            k,
            v,
            scale=q.shape[-1] ** -0.5 if self.scale is None else self.scale,
            allowed=allowed,
            bias=bias,
            sink=self.sink,
            layer_number=self.layer_number,
            dropout=self.dropout if self.training else 0.0,
            dropout_stream=self.dropout_stream,
        )


class SelfAttention(Module):
    """proj(core(q, k, v)) with q, k and v of one projection of x, split over the group by heads.

    `qkv` [(heads + 2 groups) head_size, hidden] is column-parallel. Its rows lie group by group,
    the queries of a group, then its key, then its value, as in Megatron-LM, so that a part of the
    rows has queries with their own keys. `proj` [hidden, heads head_size] is row-parallel. `x` and
    `y` [sequence, batch, hidden] are Replicate, or Shard(0) with `sequence_parallel`.

    Where there are fewer groups than ranks, a group's rows are spread over the ranks that share
    it. These gather the products and take from them their own queries, and the same k and v; the
    gradients of k and v are then summed over them.

    `core` is given this rank's q, k and v of the whole sequence, [sequence, batch, heads or groups,
    head_size], after `query_norm` and `key_norm` and after the rotation. A parameter of a norm has
    a gradient of this rank's heads only, with sequence parallelism and without.

    Communicates what the two layers do; with fewer groups than ranks also an all-gather of
    [sequence, batch, qkv rows] in forward and a reduce-scatter in backward. Errors are those of the
    layers; and ValueError for heads that do not divide by the groups or by the ranks, and for
    groups that neither divide by the ranks nor divide them.
    """

    def __init__(
        self,
        hidden: int,
        *,
        heads: int,
        head_size: int,
        core: Core,
        group: ProcessGroup,
        init: Initialiser,
        groups: int | None = None,
        bias: bool = True,
        query_norm: PerHead | None = None,
        key_norm: PerHead | None = None,
        sequence_parallel: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        groups = heads if groups is None else groups
        self.heads = divide(heads, group=group, name="heads")
        self.copies = _copies(groups, heads=heads, group=group)
        self.head_size, self.group = head_size, group
        self.groups, self.queries = max(groups // dist.get_world_size(group), 1), heads // groups
        self.core, self.query_norm, self.key_norm = core, query_norm, key_norm
        rows = (heads + 2 * groups) * head_size
        common: dict[str, Any] = {
            "group": group,
            "init": init,
            "bias": bias,
            "sequence_parallel": sequence_parallel,
            "dtype": dtype,
            "device": device,
        }
        self.qkv = ColumnParallelLinear(hidden, out_features=rows, **common)
        self.proj = RowParallelLinear(heads * head_size, out_features=hidden, **common)

    def forward(self, x: Tensor, *, rotary: PerHead | None = None, **arguments: Any) -> Tensor:
        """`y` of `x`. `rotary` is applied to q and k; `arguments` (padding) go to the core."""
        q, k, v = self._project(x)
        if self.query_norm is not None:
            q = self.query_norm(q)
        if self.key_norm is not None:
            k = self.key_norm(k)
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        y, _ = self.proj(self.core(q, k, v, **arguments).flatten(2))
        return y

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's q, k and v."""
        qkv, _ = self.qkv(x)
        if self.copies > 1:
            qkv = all_gather_last_dim_from_tensor_parallel_region(qkv, group=self.group)
            width = (self.queries + 2) * self.head_size
            qkv = qkv.narrow(-1, dist.get_rank(self.group) // self.copies * width, width)
        by_group = qkv.unflatten(-1, (self.groups, self.queries + 2, self.head_size))
        q, k, v = by_group.split((self.queries, 1, 1), dim=-2)
        q, k, v = q.flatten(2, 3), k.squeeze(-2), v.squeeze(-2)
        own = dist.get_rank(self.group) % self.copies * self.heads
        return q.narrow(2, own, self.heads), k, v


def _copies(groups: int, *, heads: int, group: ProcessGroup) -> int:
    """How many ranks share each group of heads: one, unless there are fewer groups than ranks."""
    ranks = dist.get_world_size(group)
    if groups < 1 or heads % groups:
        raise ValueError(
            f"groups: {groups} do not divide {heads} heads; give a number of groups that does"
        )
    if groups % ranks and ranks % groups:
        raise ValueError(
            f"groups: {groups} neither divide by nor divide the {ranks} ranks of the group;"
            f" give a multiple or a divisor of {ranks}"
        )
    return max(ranks // groups, 1)
