"""Mutants of the vocabulary-parallel embedding."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_mutant = partial(
    Mutant, family="embedding", module="impl.embedding", caught_by=("vocab_embedding",)
)

MUTANTS = (
    _mutant(
        name="embedding-first-row-lost",
        wrong="The first row of every rank's part belongs to nobody.",
        snippet="(tokens < self.rows.start)",
        replacement="(tokens <= self.rows.start)",
    ),
    _mutant(
        name="embedding-row-too-many",
        wrong="A rank looks up the first row of the next rank in its own part.",
        snippet="(tokens >= self.rows.stop)",
        replacement="(tokens > self.rows.stop)",
    ),
    _mutant(
        name="embedding-others-not-masked",
        wrong="A rank adds its first row for every token that it does not have.",
        snippet="embedding(row, self.weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)",
        replacement="embedding(row, self.weight)",
    ),
    _mutant(
        name="embedding-first-row-without-gradient",
        wrong="Masked tokens point to row 0, which is made a padding row and gets no gradient.",
        snippet="embedding(row, self.weight)",
        replacement="torch.nn.functional.embedding(row, self.weight, padding_idx=0)",
    ),
    _mutant(
        name="embedding-scatters-reshaped",
        wrong="Before the scatter, batch and sequence are exchanged in shape but not in memory.",
        snippet="partial.transpose(0, 1), group=self.group",
        replacement=("partial.reshape(partial.shape[1], partial.shape[0], -1), group=self.group"),
    ),
    _mutant(
        name="embedding-scatters-anywhere",
        wrong="A scatter without sequence parallelism is accepted.",
        snippet="if scatter_to_sequence and not sequence_parallel:",
        replacement="if scatter_to_sequence and not sequence_parallel and hidden == 1:",
    ),
)
