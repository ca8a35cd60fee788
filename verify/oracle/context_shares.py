"""How the scores of an attention over cp become shares, whichever pairs its mask allows.

The options are those of attention that is not split over cp: key padding, ALiBi (arXiv:2108.12409),
a learnable sink (arXiv:2309.17453), query-key layer scaling, a scale, dropout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verify.case import Case
from verify.disturbance import of_output
from verify.oracle.attention import fit_heads, slopes
from verify.oracle.contract import Step, Tensors, TensorSpec
from verify.oracle.terms import fit, number, switches, whole_number
from verify.placement import Cut, Placements

SHARED = ("padding", "alibi", "sink", "layer_number", "scale")


@dataclass(frozen=True)
class Shares:
    """`padding`: no query attends to keys that the input `padding` [batch, sequence] marks, and one
    that may attend to nothing gives zeros. `alibi`: minus slope times distance is added to scores,
    with the slopes of a head by its index among all. `sink`: one more score for each head, which
    takes its share of the softmax and gives nothing. `scale`: instead of 1 / sqrt(d). `dropout` is
    of shares. (`layer_number` divides products and multiplies them again: no exact result changes.)
    """

    case: Case
    padding: bool
    alibi: bool
    sink: bool
    scale: float | None
    dropout: float

    @staticmethod
    def of(case: Case, *, dropout: float) -> Shares:
        """The options of a case. Raises BadArgument for a value out of range."""
        given = switches(case, dict.fromkeys(("padding", "alibi", "sink"), False))
        whole_number(case, "layer_number", least=1)
        scale = number(case, "scale", least=0.0)
        return Shares(case, **given, scale=scale, dropout=dropout)

    @property
    def marks(self) -> int:
        """How many keys are marked or not, those of all ranks together."""
        shape = self.case.shape
        return shape["batch"] * shape["sequence"] if self.padding else 0

    @property
    def forward(self) -> tuple[Step, ...]:
        """Marks are gathered once."""
        marks = self.marks // self.case.layout.cp
        return (Step("all_gather", "cp", marks),) if self.padding else ()

    def inputs(self, cut: Cut) -> dict[str, TensorSpec]:
        """The marks, 1 for a key that is padding, where the case has them. They lie over cp as the
        tokens do, whose dimension 0 is cut."""
        shape = (self.case.shape["batch"], self.case.shape["sequence"])
        placed: Placements = {"cp": replace(cut, dim=1)}
        return {"padding": TensorSpec(shape, placed, None, high=2)} if self.padding else {}

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        inputs: Tensors,
        *,
        allowed: Tensor,
        positions: Tensor,
        sink: Tensor | None = None,
    ) -> Tensor:
        """[sequence, batch, heads, e] of q [sequence, batch, heads, d], k and v of some of as many
        heads. `allowed`, bool [queries, keys], is of the mask; `inputs` may have marks of padding,
        and what dropout kept as `shares` [batch, heads, queries, keys]."""
        fit("q", q, (allowed.shape[-2], *q.shape[1:]))
        fit("k", k, (allowed.shape[-1], *k.shape[1:]))
        if "padding" in inputs:
            fit("padding", inputs["padding"], (q.shape[1], k.shape[0]))
            allowed = allowed & (inputs["padding"] == 0)[:, None, None, :]
        bias = None
        if self.alibi:
            distance = (positions[:, None] - positions[None, :]).abs()
            by_head = torch.tensor(slopes(self.case.shape["heads"]), dtype=torch.float64)
            fit("q", q, (*q.shape[:2], len(by_head), *q.shape[3:]))
            bias = -by_head.view(-1, 1, 1) * distance
        given = {"kept": inputs.get("shares"), "sink": sink, "bias": bias}
        factor = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return plain_attention(
            q, k, v, allowed=allowed, factor=factor, dropout=self.dropout, **given
        )


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    allowed: Tensor,
    factor: float,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    kept: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """[sequence, batch, heads, ...] on one device. Zeros for a query without an allowed key.
    `allowed` and `bias` broadcast to [batch, heads, queries, keys], of which `kept` is the mask of
    a dropout of shares; `sink` is [heads]."""
    fit_heads(q, k, v)
    if sink is not None:
        fit("sink", sink, q.shape[2:3])
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    scores = torch.einsum("sbhd,tbhd->bhst", q, k) * factor
    scores = scores if bias is None else scores + bias.to(scores.dtype)
    idle = ~allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(~(allowed | idle), -torch.inf)
    if sink is not None:
        extra = sink.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((extra, scores), -1)
    every = torch.softmax(scores, -1)
    shares = every[..., -k.shape[0] :]
    shares = shares * ~idle if kept is None else shares * ~idle * kept / (1 - dropout)
    out = torch.einsum("bhst,tbhd->bhsd", shares, v)
    return of_output(out, scores, every).permute(2, 0, 1, 3)
