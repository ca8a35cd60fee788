"""Mutants of the mappings, and of the collectives and the partition below them."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_mapping = partial(Mutant, family="mapping", module="impl.mappings")
_collective = partial(Mutant, family="mapping", module="impl.collectives")
_partition = partial(Mutant, family="mapping", module="impl.partition")

_COPY_BACKWARD = "return all_reduce(gradient, group=ctx.group), None"
_REDUCE = """\
        return all_reduce(x, group=group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
"""
_CHOICE = "mapping = _GatherForPartial if tensor_parallel_output_grad else _Gather"
_FIRST = "first = dist.get_rank(group) * length"
_SIDE_BY_SIDE = "return parts.movedim(0, dim).flatten(dim, dim + 1)"

MUTANTS = (
    _mapping(
        name="copy-without-sum",
        wrong="The gradient of what is copied to the tensor-parallel region stays Partial.",
        snippet=_COPY_BACKWARD,
        replacement="return gradient, None",
        caught_by=("copy_to_tp",),
    ),
    _mapping(
        name="copy-averages",
        wrong="The gradient of what is copied is divided by tp.",
        snippet=_COPY_BACKWARD,
        replacement="return all_reduce(gradient, group=ctx.group) / ctx.group.size(), None",
        caught_by=("copy_to_tp",),
    ),
    _mapping(
        name="reduce-sums-the-gradient",
        wrong="Backward of the all-reduce is another one, so the gradient is tp times too large.",
        snippet=_REDUCE,
        replacement="        ctx.group = group\n"
        + _REDUCE.replace("return gradient", "return all_reduce(gradient, group=ctx.group)"),
        caught_by=("reduce_from_tp",),
    ),
    _mapping(
        name="gather-sums-the-gradient",
        wrong="The gradient of gathered features is summed, although every rank has all of it.",
        snippet="return _Gather.apply(x, -1, group)",
        replacement="return _GatherForPartial.apply(x, -1, group)",
        caught_by=("gather_from_tp", "column_linear"),
    ),
    _mapping(
        name="sequence-gather-always-sums",
        wrong="tensor_parallel_output_grad=False is ignored, so a whole gradient is summed.",
        snippet=_CHOICE,
        replacement="mapping = _GatherForPartial",
        caught_by=("gather_from_sp",),
    ),
    _mapping(
        name="sequence-gather-never-sums",
        wrong="The gradient of a gathered sequence is cut, but not summed.",
        snippet=_CHOICE,
        replacement="mapping = _Gather",
        caught_by=("gather_from_sp",),
    ),
    _mapping(
        name="all-to-all-forward-twice",
        wrong="Backward of the all-to-all takes the same way once more, not the way back.",
        snippet="concat_dim, split_dim = ctx.dims",
        replacement="split_dim, concat_dim = ctx.dims",
        caught_by=("all_to_all_sp_to_hp", "all_to_all_hp_to_sp"),
    ),
    _collective(
        name="gather-scrambles-last-dim",
        wrong="Parts gathered along dimension 0 are reshaped, not moved, to another dimension.",
        snippet=_SIDE_BY_SIDE,
        replacement="return parts.reshape(*parts.shape[1 : dim + 1], -1, *parts.shape[dim + 2 :])",
        caught_by=("gather_from_tp", "scatter_to_tp", "all_gather_last_dim"),
        seen="SP-05",
    ),
    _collective(
        name="gather-interleaves",
        wrong="The elements of the ranks alternate in the gathered dimension.",
        snippet=_SIDE_BY_SIDE,
        replacement="return parts.movedim(0, dim + 1).flatten(dim, dim + 1)",
        caught_by=("gather_from_tp", "scatter_to_sp", "all_to_all_sp_to_hp"),
    ),
    _collective(
        name="reduce-scatter-scrambles-last-dim",
        wrong="The last dimension is cut for the ranks as if it were the first in memory.",
        snippet="return parts.movedim(dim, 0).flatten(0, 1)",
        replacement="return x.reshape(parts.movedim(dim, 0).flatten(0, 1).shape)",
        caught_by=("reduce_scatter_last_dim", "all_gather_last_dim"),
        seen="SP-05",
    ),
    _collective(
        name="all-reduce-in-bfloat16",
        wrong="Summands are rounded to bfloat16 on their way.",
        snippet="out = x.clone(memory_format=torch.contiguous_format)",
        replacement="out = x.to(torch.bfloat16).to(x.dtype).contiguous()",
        caught_by=("reduce_from_tp", "row_linear", "tp_mlp"),
        seen="FP8-04",
    ),
    _collective(
        name="collective-not-waited-for",
        wrong="The result of a collective is read before it is complete.",
        snippet="            self.work.wait()\n",
        replacement="            pass\n",
        caught_by=("copy_to_tp", "gather_from_sp", "column_linear"),
        seen="TPL-08",
    ),
    _partition(
        name="part-of-rank-modulo-size",
        wrong="The global rank modulo the size of the group is taken for the rank in the group.",
        snippet=_FIRST,
        replacement="first = dist.get_rank() % dist.get_world_size(group) * length",
        caught_by=("scatter_to_tp", "scatter_to_sp", "vocab_embedding", "vocab_cross_entropy"),
    ),
    _partition(
        name="part-of-two",
        wrong="All ranks but the first take the last part.",
        snippet=_FIRST,
        replacement="first = 0 if dist.get_rank(group) == 0 else size - length",
        caught_by=("scatter_to_tp", "scatter_to_sp", "vocab_embedding", "vocab_cross_entropy"),
    ),
    _partition(
        name="division-with-a-rest",
        wrong="A size that does not divide is rounded down, and the rest is lost.",
        snippet="if size < 1 or size % parts:",
        replacement="if size < 1:",
        caught_by=("column_linear", "row_linear", "vocab_embedding", "scatter_to_tp"),
    ),
)
