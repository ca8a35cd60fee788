"""Attention over a sequence that is split over cp, its heads over tp: context parallelism.

The reference is plain attention on the whole sequence. The ways to split it, and what each of them
communicates: an all-gather of keys and values (arXiv:2407.21783, section 3.3.2), a ring
(arXiv:2310.01889), an all-to-all of heads (arXiv:2309.14509), and the last two on two levels
(arXiv:2405.07719). A sequence is cut into one chunk for each rank, or, as `zigzag`, into two, of
which rank i holds i and 2n-1-i.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from verify.case import Case
from verify.errors import BadArgument
from verify.oracle.context_costs import ALGORITHMS, Costs, Volume
from verify.oracle.context_shares import SHARED, Shares
from verify.oracle.contract import Contract, Mask, Tensors, TensorSpec
from verify.oracle.terms import (
    exclude,
    fit,
    known_options,
    number,
    one_of,
    sizes,
    switches,
    whole_number,
)
from verify.placement import Partial, Placement, Placements, Replicate, Shard, ZigzagShard, pieces

PLACEMENTS = ("zigzag", "contiguous")
MASKS = ("causal", "full", "sliding_window")
Pattern = tuple[str, int | None]
_VOCABULARY = 1000
OPTIONS = ("algorithm", "placement", "mask", "window", *SHARED, "dropout", "packed", "blocks")


@dataclass(frozen=True)
class Sequences:
    """How a dimension of `sum(padded)` places is packed: so many places each, of which the first
    `real` hold tokens. `packed` is False for one sequence that fills it."""

    real: tuple[int, ...]
    padded: tuple[int, ...]
    packed: bool

    def cut(self, placement: str) -> Shard | ZigzagShard:
        """How dimension 0 lies over cp."""
        lengths = self.padded if self.packed else ()
        return ZigzagShard(0, lengths) if placement == "zigzag" else Shard(0, lengths=lengths)

    @property
    def positions(self) -> Tensor:
        """The position of every place in its sequence, int64."""
        return torch.cat([torch.arange(length) for length in self.padded])

    def ahead(self, distance: int) -> tuple[Tensor, Tensor]:
        """For each place the one that is so much further on, and whether that has a token of the
        same sequence."""
        places = torch.arange(sum(self.padded)) + distance
        ends = torch.tensor(self.real).repeat_interleave(torch.tensor(self.padded))
        return places.clamp(max=len(places) - 1), self.positions + distance < ends

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """The cumulative lengths, for a packed dimension."""
        found = {"cu_seqlens": self.real, "cu_seqlens_padded": self.padded}
        return {
            name: TensorSpec((len(each) + 1,), {}, None, values=(0, *accumulate(each)))
            for name, each in (found.items() if self.packed else ())
        }

    def check(self, inputs: Tensors) -> None:
        """Raise ValueError for cumulative lengths that are none, or not of so many places."""
        if not self.packed:
            return
        real, padded = (inputs[name] for name in ("cu_seqlens", "cu_seqlens_padded"))
        for name, given in (("cu_seqlens", real), ("cu_seqlens_padded", padded)):
            fit(name, given, (given.numel(),))
            if given[0] != 0 or (given.diff() < 0).any():
                raise ValueError(f"{name}: {given.tolist()} are no cumulative lengths")
        fit("cu_seqlens", real, padded.shape)
        if (real.diff() > padded.diff()).any():
            raise ValueError(f"cu_seqlens: {real.tolist()} exceed {padded.tolist()}")
        if padded[-1] != sum(self.padded):
            raise ValueError(f"cu_seqlens_padded: {padded.tolist()} of {sum(self.padded)} places")

    def allowed(self, mask: str, window: int | None) -> Tensor:
        """Which place attends to which, bool [places, places]; padding to and of nothing."""
        sequence = torch.repeat_interleave(torch.tensor(self.padded))
        position = torch.cat([torch.arange(length) for length in self.padded])
        token = position < torch.tensor(self.real)[sequence]
        distance = position[:, None] - position[None, :]
        found = (sequence[:, None] == sequence[None, :]) & token[:, None] & token[None, :]
        if mask != "full":
            found &= distance >= 0
        return found if window is None else found & (distance < window)


def context_split(case: Case) -> Contract:
    """x [sequence, batch, hidden] Replicate over cp to this rank's chunks, y; no communication.

    The gradient of x is Partial. `positions` [sequence] int64 are those of the places in their
    sequences. Options placement and packed as of `context_attention`.
    """
    known_options(case, "placement", "packed")
    shape = sizes(case, "sequence", "batch", "hidden")
    placement = one_of(case, "placement", PLACEMENTS)
    sequences = sequences_of(case, shape[0], placement)
    placed: Placements = {"cp": sequences.cut(placement)}
    positions = sequences.positions

    def reference(inputs: Tensors, parameters: Tensors) -> Tensors:
        sequences.check(inputs)
        return {"y": inputs["x"].clone(), "positions": positions}

    return Contract(
        inputs={
            "x": TensorSpec(shape, {"cp": Replicate()}, {"cp": Partial()}),
            **sequences.inputs,
        },
        parameters={},
        outputs={
            "y": TensorSpec(shape, placed, placed),
            "positions": TensorSpec(shape[:1], placed, None),
        },
        reference=reference,
        axes=("cp",),
        linear=True,
        forward=(),
        backward=(),
        finish=(),
    )


def tokens_ahead(case: Case) -> Contract:
    """y [depths, batch, sequence] of x [batch, sequence], int64: what lies 1, 2, ... places further
    on in the same sequence, -1 where that has no such token. All lie over cp as `context_split`
    cuts the sequence, so that what is looked for may be on any rank; how it comes is not promised.
    Options as there, and `padded` (on): packed sequences have padding."""
    known_options(case, "placement", "packed", "padded")
    sequence, batch, depths = sizes(case, "sequence", "batch", "depths")
    placement, padded = one_of(case, "placement", PLACEMENTS), switches(case, {"padded": True})
    sequences = sequences_of(case, sequence, placement, **padded)
    cut = sequences.cut(placement)

    def reference(inputs: Tensors, parameters: Tensors) -> Tensors:
        sequences.check(inputs)
        x = inputs["x"]
        fit("x", x, (batch, sequence))
        ahead = (sequences.ahead(depth) for depth in range(1, depths + 1))
        found = [x[:, places].masked_fill(~inside, -1) for places, inside in ahead]
        return {"y": torch.stack(found)}

    given = TensorSpec((batch, sequence), {"cp": replace(cut, dim=1)}, None, high=_VOCABULARY)
    return Contract(
        inputs={"x": given, **sequences.inputs},
        parameters={},
        outputs={"y": TensorSpec((depths, batch, sequence), {"cp": replace(cut, dim=2)}, None)},
        reference=reference,
        axes=("cp",),
        linear=True,
    )


def context_attention(case: Case) -> Contract:
    """q [sequence, batch, heads, head_dim], k and v [sequence, batch, kv_heads, head_dim] (v:
    value_dim, where given) to `out`; all ZigzagShard(0) or Shard(0) over cp and Shard(2) over tp,
    and so are their gradients.

    Options: algorithm; placement; mask causal, full or sliding_window with its window; those of
    `Shares`, with the input `sink` [heads] Shard(0) over tp, whose gradient is Partial over cp, and
    the marks `padding` cut over cp as tokens are, which are gathered once; dropout of shares;
    packed, a number of sequences, each cut by itself, with
    padding at its end, whose lengths are the inputs cu_seqlens and cu_seqlens_padded; blocks: the
    output `blocks` is the number of blocks that a rank computes, chunks of queries that it attends
    with times chunks of keys, those without a pair that the mask allows left out: equal on all
    ranks where the law of zigzag says so, else one number for each rank of cp.

    Raises BadArgument for an algorithm that cannot share out the heads, or lacks its levels.
    """
    known_options(case, *OPTIONS)
    names = ("sequence", "batch", "heads", "kv_heads", "head_dim")
    sequence, batch, heads, kv_heads, dim = sizes(case, *names, optional=("value_dim",))
    value_dim = case.shape.get("value_dim", dim)
    placement, mask = one_of(case, "placement", PLACEMENTS), attention_mask(case)
    sequences = sequences_of(case, sequence, placement)
    cut, allowed = sequences.cut(placement), sequences.allowed(*mask)
    dropout = number(case, "dropout", least=0.0, below=1.0) or 0.0
    shares = Shares.of(case, dropout=dropout)
    costs = attention_costs(case, Volume(sequence, batch, heads, kv_heads, dim, value_dim))
    counted = switches(case, {"blocks": False})["blocks"]
    balanced = placement == "zigzag" and not sequences.packed and mask[0] != "sliding_window"
    placed: Placements = {"cp": cut, "tp": Shard(2)}

    def reference(inputs: Tensors, parameters: Tensors) -> Tensors:
        given: dict[str, Any] = {"allowed": allowed, "positions": sequences.positions}
        q, k, v = (inputs[name] for name in "qkv")
        sequences.check(inputs)
        out = shares.attention(q, k, v, inputs, **given, sink=inputs.get("sink"))
        if not counted:
            return {"out": out}
        blocks = _blocks(allowed, cut, case.layout.cp, costs.together)
        return {"out": out, "blocks": blocks[:1] if balanced else blocks}

    outputs = {"out": TensorSpec((sequence, batch, heads, value_dim), placed, placed)}
    if counted:
        whose: Placements = {"cp": Replicate() if balanced else Shard(0), "tp": Replicate()}
        outputs["blocks"] = TensorSpec((1 if balanced else case.layout.cp,), whose, None)
    keys, values = ((sequence, batch, kv_heads, each) for each in (dim, value_dim))
    return Contract(
        inputs={
            "q": TensorSpec((sequence, batch, heads, dim), placed, placed),
            "k": TensorSpec(keys, placed, placed),
            "v": TensorSpec(values, placed, placed),
            **shares.inputs(cut),
            **_sink(shares, heads),
            **sequences.inputs,
        },
        parameters={},
        outputs=outputs,
        reference=reference,
        axes=("tp", "cp"),
        masks={"shares": dropout_of_shares(case, heads, cut, dropout)} if dropout else {},
        forward=costs.forward + shares.forward,
        backward=costs.backward,
        finish=(),
        kept=costs.kept + shares.marks + (heads // case.layout.tp if shares.sink else 0),
    )


def _sink(shares: Shares, heads: int) -> dict[str, TensorSpec]:
    placed: Placements = {"tp": Shard(0)}
    spec = TensorSpec((heads,), placed, {**placed, "cp": Partial()})
    return {"sink": spec} if shares.sink else {}


def dropout_of_shares(case: Case, heads: int, cut: Shard | ZigzagShard, p: float) -> Mask:
    """The dropout of the shares [batch, heads, sequence, sequence] of an attention whose sequence
    lies over cp as `cut` says. Every rank has rows of its own: of its queries or, where heads were
    exchanged, of its part of the heads, and draws for all keys."""
    placed: dict[str, Placement] = {"tp": Shard(1)}
    algorithm = one_of(case, "algorithm", tuple(ALGORITHMS))
    if algorithm == "ulysses":
        placed["cp"] = Shard(1)
    elif algorithm == "hierarchical" and case.layout.cp > 1:
        placed |= {"hcp_0": Shard(1), "hcp_1": replace(cut, dim=2)}
    else:
        placed["cp"] = replace(cut, dim=2)
    sequence, batch = case.shape["sequence"], case.shape["batch"]
    return Mask((batch, heads, sequence, sequence), placed, p)


def _blocks(allowed: Tensor, cut: Shard | ZigzagShard, cp: int, together: int) -> Tensor:
    """For each rank of cp, the blocks with an allowed pair, of queries of the `together` ranks that
    share theirs, int64 [cp]."""
    chunks = pieces(allowed.shape[0], cut, cp)
    keys = [chunk for rank in chunks for chunk in rank]
    own = [sum(bool(allowed[q, k].any()) for q in rank for k in keys) for rank in chunks]
    sums = [sum(own[i : i + together]) for i in range(0, cp, together)]
    return torch.tensor([sums[rank // together] for rank in range(cp)])


def attention_costs(case: Case, volume: Volume) -> Costs:
    """What an attention of this volume costs by the case's algorithm.

    Raises BadArgument for one that does not go with the heads or the layout.
    """
    algorithm = one_of(case, "algorithm", tuple(ALGORITHMS))
    if volume.heads % volume.kv_heads:
        raise BadArgument(
            f"case.shape.kv_heads: {volume.kv_heads} do not divide {volume.heads} heads"
        )
    levels = case.layout.hierarchical_cp or ()
    if algorithm == "hierarchical" and case.layout.cp > 1 and len(levels) != 2:
        exclude(case, "algorithm", algorithm, why="it needs a hierarchical_cp of two levels")
    together = {"ulysses": case.layout.cp, "hierarchical": levels[0] if levels else 1}
    costs = Costs(algorithm, case.layout, volume, together.get(algorithm, 1))
    heads, kv_heads = volume.heads // case.layout.tp, volume.kv_heads // case.layout.tp
    shared = costs.together
    if heads % shared or not kv_heads or (kv_heads % shared and shared % kv_heads):
        why = f"{heads} heads and {kv_heads} kv heads of a rank are not shared out to {shared}"
        exclude(case, "algorithm", algorithm, why=why)
    return costs


def attention_mask(case: Case) -> Pattern:
    """The options mask and window, which go together."""
    mask, window = one_of(case, "mask", MASKS), whole_number(case, "window", least=1)
    if (window is not None) != (mask == "sliding_window"):
        exclude(case, "window", window, why=f"mask={mask}; the two go together")
    return mask, window


def whole_sequence(case: Case, length: int, mask: Pattern) -> tuple[Shard | ZigzagShard, Tensor]:
    """How one sequence lies over cp, by option placement, and which place attends to which."""
    whole = Sequences((length,), (length,), False)
    return whole.cut(one_of(case, "placement", PLACEMENTS)), whole.allowed(*mask)


def sequences_of(
    case: Case, length: int, placement: str, *, draw: int = 0, padded: bool = True
) -> Sequences:
    """With option packed, lengths that depend on the seed: multiples of the number of chunks, and,
    if they are `padded`, up to that much padding, more in one of four. A rest that is left belongs
    to the last. Each `draw` has the same places, and other padding in them."""
    count = whole_number(case, "packed", least=1)
    if count is None:
        if not padded:
            exclude(case, "padded", padded, why="nothing is packed")
        return Sequences((length,), (length,), False)
    unit = case.layout.cp * (2 if placement == "zigzag" else 1)
    units, rest = divmod(length, unit)
    if count > units:
        exclude(case, "packed", count, why=f"a sequence of {length} has {units} times {unit} only")
    drawn = random.Random(f"{case.seed}/cu_seqlens")
    ends = [*sorted(drawn.sample(range(1, units), count - 1)), units]
    places = [(end - start) * unit for start, end in zip([0, *ends], ends, strict=False)]
    places[-1] += rest
    if not padded:
        return Sequences(tuple(places), tuple(places), True)
    drawn = random.Random(f"{case.seed}/cu_seqlens/{draw}") if draw else drawn
    real = [
        each - drawn.randint(0, each if drawn.random() < 0.25 else min(unit - 1, each - 1))
        for each in places
    ]
    # A query that attends to one key only has no gradient: something has to show.
    longest = places.index(max(places))
    real[longest] = max(real[longest], min(2, places[longest]))
    return Sequences(tuple(real), tuple(places), True)
