"""Mutants of context parallelism: where tokens lie, what is attended to, how blocks are merged."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_mutant = partial(Mutant, family="context", caught_by=("context_attention",))
_zigzag = partial(_mutant, module="impl.context_parallel.zigzag")
_split = partial(_zigzag, caught_by=("context_split",))
_mask = partial(_mutant, module="impl.context_parallel.mask")
_blocks = partial(
    _mutant,
    module="impl.context_parallel.blocks",
    caught_by=("context_attention", "context_attention_block"),
)
_scores = partial(
    _mutant,
    module="impl.context_parallel.scores",
    caught_by=("context_attention", "context_attention_block"),
)
_sweep = partial(_mutant, module="impl.context_parallel.sweep")
_attention = partial(_mutant, module="impl.context_parallel.attention")

_BOTH_CHUNKS = "(rank, pieces - 1 - rank)"
_POSITIONS = "torch.arange(c.position, c.position + c.length)"
_DISTANCE = "torch.arange(q.tokens, device=device) + (q.position - k.position)"
_NEAR = "farthest >= 0 and (self.window is None or nearest < self.window)"

MUTANTS = (
    _zigzag(
        name="zigzag-contiguous",
        wrong="Zigzag placement gives a rank two chunks side by side.",
        snippet=_BOTH_CHUNKS,
        replacement="(2 * rank, 2 * rank + 1)",
        caught_by=("context_attention", "context_split"),
    ),
    _zigzag(
        name="zigzag-late-chunk-first",
        wrong="Zigzag placement gives a rank its later chunk before its earlier one.",
        snippet=_BOTH_CHUNKS,
        replacement="(pieces - 1 - rank, rank)",
        caught_by=("context_attention", "context_split"),
    ),
    _zigzag(
        name="zigzag-odd-length",
        wrong="A sequence that does not divide into two chunks a rank loses its end.",
        snippet="if padded % pieces:",
        replacement="if padded % size:",
    ),
    _zigzag(
        name="packed-padding-attended",
        wrong="Padding counts as tokens.",
        snippet="tokens = min(max(sequences.lengths[sequence] - position, 0), length)",
        replacement="tokens = length",
    ),
    _zigzag(
        name="packed-lengths-without-padding",
        wrong="Packed sequences are cut by their lengths without padding.",
        snippet='_differences("cu_seqlens_padded", padded)',
        replacement='_differences("cu_seqlens_padded", cu_seqlens)',
        caught_by=("context_attention", "context_split"),
        seen="ATT-06",
    ),
    _split(
        name="split-not-entered",
        wrong="Every rank takes the chunks of the first.",
        snippet="return by_rank[dist.get_rank(group)]",
        replacement="return by_rank[0]",
        seen="CP-15",
    ),
    _split(
        name="split-detached",
        wrong="No gradient reaches the whole sequence from its chunks.",
        snippet="x.narrow(0, whole.starts[c.sequence] + c.position, c.length)",
        replacement="x.detach().narrow(0, whole.starts[c.sequence] + c.position, c.length)",
    ),
    _split(
        name="positions-of-places",
        wrong="Every rank counts positions from its own first place.",
        snippet=_POSITIONS,
        replacement="torch.arange(c.start, c.start + c.length)",
        seen="ATT-08",
    ),
    _split(
        name="positions-run-on",
        wrong="Positions run on through packed sequences.",
        snippet=_POSITIONS,
        replacement=(
            "torch.arange(c.position, c.position + c.length)"
            " + sum((packed.padded_lengths if packed else (0,))[: c.sequence])"
        ),
        seen="ATT-09",
    ),
    _mask(
        name="causal-reversed",
        wrong="Earlier chunks are skipped, and later ones computed.",
        snippet="return farthest >= 0 and",
        replacement="return nearest <= 0 and",
        seen="CP-03",
    ),
    _mask(
        name="causal-within-every-block",
        wrong="Every block is masked as if its first query and its first key were one token.",
        snippet=f"queries = {_DISTANCE}",
        replacement="queries = torch.arange(q.tokens, device=device); nearest = -1",
        seen="CP-03",
    ),
    _mask(
        name="causal-strictly",
        wrong="A query does not attend to its own key.",
        snippet="found = distance >= 0",
        replacement="found = distance > 0",
    ),
    _mask(
        name="causal-skips-one-token",
        wrong="A chunk of one token does not attend to itself.",
        snippet=f"return {_NEAR}",
        replacement=f"return farthest > 0 and {_NEAR}",
    ),
    _mask(
        name="causal-masked-not-skipped",
        wrong="Blocks in which nothing is attended to are computed, and masked.",
        snippet="return farthest >= 0 and",
        replacement="return",
    ),
    _mask(
        name="window-skips-nothing",
        wrong="Blocks that lie before the window are computed, and masked.",
        snippet=f"return {_NEAR}",
        replacement="return farthest >= 0",
    ),
    _mask(
        name="window-one-too-wide",
        wrong="A window has one key more than asked for.",
        snippet="found & (distance < self.window)",
        replacement="found & (distance <= self.window)",
    ),
    _mask(
        name="window-ignored",
        wrong="A window is accepted with any mask, and ignored.",
        snippet='if (self.window is not None) != (self.kind == "sliding_window"):',
        replacement='if self.window is None and self.kind == "sliding_window":',
    ),
    _mask(
        name="packed-attends-across",
        wrong="Packed sequences attend to each other.",
        snippet="q.sequence != k.sequence or ",
        replacement="",
    ),
    _blocks(
        name="blocks-not-rescaled",
        wrong="What was weighted before a higher peak came is added as it is.",
        snippet="weighted.mul_(before[..., None]).add_",
        replacement="weighted.add_",
    ),
    _blocks(
        name="blocks-without-peak",
        wrong="Exponentials are taken of positive scores as they are.",
        snippet="peak = scores.amax(-1)",
        replacement="peak = scores.amax(-1).clamp(max=0)",
        caught_by=("context_attention",),
    ),
    _blocks(
        name="blocks-without-delta",
        wrong="The gradient of the scores lacks what the softmax subtracts.",
        snippet="(of_weights - delta)",
        replacement="(of_weights - 0 * delta)",
    ),
    _blocks(
        name="blocks-scale-missing-in-backward",
        wrong="Gradients of q and k are not scaled.",
        snippet="(of_weights - delta) * scale",
        replacement="(of_weights - delta)",
    ),
    _scores(
        name="blocks-heads-interleaved",
        wrong="Heads share their keys with the next but one, not with the next.",
        snippet="return x.unflatten(2, (kv_heads, x.shape[2] // kv_heads))",
        replacement=("return x.unflatten(2, (x.shape[2] // kv_heads, kv_heads)).transpose(2, 3)"),
    ),
    _blocks(
        name="blocks-own-total-in-backward",
        wrong="Backward takes the softmax of each block for itself.",
        snippet="weights = torch.exp(scores - peak) / total",
        replacement="weights = torch.softmax(scores, -1)",
    ),
    _sweep(
        name="sweep-total-of-first-rows",
        wrong="Backward takes the totals of the first rows for those of every chunk.",
        snippet="total=self._total[mine.rows]",
        replacement="total=self._total[: mine.tokens]",
        seen="CP-02",
    ),
    _sweep(
        name="sweep-gradient-of-last-queries",
        wrong="Keys keep the gradient of the last chunk of queries only.",
        snippet="dk[theirs.rows] += of_k",
        replacement="dk[theirs.rows] = of_k",
    ),
    _sweep(
        name="sweep-gradients-not-zeroed",
        wrong="The gradients of a portion of keys are added to those of the portion before.",
        snippet="dk, dv = (torch.zeros_like(x, dtype=self._dtype) for x in (k, v))",
        replacement="""zeros = tuple(torch.zeros_like(x, dtype=self._dtype) for x in (k, v))
        self.shares = dk, dv = getattr(self, "shares", zeros)""",
        seen="CP-05",
    ),
    _attention(
        name="attention-scale-ignored",
        wrong="The scale is 1 / sqrt(d), whatever is given.",
        snippet="q.shape[-1] ** -0.5 if scale is None else scale",
        replacement="q.shape[-1] ** -0.5",
    ),
    _attention(
        name="attention-keeps-projection",
        wrong="Keys and values stay parts of the fused projection, which is kept for backward.",
        snippet="q, k, v = (x.contiguous() for x in (q, k, v))",
        replacement="q, k, v = (x for x in (q, k, v))",
        caught_by=("context_attention_block",),
    ),
    _attention(
        name="attention-over-cp-of-any-shapes",
        wrong="Queries, keys and values of other batches are broadcast to each other.",
        snippet="    _check_shapes(q, k, v)\n",
        replacement="",
    ),
    _zigzag(
        name="packed-beyond-the-sequence",
        wrong="Packed sequences may have more tokens than places.",
        snippet="if not 0 <= length <= padded:",
        replacement="if length < 0:",
        caught_by=("context_attention", "context_split"),
    ),
)
