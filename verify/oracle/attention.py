"""Attention of heads that are split over tp.

Scaled dot products (arXiv:1706.03762) of grouped heads (arXiv:2305.13245): the heads fall into
equal, consecutive groups, each with one key and value head. The softmax is computed in float32 at
least.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor, log2

import torch
from torch import Tensor

from verify.case import Case
from verify.disturbance import of_output
from verify.errors import BadArgument
from verify.oracle.contract import Contract, Mask, Tensors, TensorSpec
from verify.oracle.terms import (
    fit,
    in_training,
    known_options,
    number,
    sizes,
    switches,
    whole_number,
)
from verify.placement import Partial, Placements, Replicate, Shard

SCORING = (
    "causal",
    "window",
    "padding",
    "alibi",
    "sink",
    "layer_number",
    "scale",
    "dropout",
    "training",
)
_SWITCHES = {"causal": True, "padding": False, "alibi": False, "sink": False}


@dataclass(frozen=True)
class Scoring:
    """How scores become shares: the options that attention has wherever it is used.

    `causal`: a query attends to keys up to its own position. `window`: to keys less than that far
    from it. `padding`: not to keys that the input `padding` [batch, keys] marks. A query that may
    attend to nothing gives zeros. `alibi`: minus slope times distance is added, with the slopes of
    arXiv:2108.12409 by the index of a head among all. `sink`: one more score for each head, which
    takes its share of the softmax and gives nothing. `layer_number`: products of queries and keys
    are divided by it, and multiplied again in the softmax, which changes no exact result. `scale`:
    instead of 1 / sqrt(head_size). `dropout` is of shares, and there is none with `training` off.
    """

    causal: bool
    window: int | None
    padding: bool
    alibi: bool
    sink: bool
    scale: float | None
    dropout: float

    def allowed(self, queries: Tensor, keys: Tensor, padding: Tensor | None) -> Tensor:
        """Bool [batch or 1, 1, queries, keys], of positions and of marks that are not 0."""
        distance = queries.view(-1, 1) - keys.view(1, -1)
        found = torch.ones_like(distance, dtype=torch.bool)
        if self.causal:
            found &= distance >= 0
        if self.window is not None:
            found &= distance.abs() < self.window
        found = found[None, None]
        return found if padding is None else found & (padding == 0)[:, None, None, :]

    def bias(self, heads: int, queries: Tensor, keys: Tensor) -> Tensor | None:
        """What distance adds to scores, float64 [heads, queries, keys]."""
        if not self.alibi:
            return None
        distance = (queries.view(-1, 1) - keys.view(1, -1)).abs()
        return -torch.tensor(slopes(heads), dtype=torch.float64).view(-1, 1, 1) * distance


def scoring(case: Case) -> Scoring:
    """The options of a case. Raises BadArgument for a value out of range."""
    given = switches(case, _SWITCHES)
    whole_number(case, "layer_number", least=1)
    dropout = number(case, "dropout", least=0.0, below=1.0) or 0.0
    return Scoring(
        **given,
        window=whole_number(case, "window", least=1),
        scale=number(case, "scale", least=0.0),
        dropout=dropout if in_training(case) else 0.0,
    )


def slopes(heads: int) -> list[float]:
    """ALiBi's slopes, from the authors' code: 2**(-8/n), its square, its cube, ... for n a power of
    two, else of the power below, followed by every second one of the power above."""
    nearest = 2 ** floor(log2(heads))
    first = [2.0 ** (-8 / nearest * (i + 1)) for i in range(nearest)]
    return first if nearest == heads else first + slopes(2 * nearest)[0::2][: heads - nearest]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: Scoring,
    *,
    padding: Tensor | None = None,
    sink: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """[queries, batch, heads, e] of q [queries, batch, heads, d], k [keys, batch, groups, d] and v
    [keys, batch, groups, e]; the queries are the last positions of the keys. `kept` is the dropout
    mask [batch, heads, queries, keys]."""
    queries, keys, heads = q.shape[0], k.shape[0], q.shape[2]
    fit_heads(q, k, v)
    if padding is not None:
        fit("padding", padding, (q.shape[1], keys))
    if sink is not None:
        fit("sink", sink, q.shape[2:3])
    k, v = (each.repeat_interleave(heads // each.shape[2], dim=2) for each in (k, v))
    where = (torch.arange(keys - queries, keys), torch.arange(keys))
    allowed, bias = given.allowed(*where, padding), given.bias(heads, *where)
    scores = torch.einsum("sbhd,tbhd->bhst", q, k)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores * (q.shape[-1] ** -0.5 if given.scale is None else given.scale)
    scores = scores if bias is None else scores + bias.to(scores.dtype)
    # A row that may attend to nothing is computed as if to everything, and then thrown away.
    alive = allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(~allowed & alive, float("-inf"))
    if sink is not None:
        extra = sink.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((extra, scores), -1)
    every = scores.softmax(-1)
    shares = every[..., -keys:].masked_fill(~alive, 0.0).to(q.dtype)
    if kept is not None:
        shares = shares * kept / (1 - given.dropout)
    out = torch.einsum("bhst,tbhe->bhse", shares, v)
    return of_output(out, scores, every).permute(2, 0, 1, 3)


def fit_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError where groups do not fit heads, or keys and values queries and each other."""
    batch, heads, size = q.shape[1:]
    fit("k", k, (k.shape[0], batch, k.shape[2], size))
    fit("v", v, (*k.shape[:3], v.shape[-1]))
    if heads % k.shape[2]:
        raise ValueError(f"k: {k.shape[2]} groups do not divide {heads} heads")


