"""Core attention of a layer: of this rank's heads, and of its chunks of the sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module
from torch.nn.init import zeros_

from impl.attention import checked_layer_number
from impl.context_parallel.attention import context_attention
from impl.context_parallel.dropout import ShareDropout
from impl.context_parallel.mask import AttentionMask
from impl.context_parallel.plan import ContextGroups
from impl.context_parallel.zigzag import PackedSequences, Placement
from impl.masking import alibi_slopes
from impl.parameters import sharded_parameter
from impl.random import RandomTracker
from impl.recompute import checkpoint


class ContextAttention(Module):
    """`context_attention` of this rank's heads, out of `heads` over `tp_group`.

    `alibi` biases by distance; a head's slope depends on its index among all heads. `sink` gives
    each head a learnable one, [heads] Shard(0) over tp, whose gradient is Partial over cp.
    `layer_number`, from 1 in the whole model, turns on the scaling by it. Shares are dropped while
    training. With a tracker as `recomputed_by`, backward computes attention again, collectives
    included, and only its inputs are kept.

    Collectives are those of the algorithm. ValueError as `context_attention` raises it, for a
    `layer_number` below 1, and for heads of which it has slopes or sinks and that do not divide by
    the size of the group.
    """

    slopes: Tensor | None

    def __init__(
        self,
        heads: int,
        *,
        tp_group: ProcessGroup,
        groups: ContextGroups,
        algorithm: str,
        placement: Placement,
        mask: AttentionMask,
        dropout: ShareDropout,
        scale: float | None = None,
        layer_number: int | None = None,
        alibi: bool,
        sink: bool,
        recomputed_by: RandomTracker | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.given: dict[str, Any] = {
            "algorithm": algorithm,
            "groups": groups,
            "placement": placement,
            "mask": mask,
            "scale": scale,
            "layer_number": checked_layer_number(layer_number),
        }
        self.dropout, self.tracker = dropout, recomputed_by
        slopes = alibi_slopes(heads, group=tp_group).to(device) if alibi else None
        self.register_buffer("slopes", slopes, persistent=False)
        made: dict[str, Any] = {"group": tp_group, "init": zeros_, "dtype": dtype, "device": device}
        self.sink = sharded_parameter(heads, dim=0, name="heads", **made) if sink else None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        packed: PackedSequences | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """[sequence / cp, batch, heads, e]. `packed` and `padding` as in `context_attention`."""
        if self.tracker is None:
            return self._attend(q, k, v, padding, packed)
        # Of copies, or what is kept were the fused tensor that they are parts of.
        q, k, v = (x.contiguous() for x in (q, k, v))
        return checkpoint(self._attend, q, k, v, padding, packed, tracker=self.tracker)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        padding: Tensor | None,
        packed: PackedSequences | None,
    ) -> Tensor:
        return context_attention(
            q,
            k,
            v,
            slopes=self.slopes,
            sink=self.sink,
            padding=padding,
            packed=packed,
            dropout=self.dropout if self.training else None,
            **self.given,
        )
