"""Mutants of attention: masks and biases, the softmax, the block's packed projection."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_BOTH = ("core_attention", "self_attention")
_masking = partial(Mutant, family="attention", module="impl.masking", caught_by=_BOTH)
_core = partial(Mutant, family="attention", module="impl.attention", caught_by=_BOTH)
_self = partial(Mutant, family="attention", module="impl.attention", caught_by=("self_attention",))

_SLOPES = "return torch.tensor(slopes[part.start : part.stop], dtype=torch.float64)"
_DEAD = """\
    if allowed is not None:
        out = out.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
"""
_ADDED = """\
        scores = scores + torch.zeros_like(allowed, dtype=scores.dtype).masked_fill(
            forbidden, -math.inf
        )
"""
_PACKED = """\
        by_group = qkv.unflatten(-1, (self.groups, self.queries + 2, self.head_size))
        q, k, v = by_group.split((self.queries, 1, 1), dim=-2)
        q, k, v = q.flatten(2, 3), k.squeeze(-2), v.squeeze(-2)
"""
_GATHERED = "qkv = all_gather_last_dim_from_tensor_parallel_region(qkv, group=self.group)"

MUTANTS = (
    _masking(
        name="alibi-slopes-of-first-heads",
        wrong="Every rank biases with the slopes of the first heads.",
        snippet=_SLOPES,
        replacement="return torch.tensor(slopes[: len(part)], dtype=torch.float64)",
        seen="ATT-03",
    ),
    _masking(
        name="alibi-slopes-of-few-heads",
        wrong="A rank computes slopes as if its heads were all that there are.",
        snippet=_SLOPES,
        replacement="return torch.tensor(_geometric(len(part)), dtype=torch.float64)",
        seen="ATT-03",
    ),
    _masking(
        name="alibi-slopes-in-between",
        wrong="Where heads are no power of two, the later slopes are not every second one.",
        snippet="_geometric(2 * lower)[::2]",
        replacement="_geometric(2 * lower)",
    ),
    _masking(
        name="alibi-favours-the-future",
        wrong="Keys behind the query are biased up with their distance.",
        snippet="distance = (queries[:, None] - keys[None, :]).abs()",
        replacement="distance = queries[:, None] - keys[None, :]",
    ),
    _masking(
        name="causal-without-own",
        wrong="A query does not attend to the key of its own position.",
        snippet="distance >= 0 if causal",
        replacement="distance > 0 if causal",
    ),
    _masking(
        name="causal-from-first-key",
        wrong="Queries that are fewer than the keys count as the first positions, not the last.",
        snippet="torch.arange(keys - queries, keys, device=device)",
        replacement="torch.arange(queries, device=device)",
        caught_by=("core_attention",),
    ),
    _masking(
        name="window-one-wider",
        wrong="A window reaches one key too far.",
        snippet="(distance.abs() < window)",
        replacement="(distance.abs() <= window)",
    ),
    _masking(
        name="window-open-ahead",
        wrong="Without a causal mask, a window has no end towards later keys.",
        snippet="(distance.abs() < window)",
        replacement="(distance < window)",
    ),
    _core(
        name="attention-scale-of-values",
        wrong="Scores are scaled by the size of the values' heads.",
        snippet="scale=q.shape[-1] ** -0.5",
        replacement="scale=v.shape[-1] ** -0.5",
        caught_by=("core_attention", "latent_attention"),
    ),
    _core(
        name="attention-scale-of-all-heads",
        wrong="Scores are scaled by the width of all of a rank's heads together.",
        snippet="scale=q.shape[-1] ** -0.5",
        replacement="scale=(q.shape[-1] * self.heads) ** -0.5",
    ),
    _core(
        name="attention-layer-number-not-undone",
        wrong="The softmax multiplies by another layer's number than the scores were divided by.",
        snippet="scores = scores * layer_number",
        replacement="scores = scores * (layer_number - 1)",
    ),
    _core(
        name="attention-softmax-in-float32",
        wrong="The softmax of float64 scores is computed in float32.",
        snippet="scores = scores.to(torch.promote_types(scores.dtype, torch.float32))",
        replacement="scores = scores.to(torch.float32)",
    ),
    _core(
        name="attention-dead-rows-averaged",
        wrong="A query that may attend to nothing gives the mean of all values.",
        snippet=_DEAD,
        replacement="",
    ),
    _core(
        name="attention-dead-rows-undefined",
        wrong="A query that may attend to nothing gives zeros, and NaN as gradients.",
        snippet="forbidden = ~allowed & allowed.any(-1, keepdim=True)",
        replacement="forbidden = ~allowed",
    ),
    _core(
        name="attention-mask-kept",
        wrong="The whole mask is kept for backward.",
        snippet=_ADDED,
        replacement="        scores = scores.masked_fill(forbidden, -math.inf)\n",
        caught_by=("self_attention",),
    ),
    _core(
        name="attention-packed-projection-kept",
        wrong="Values are views of the packed projection, so all of it is kept for backward.",
        snippet="_by_head(v).flatten(0, 1)",
        replacement="v.permute(1, 2, 0, 3).flatten(0, 1)",
        caught_by=("self_attention",),
    ),
    _core(
        name="attention-padding-instead-of-causal",
        wrong="With padding, the causal mask is left out.",
        snippet="allowed = real if allowed is None else allowed & real",
        replacement="allowed = real",
    ),
    _core(
        name="attention-padding-only-alone",
        wrong="With a causal mask, padding is attended to.",
        snippet="allowed = real if allowed is None else allowed & real",
        replacement="allowed = real if allowed is None else allowed",
    ),
    _core(
        name="sink-not-learnt",
        wrong="The sinks get no gradient.",
        snippet="column = sink.to(scores.dtype)",
        replacement="column = sink.detach().to(scores.dtype)",
    ),
    _core(
        name="sink-of-first-head",
        wrong="All heads of a rank have the sink of its first.",
        snippet="column = sink.to(scores.dtype)",
        replacement="column = sink[:1].expand_as(sink).to(scores.dtype)",
    ),
    _core(
        name="attention-groups-interleaved",
        wrong="Heads take the keys of the groups in turn, instead of one group after the other.",
        snippet="query = _by_head(q * (scale / layer_number))",
        replacement=(
            "turns = q.unflatten(2, (-1, groups)).transpose(2, 3).flatten(2, 3)\n"
            "    query = _by_head(turns * (scale / layer_number))"
        ),
    ),
    _core(
        name="dropout-of-shares-alike",
        wrong="All ranks drop the same shares, of different heads.",
        snippet="dropout_stream=self.dropout_stream,",
        replacement="",
    ),
    _core(
        name="dropout-of-shares-not-scaled",
        wrong="Shares that are kept are not scaled up for those that are dropped.",
        snippet="shares = dropped(shares, p=dropout, stream=dropout_stream)",
        replacement="shares = dropped(shares, p=dropout, stream=dropout_stream) * (1 - dropout)",
    ),
    _core(
        name="dropout-in-evaluation",
        wrong="Shares are dropped outside of training too.",
        snippet="dropout=self.dropout if self.training else 0.0,",
        replacement="dropout=self.dropout,",
    ),
    _core(
        name="dropout-of-output",
        wrong="The output is dropped from instead of the shares.",
        snippet=_DEAD,
        replacement=_DEAD + "    out = dropped(out, p=dropout, stream=dropout_stream)\n",
    ),
    _core(
        name="core-heads-rounded-down",
        wrong="Heads that do not divide by the ranks are cut to a number that does.",
        snippet='divide(heads, group=group, name="heads")\n        if window',
        replacement="max(heads // dist.get_world_size(group), 1)\n        if window",
        caught_by=("core_attention",),
    ),
    _core(
        name="core-window-out-of-range",
        wrong="A window below one is accepted.",
        snippet="if window is not None and window < 1:",
        replacement="if window is None and layer_number is not None and layer_number < -9:",
        caught_by=("core_attention",),
    ),
    _core(
        name="core-dropout-out-of-range",
        wrong="A dropout out of range is taken for the nearest that is in it.",
        snippet='check_probability(dropout, name="dropout")',
        replacement="dropout = min(max(dropout, 0.0), 0.99)",
        caught_by=("core_attention",),
    ),
    _self(
        name="qkv-packed-by-kind",
        wrong="A rank's packed rows are read as all its queries, all its keys, all its values.",
        snippet=_PACKED,
        replacement=(
            "        parts = (self.groups * self.queries, self.groups, self.groups)\n"
            "        q, k, v = qkv.unflatten(-1, (-1, self.head_size)).split(parts, dim=2)\n"
        ),
    ),
    _self(
        name="qkv-keys-for-values",
        wrong="The keys of a group are taken for its values, and the values for its keys.",
        snippet="q, k, v = q.flatten(2, 3), k.squeeze(-2), v.squeeze(-2)",
        replacement="q, v, k = q.flatten(2, 3), k.squeeze(-2), v.squeeze(-2)",
    ),
    _self(
        name="shared-group-of-other-ranks",
        wrong="Ranks share groups in turn, instead of neighbours one group.",
        snippet="dist.get_rank(self.group) // self.copies * width",
        replacement=(
            "dist.get_rank(self.group) % (dist.get_world_size(self.group) // self.copies) * width"
        ),
    ),
    _self(
        name="shared-group-first-queries",
        wrong="Every rank that shares a group takes the first of its queries.",
        snippet="own = dist.get_rank(self.group) % self.copies * self.heads",
        replacement="own = 0",
    ),
    _self(
        name="shared-group-gradient-not-summed",
        wrong="The gradients of shared keys and values are of one rank's queries.",
        snippet=_GATHERED,
        replacement=(
            "from impl.mappings import gather_from_tensor_parallel_region as gather\n\n"
            "            qkv = gather(qkv, group=self.group)"
        ),
    ),
    _self(
        name="shared-group-of-own-rows",
        wrong="Ranks that share a group take their own rows of its projection for all of them.",
        snippet=_GATHERED,
        replacement="qkv = qkv.repeat(1, 1, dist.get_world_size(self.group))",
        seen="ATT-11",
    ),
    _self(
        name="groups-rounded-down",
        wrong="Groups that do not divide by the ranks are accepted.",
        snippet="if groups % ranks and ranks % groups:",
        replacement="if groups % ranks and ranks % groups and heads < 0:",
    ),
    _self(
        name="groups-of-one-rank",
        wrong="A rank counts the groups that it has as if there were no other.",
        snippet="max(groups // dist.get_world_size(group), 1), heads // groups",
        replacement="groups, heads // groups",
        seen="ATT-04",
    ),
    _self(
        name="keys-not-turned",
        wrong="Queries are turned by their position, keys are not.",
        snippet="q, k = rotary(q), rotary(k)",
        replacement="q = rotary(q)",
    ),
    _self(
        name="keys-normalised-as-queries",
        wrong="Keys are normalised with the weights of the queries' norm.",
        snippet="k = self.key_norm(k)",
        replacement="k = (self.query_norm or self.key_norm)(k)",
    ),
    _self(
        name="heads-of-output-transposed",
        wrong="The output's features are given to the projection head by head within a feature.",
        snippet="self.core(q, k, v, **arguments).flatten(2)",
        replacement="self.core(q, k, v, **arguments).transpose(2, 3).flatten(2)",
    ),
    _self(
        name="padding-not-handed-on",
        wrong="The block keeps the padding to itself.",
        snippet="self.core(q, k, v, **arguments).flatten(2)",
        replacement="self.core(q, k, v).flatten(2)",
    ),
    _core(
        name="attention-of-any-shapes",
        wrong="Queries, keys and values of other batches or lengths are broadcast to each other.",
        snippet="    _check_shapes(q, k, v)\n",
        replacement="",
        caught_by=("core_attention",),
    ),
)