def core_attention(case: Case) -> Contract:
    """q [sequence, batch, heads, head_size] Shard(2) over tp, and so is y, with value_size for
    head_size. k and v [key_sequence, batch, groups, head_size or value_size] Shard(2), or, of one
    group only, Replicate, with Partial gradients. `sink` [heads] Shard(0). Communicates nothing.

    The sizes key_sequence and value_size are sequence and head_size unless given.
    """
    known_options(case, *SCORING)
    given, optional = scoring(case), ("key_sequence", "value_size")
    names = ("sequence", "batch", "heads", "groups", "head_size")
    sequence, batch, heads, groups, size = sizes(case, *names, optional=optional)
    keys, width = case.shape.get("key_sequence", sequence), case.shape.get("value_size", size)
    check_groups(case)

    def reference(inputs: Tensors, parameters: Tensors) -> Tensors:
        q, k, v = (inputs[name] for name in ("q", "k", "v"))
        if given.alibi:
            fit("q", q, (*q.shape[:2], heads, *q.shape[3:]))
        random = {"padding": inputs.get("padding"), "kept": inputs.get("shares")}
        return {"y": attend(q, k, v, given, sink=parameters.get("sink"), **random)}

    split: Placements = {"tp": Shard(2)}
    shared = groups == 1 and case.layout.tp > 1
    key: Placements = {"tp": Replicate()} if shared else split
    grad_key: Placements = {"tp": Partial()} if shared else split
    return Contract(
        inputs={
            "q": TensorSpec((sequence, batch, heads, size), split, split),
            "k": TensorSpec((keys, batch, groups, size), key, grad_key),
            "v": TensorSpec((keys, batch, groups, width), key, grad_key),
            **padding_input(given, batch, keys),
        },
        parameters=sink_of(given, heads, ""),
        outputs={"y": TensorSpec((sequence, batch, heads, width), split, split)},
        reference=reference,
        masks=dropout_of_shares(given, batch, heads, sequence, keys),
        forward=(),
        backward=(),
        finish=(),
    )


def check_groups(case: Case) -> None:
    """Raise BadArgument for heads that do not fall into equal groups."""
    heads, groups = case.shape["heads"], case.shape["groups"]
    if heads % groups:
        raise BadArgument(f"case.shape.groups: {groups} do not divide {heads} heads")


def padding_input(given: Scoring, batch: int, keys: int) -> dict[str, TensorSpec]:
    """The input that marks padding, 1 for a key that is some, where the case has it."""
    spec = TensorSpec((batch, keys), {"tp": Replicate()}, None, high=2)
    return {"padding": spec} if given.padding else {}


def sink_of(given: Scoring, heads: int, prefix: str = "core.") -> dict[str, tuple[int, ...]]:
    """The parameter of learnable sinks, where the case has them."""
    return {f"{prefix}sink": (heads,)} if given.sink else {}


def dropout_of_shares(
    given: Scoring, batch: int, heads: int, queries: int, keys: int
) -> Mapping[str, Mask]:
    """The one dropout of attention, different on the ranks because their heads are."""
    mask = Mask((batch, heads, queries, keys), {"tp": Shard(1)}, given.dropout)
    return {"shares": mask} if given.dropout else {}
