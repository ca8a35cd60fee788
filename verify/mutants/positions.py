"""Mutants of rotary and of learned positions."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_rotary = partial(Mutant, family="positions", module="impl.rotary", caught_by=("rotary",))
_learned = partial(
    Mutant, family="positions", module="impl.embedding", caught_by=("position_embedding",)
)
_BOTH = ("rotary", "position_embedding")
_where = partial(Mutant, family="positions", module="impl.context_parallel.zigzag", caught_by=_BOTH)

_RANGES = "parts = [torch.arange(c.position, c.position + c.length) for c in chunks]"
_PAIR = "pair = first * self.cos - second * self.sin, second * self.cos + first * self.sin"
_ANGLES = "angles = positions.double()[:, None] * self.base ** (-exponents / self.dim)"
_PART = "mine = mine[part.start : part.stop]"

MUTANTS = (
    _where(
        name="places-of-a-rank",
        wrong="Every rank counts its places from 0, as if they were the sequence.",
        snippet=_RANGES,
        replacement="parts = [torch.arange(c.start, c.start + c.length) for c in chunks]",
        seen="ATT-08",
    ),
    _where(
        name="places-contiguous",
        wrong="A rank's places follow its first one, zigzag or not.",
        snippet=_RANGES,
        replacement=(
            "first = chunks[0].position if chunks else 0\n"
            "    parts = [torch.arange(first, first + sum(c.length for c in chunks))]"
        ),
    ),
    _where(
        name="places-run-on",
        wrong="Positions of packed sequences run on from one to the next.",
        snippet=_RANGES,
        replacement=(
            "before = [0]\n"
            "    for padded in (packed or PackedSequences((length,), (length,))).padded_lengths:\n"
            "        before.append(before[-1] + padded)\n"
            "    parts = [torch.arange(c.length) + c.position + before[c.sequence] for c in chunks]"
        ),
        caught_by=("rotary",),
        seen="ATT-09",
    ),
    _where(
        name="places-without-padding",
        wrong="A chunk of a packed sequence begins where it would without the padding.",
        snippet=_RANGES,
        replacement=(
            "real = packed.lengths if packed else (length,)\n"
            "    whole = packed.padded_lengths if packed else (length,)\n"
            "    lost = [b - a for a, b in zip(real, whole, strict=True)]\n"
            "    moved = [c.position - (lost[c.sequence] if c.position else 0) for c in chunks]\n"
            "    parts = [torch.arange(c.length) + at for c, at in zip(chunks, moved, strict=True)]"
        ),
        caught_by=("rotary",),
        seen="ATT-06",
    ),
    _rotary(
        name="rotary-neighbours",
        wrong="Neighbours are pairs where halves should be.",
        snippet="        if self.interleaved:\n",
        replacement="        if self.interleaved or dim > 2:\n",
    ),
    _rotary(
        name="rotary-joined-as-halves",
        wrong="Neighbours that were turned are put into two halves.",
        snippet="torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)",
        replacement="torch.cat(pair, -1)",
    ),
    _rotary(
        name="rotary-turned-backward",
        wrong="The turn has the other sense.",
        snippet=_PAIR,
        replacement=(
            "pair = first * self.cos + second * self.sin, second * self.cos - first * self.sin"
        ),
    ),
    _rotary(
        name="rotary-first-turned-already",
        wrong="The second of a pair is computed of the first as it is after its turn.",
        snippet=_PAIR,
        replacement=(
            "first = first * self.cos - second * self.sin\n"
            "        pair = first, second * self.cos + first * self.sin"
        ),
    ),
    _rotary(
        name="rotary-rest-lost",
        wrong="The features that are not turned are zero.",
        snippet="x[..., dim:]), -1)",
        replacement="0 * x[..., dim:]), -1)",
    ),
    _rotary(
        name="rotary-frequencies-of-pairs",
        wrong="Exponents are of the index over the number of features, not of pairs.",
        snippet="exponents = torch.arange(0, self.dim, 2, dtype",
        replacement="exponents = torch.arange(0, self.dim // 2, dtype",
    ),
    _rotary(
        name="rotary-base-ignored",
        wrong="The base is 10000, whatever was asked for.",
        snippet=_ANGLES,
        replacement=("angles = positions.double()[:, None] * 10000.0 ** (-exponents / self.dim)"),
    ),
    _rotary(
        name="rotary-angles-in-float32",
        wrong="Angles are computed in float32.",
        snippet=_ANGLES,
        replacement=(
            "exponents = exponents.float()\n"
            "        angles = positions.float()[:, None] * self.base ** (-exponents / self.dim)"
        ),
    ),
    _rotary(
        name="rotary-positions-reversed",
        wrong="The first token has the last position.",
        snippet="angles = angles[:, None, None, :]",
        replacement="angles = angles[:, None, None, :].flip(0)",
    ),
    _rotary(
        name="rotary-odd-features",
        wrong="An odd number of features is accepted.",
        snippet="if self.dim < 2 or self.dim % 2:",
        replacement="if self.dim < 2:",
    ),
    _learned(
        name="learned-positions-of-a-part",
        wrong="Under sequence parallelism every rank has the positions of the first one's part.",
        snippet=_PART,
        replacement="mine = mine[: len(part)]",
        seen="SP-07",
    ),
    _learned(
        name="learned-positions-cut-by-tp-first",
        wrong="The sequence is cut by tp before cp.",
        snippet=_PART,
        replacement="mine = mine.view(len(part), -1)[:, dist.get_rank(self.tp_group)]",
    ),
    _learned(
        name="learned-positions-not-marked",
        wrong="The gradient under sequence parallelism is of this rank's tokens.",
        snippet="            init=init,\n            sequence_parallel=sequence_parallel,\n",
        replacement="            init=init,\n",
    ),
    _learned(
        name="learned-positions-along-the-batch",
        wrong="Positions go along the batch where that has as many rows.",
        snippet="return x + embedding(self._positions(x, packed), self.weight).unsqueeze(1)",
        replacement=(
            "added = embedding(self._positions(x, packed), self.weight)\n"
            "        return x + (added if x.shape[0] == x.shape[1] else added.unsqueeze(1))"
        ),
    ),
    _learned(
        name="learned-positions-begin-anew",
        wrong="A sequence that is too long begins with the first position again.",
        snippet="if longest > self.weight.shape[0]:",
        replacement="if longest > 2 * self.weight.shape[0]:",
    ),
)
