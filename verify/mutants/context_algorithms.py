"""Mutants of the ways in which keys come to queries: all-gather, ring, Ulysses, two levels."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_mutant = partial(Mutant, family="context", caught_by=("context_attention",))
_gather = partial(
    _mutant,
    module="impl.context_parallel.all_gather",
    caught_by=("context_attention", "context_attention_block"),
)
_ring = partial(_mutant, module="impl.context_parallel.ring")
_ulysses = partial(_mutant, module="impl.context_parallel.ulysses")
_levels = partial(_mutant, module="impl.context_parallel.hierarchical")
_plan = partial(_mutant, module="impl.context_parallel.plan")

_WAIT = "all_k, all_v = (each.wait() for each in gathering)"
_KEPT = f"""\
        ctx.everything = everything
        return sweep.save(ctx, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cp = ctx.plan.groups.cp
        sweep = BackwardSweep(ctx, gradient)
        gathering = [start_all_gather(x, group=cp) for x in (sweep.k, sweep.v)]
        {_WAIT}
"""
_SHARES = "shares = tuple(a + b for a, b in zip(others, shares, strict=True))"
_HOME = "dk, dv = shares if travelling is None else travelling.wait()"
_FORWARD_SHIFT = "shift = None if last else start_shift(*here, group=group)"
_ARRIVED = "here = here if shift is None else shift.wait()\n        ctx.group"

MUTANTS = (
    _gather(
        name="gather-kept",
        wrong="The gathered keys and values are kept for backward.",
        snippet=_KEPT,
        replacement=_KEPT.replace("save(ctx, k, v)", "save(ctx, all_k, all_v)")
        .replace(
            "        gathering = [start_all_gather(x, group=cp) for x in (sweep.k, sweep.v)]\n", ""
        )
        .replace(_WAIT, "all_k, all_v = sweep.k, sweep.v"),
    ),
    _gather(
        name="gather-gradients-not-summed",
        wrong="A rank keeps its own share of the gradients of its keys.",
        snippet="dk, dv = (each.wait() for each in summing)",
        replacement=(
            "_ = [each.wait() for each in summing]\n"
            "        dk, dv = (each.chunk(cp.size())[cp.rank()] for each in partial)"
        ),
    ),
    _gather(
        name="gather-not-waited-for",
        wrong="Keys are attended to while they are still being gathered.",
        snippet=f"{_WAIT}\n        sweep.show(",
        replacement="all_k, all_v = (each.result for each in gathering)\n        sweep.show(",
        seen="CP-13",
    ),
    _gather(
        name="gather-other-order",
        wrong="Gathered chunks are taken for those of the ranks in reverse order.",
        snippet="sweep.show(all_k, all_v, everything)",
        replacement=(
            "sweep.show(all_k.unflatten(0, (cp.size(), -1)).flip(0).flatten(0, 1),"
            " all_v.unflatten(0, (cp.size(), -1)).flip(0).flatten(0, 1), everything)"
        ),
    ),
    _ring(
        name="ring-peers-by-group-rank",
        wrong="The next and the previous rank are named by their place in the group.",
        snippet="ranks, mine = dist.get_process_group_ranks(group), dist.get_rank(group)",
        replacement="ranks, mine = range(dist.get_world_size(group)), dist.get_rank(group)",
        seen="GRP-04",
    ),
    _ring(
        name="ring-backward-with-own-keys",
        wrong="Backward takes the rank's own keys and values in every step.",
        snippet="sweep.show(here[0], here[1], ctx.chunks[source])",
        replacement="sweep.show(sweep.k, sweep.v, ctx.chunks[source])",
        seen="CP-07",
    ),
    _ring(
        name="ring-gradients-replaced",
        wrong="A rank sends on its own share of the gradients, without the others'.",
        snippet=_SHARES,
        replacement=_SHARES.replace("a + b", "b"),
    ),
    _ring(
        name="ring-gradients-one-short",
        wrong="Gradients of keys end one rank before the rank that holds the keys.",
        snippet=_HOME,
        replacement=(
            "dk, dv = shares\n        if travelling is not None:\n            travelling.wait()"
        ),
    ),
    _ring(
        name="ring-other-way",
        wrong="Keys are taken for those of the ranks after this one.",
        snippet="(mine - step) % size",
        replacement="(mine + step) % size",
    ),
    _ring(
        name="ring-one-send-too-many",
        wrong="Keys are sent on in the last step too.",
        snippet=_FORWARD_SHIFT,
        replacement="shift = start_shift(*here, group=group) if len(ctx.sources) > 1 else None",
    ),
    _ring(
        name="ring-not-waited-for",
        wrong="Keys are attended to before they have arrived.",
        snippet=_ARRIVED,
        replacement=_ARRIVED.replace("shift.wait()", "shift.received"),
        seen="CP-13",
    ),
    _ring(
        name="ring-sends-first",
        wrong="Every rank waits for its sends before it receives.",
        snippet="    return Shift(received, tensors, dist.batch_isend_irecv(posted))",
        replacement=(
            "    for each in posted:\n"
            "        each.op(each.tensor, each.peer, each.group).wait()\n"
            "    return Shift(received, tensors, ())"
        ),
    ),
    _ulysses(
        name="ulysses-heads-across",
        wrong="After the exchange the elements of a head are taken for heads.",
        snippet="exchanged.unflatten(2, (-1, x.shape[3]))",
        replacement="exchanged.unflatten(2, (x.shape[3], -1)).transpose(2, 3)",
        seen="CP-10",
    ),
    _ulysses(
        name="ulysses-output-across",
        wrong="The output comes back with heads and their elements exchanged.",
        snippet="back.unflatten(2, (q.shape[2], v.shape[3]))",
        replacement="back.unflatten(2, (v.shape[3], q.shape[2])).transpose(2, 3)",
        seen="CP-10",
    ),
    _ulysses(
        name="ulysses-kv-heads-in-turn",
        wrong="Kv heads are repeated in turn, so that ranks get keys of other heads.",
        snippet="x.repeat_interleave(size // kv_heads, dim=2)",
        replacement="x.repeat(1, 1, size // kv_heads, 1)",
    ),
    _ulysses(
        name="ulysses-kv-gradients-of-one-rank",
        wrong="Of a repeated kv head only the first copy has a gradient.",
        snippet="k, v = (x.repeat_interleave(size // kv_heads, dim=2) for x in (k, v))",
        replacement=(
            "k, v = (torch.stack([x] + [x.detach()] * (size // kv_heads - 1), 3).flatten(2, 3)"
            " for x in (k, v))"
        ),
    ),
    _plan(
        name="levels-strided",
        wrong="The ranks of an inner level are taken to lie apart in cp.",
        snippet="(self.chunks[i : i + size] for i in range(0, len(self.chunks), size))",
        replacement=(
            "(self.chunks[i :: len(self.chunks) // size] for i in range(len(self.chunks) // size))"
        ),
    ),
    _plan(
        name="heads-not-checked",
        wrong="Heads that do not divide are shared out all the same.",
        snippet="if heads % size:",
        replacement="if heads < 1:",
    ),
    _plan(
        name="kv-heads-not-checked",
        wrong="Kv heads that do not divide are shared out all the same.",
        snippet="if kv_heads % size and size % kv_heads:",
        replacement="if kv_heads < 1:",
    ),
    _levels(
        name="levels-exchanged",
        wrong="The outer ranks exchange heads, and keys go round the inner ones.",
        snippet="return inner, outer",
        replacement="return outer, inner",
    ),
    _levels(
        name="levels-made-up",
        wrong="Without two levels, heads are exchanged among all ranks.",
        snippet="    if len(groups.levels) != 2:",
        replacement=(
            "    if len(groups.levels) < 2:\n"
            "        return groups.cp, groups.cp\n"
            "    if len(groups.levels) != 2:"
        ),
    ),
)
