"""Mutants of dropout inside attention over a sequence that is split over ranks."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_mutant = partial(Mutant, family="context", caught_by=("context_attention",))
_kept = partial(_mutant, module="impl.context_parallel.dropout")
_blocks = partial(_mutant, module="impl.context_parallel.blocks")
_sweep = partial(_mutant, module="impl.context_parallel.sweep")

_PUT_BACK = """\
    finally:
        generator.set_state(before)"""
_BOTH = "left, of_weights = weights * by, of_weights * by"

MUTANTS = (
    _kept(
        name="shares-rows-as-in-memory",
        wrong="Rows of the mask are taken by where queries lie in memory.",
        snippet="rows, columns = self._queries[_key(queries)], self._keys[_key(keys)]",
        replacement="rows, columns = queries.start, self._keys[_key(keys)]",
    ),
    _kept(
        name="shares-columns-of-what-arrived",
        wrong="Columns of the mask are taken by where keys lie in what has arrived: every step of"
        " a ring drops alike.",
        snippet="rows, columns = self._queries[_key(queries)], self._keys[_key(keys)]",
        replacement="rows, columns = self._queries[_key(queries)], keys.start",
    ),
    _kept(
        name="shares-kept-not-scaled",
        wrong="What is kept of shares is not divided by the probability of keeping it.",
        snippet=".to(dtype) / (1 - self._p)",
        replacement=".to(dtype)",
    ),
    _sweep(
        name="shares-dropped-anew-in-backward",
        wrong="Backward drops other shares than forward.",
        snippet="self._plan.kept_shares(self._q, self._chunks, state=ctx.random_state)",
        replacement="self._plan.kept_shares(self._q, self._chunks)",
        caught_by=("context_attention", "transformer_layer"),
        seen="CP-08",
    ),
    _kept(
        name="shares-backward-moves-the-stream",
        wrong="After backward the generator is where the mask that was drawn again left it.",
        snippet=_PUT_BACK,
        replacement="    finally:\n        del before",
        caught_by=("context_attention", "transformer_layer"),
    ),
    _sweep(
        name="shares-dropped-in-forward-only",
        wrong="Backward knows nothing of the dropout of shares.",
        snippet="kept=_of_block(self._kept, mine, theirs, self._dtype),",
        replacement="kept=None,",
    ),
    _blocks(
        name="shares-normalised-after-dropout",
        wrong="The total of a row is of what is kept of it.",
        snippet="(weighted, peak, weights.sum(-1))",
        replacement="(weighted, peak, left.sum(-1))",
    ),
    _blocks(
        name="shares-of-values-all-kept",
        wrong="The gradient of values is of all shares, dropped or not.",
        snippet=_BOTH,
        replacement="of_weights = of_weights * by",
    ),
    _blocks(
        name="shares-of-scores-all-kept",
        wrong="The gradient of scores is of all shares, dropped or not.",
        snippet=_BOTH,
        replacement="left = weights * by",
    ),
)
