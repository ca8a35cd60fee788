"""Mutants of data: whose turn a sample has, and where."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_sampler = partial(
    Mutant, family="data", module="impl.data.sampler", caught_by=("batches", "sample_order")
)
_batches = partial(Mutant, family="data", module="impl.data.batches", caught_by=("batches",))
_SHUFFLE = 'return torch.randperm(self.count, generator=generator, device="cpu")'
_ROW = "self.at(consumed + (m * dp_size + dp_rank) * microbatch_size + i)"

MUTANTS = (
    _sampler(
        name="data-every-replica-alike",
        wrong="All ranks of dp have the first rows of a step.",
        snippet=_ROW,
        replacement="self.at(consumed + m * dp_size * microbatch_size + i)",
    ),
    _sampler(
        name="data-rank-before-microbatch",
        wrong="A rank has the rows that follow each other, not those of its part of a microbatch.",
        snippet=_ROW,
        replacement="self.at(consumed + (dp_rank * (size // each) + m) * microbatch_size + i)",
        caught_by=("batches",),
    ),
    _sampler(
        name="data-not-where-it-was",
        wrong="Every step begins with the first samples of an epoch.",
        snippet=_ROW,
        replacement="self.at((m * dp_size + dp_rank) * microbatch_size + i)",
    ),
    _sampler(
        name="data-rows-left-over",
        wrong="Rows that do not divide over the ranks of dp are left out.",
        snippet="if size < 1 or microbatch_size < 1 or size % each:",
        replacement="if size < 1 or microbatch_size < 1:",
        caught_by=("batches",),
    ),
    _sampler(
        name="data-ends-with-the-epoch",
        wrong="In the last step of an epoch some ranks have fewer microbatches than others.",
        snippet="            for m in range(size // each)\n",
        replacement=(
            "            for m in range(size // each)\n"
            "            if consumed % self.count + (m * dp_size + dp_rank) * microbatch_size"
            " < self.count\n"
        ),
        caught_by=("batches",),
        seen="HANG-07",
    ),
    _sampler(
        name="data-samples-drawn-again",
        wrong="Each sample is drawn from all, so that some have their turn twice.",
        snippet=_SHUFFLE,
        replacement="return torch.randint(self.count, (self.count,), generator=generator)",
        caught_by=("sample_order",),
    ),
    _sampler(
        name="data-order-goes-on",
        wrong="The order of an epoch is what torch's generator draws next.",
        snippet=_SHUFFLE,
        replacement="return torch.randperm(self.count)",
        caught_by=("sample_order",),
        seen="RNG-03",
    ),
    _sampler(
        name="data-epoch-ends-with-a-step",
        wrong="All samples of a step are those of the epoch that it begins in.",
        snippet=_ROW,
        replacement=(
            "self.at(consumed // self.count * self.count + (consumed + (m * dp_size + dp_rank)"
            " * microbatch_size + i) % self.count)"
        ),
        caught_by=("sample_order",),
    ),
    _sampler(
        name="data-before-the-beginning",
        wrong="A run may go on before its beginning: only ranks that see it refuse.",
        snippet="if consumed < 0:",
        replacement="if consumed + dp_rank * microbatch_size < 0:",
        caught_by=("batches",),
    ),
    _sampler(
        name="data-text-too-short",
        wrong="A text may have no sample.",
        snippet="if self.count < 1:",
        replacement="if self.count < 0:",
        caught_by=("batches",),
    ),
    _sampler(
        name="data-targets-are-tokens",
        wrong="What should follow a token is the token.",
        snippet="return both[:, :-1], both[:, 1:]",
        replacement="return both[:, :-1], both[:, :-1]",
        caught_by=("batches",),
    ),
    _batches(
        name="data-targets-of-the-part",
        wrong="Targets are the tokens of this rank's part, moved by one.",
        snippet="return Microbatch(tokens, targets, torch.ones_like(targets))",
        replacement="return Microbatch(tokens, tokens.roll(-1, 1), torch.ones_like(targets))",
    ),
    _batches(
        name="data-tokens-by-dp",
        wrong="The tokens of a sample are shared out over dp.",
        snippet="split_sequence(rows.t(), group=self.groups.cp, placement=self.placement)",
        replacement="split_sequence(rows.t(), group=self.groups.dp, placement=self.placement)",
    ),
    _batches(
        name="data-always-contiguous",
        wrong="A rank has contiguous tokens where attention takes them to be in zigzag.",
        snippet="placement=self.placement",
        replacement='placement="contiguous"',
    ),
)
