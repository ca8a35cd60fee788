"""Mutants of the linear layers and of their parameters' marks."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_column = partial(
    Mutant, family="linear", module="impl.linear", caught_by=("column_linear", "tp_mlp")
)
_row = partial(Mutant, family="linear", module="impl.linear", caught_by=("row_linear", "tp_mlp"))

_BACK = "        return None if summing is None else summing.wait(), gradient_of_weight, None, None"
_PARTIAL = "partial = linear(x, self.weight)"
_SUM = """\
        if self.sequence_parallel:
            y = reduce_scatter_to_sequence_parallel_region(partial, group=self.group)
        else:
            y = reduce_from_tensor_parallel_region(partial, group=self.group)
"""
_OF_WEIGHT = "gradient_of_weight = weight_product(gradient, full)"

MUTANTS = (
    _column(
        name="column-frozen-without-sum",
        wrong="With a frozen weight the gradient of the input stays Partial.",
        snippet=_BACK,
        replacement=(
            "        if needs_x and not needs_weight and not ctx.sequence_parallel:\n"
            "            return partial, None, None, None\n" + _BACK
        ),
        caught_by=("column_linear",),
        seen="TPL-01",
    ),
    _column(
        name="column-own-rows-of-gradient",
        wrong="Under sequence parallelism a rank keeps its rows of its own share of the gradient.",
        snippet=_BACK,
        replacement=(
            "        if needs_x and ctx.sequence_parallel:\n"
            "            own = partial.chunk(ctx.group.size())[ctx.group.rank()]\n"
            "            return own, gradient_of_weight, None, None\n" + _BACK
        ),
    ),
    _column(
        name="column-own-tokens-of-weight-gradient",
        wrong="Under sequence parallelism the gradient of the weight sees this rank's tokens only.",
        snippet=_OF_WEIGHT,
        replacement=(
            _OF_WEIGHT + "\n"
            "            if ctx.sequence_parallel:\n"
            "                own = gradient.chunk(ctx.group.size())[ctx.group.rank()]\n"
            "                gradient_of_weight = weight_product(own, x)"
        ),
    ),
    _column(
        name="column-gather-not-waited-for",
        wrong="The gradient of the weight is taken of a sequence that is still being gathered.",
        snippet="full = x if gathering is None else gathering.wait()",
        replacement="full = x if gathering is None else gathering.result",
        seen="TPL-08",
    ),
    _column(
        name="column-packed-memory",
        wrong="The input of the weight's gradient is read as if it lay packed in memory.",
        module="impl.weight_pass",
        snippet="rows, columns = gradient.flatten(0, -2), x.flatten(0, -2)",
        replacement=(
            "rows, width = gradient.flatten(0, -2), x.shape[-1]\n"
            "    columns = x.as_strided((x.numel() // width, width), (width, 1))"
        ),
        caught_by=("column_linear",),
        seen="CP-02",
    ),
    _column(
        name="column-skipped-bias-added",
        wrong="skip_bias_add returns the bias, and adds it too.",
        snippet=(
            "        if self.bias is not None and not self.skip_bias_add:\n"
            "            y = y + self.bias\n"
            "        if self.gather_output"
        ),
        replacement=(
            "        if self.bias is not None:\n"
            "            y = y + self.bias\n"
            "        if self.gather_output"
        ),
        caught_by=("column_linear",),
    ),
    _column(
        name="column-gathers-under-sequence-parallelism",
        wrong="gather_output is accepted together with sequence parallelism.",
        snippet="if gather_output and sequence_parallel:",
        replacement="if gather_output and sequence_parallel and not bias:",
        caught_by=("column_linear",),
    ),
    _row(
        name="row-bias-before-sum",
        wrong="Every rank adds the bias to its summand, so that it counts tp times.",
        snippet=(
            f"{_PARTIAL}\n{_SUM}"
            "        if self.bias is not None and not self.skip_bias_add:\n"
            "            y = y + self.bias\n"
        ),
        replacement=(
            f"{_PARTIAL}\n"
            "        if self.bias is not None and not self.skip_bias_add:\n"
            f"            partial = partial + self.bias\n{_SUM}"
        ),
        seen="TPL-03",
    ),
    _row(
        name="row-bias-on-first-rank",
        wrong="Only the first rank adds the bias, so the others' copies get no gradient.",
        snippet=(
            "            y = reduce_from_tensor_parallel_region(partial, group=self.group)\n"
            "        if self.bias is not None and not self.skip_bias_add:\n"
            "            y = y + self.bias\n"
        ),
        replacement=(
            "            if self.bias is not None and not self.skip_bias_add:\n"
            "                partial = partial + self.bias * (self.group.rank() == 0)\n"
            "            y = reduce_from_tensor_parallel_region(partial, group=self.group)\n"
            "        if self.sequence_parallel and self.bias is not None:\n"
            "            y = y if self.skip_bias_add else y + self.bias\n"
        ),
    ),
    _row(
        name="row-bias-not-marked",
        wrong="Under sequence parallelism the gradient of the bias is not summed over tp.",
        snippet=(
            "                init=zeros_,\n                sequence_parallel=sequence_parallel,\n"
        ),
        replacement="                init=zeros_,\n",
        seen="SP-03",
    ),
    _row(
        name="row-bias-always-marked",
        wrong="The gradient of the bias is summed over tp without sequence parallelism too.",
        snippet=(
            "                init=zeros_,\n                sequence_parallel=sequence_parallel,\n"
        ),
        replacement=("                init=zeros_,\n                sequence_parallel=True,\n"),
    ),
    _row(
        name="row-splits-outside-autograd",
        wrong="An input that is not parallel is cut by hand, so its gradient is this rank's only.",
        snippet="x = scatter_to_tensor_parallel_region(x, group=self.group)",
        replacement="x = x.chunk(self.group.size(), -1)[self.group.rank()]",
        caught_by=("row_linear",),
    ),
    _row(
        name="row-frozen-without-gradient",
        wrong="A frozen layer lets no gradient through to its input.",
        snippet=_PARTIAL,
        replacement=(
            "partial = linear(x if self.weight.requires_grad else x.detach(), self.weight)"
        ),
        caught_by=("row_linear",),
    ),
    _row(
        name="sharded-marked-as-replicated-sequence",
        wrong="Gradients of sharded parameters are summed over tp after backward.",
        module="impl.parameters",
        snippet="tensor_model_parallel=True, partition_dim=dim, partition_stride=stride",
        replacement=(
            "tensor_model_parallel=True, partition_dim=dim, partition_stride=stride,"
            " sequence_parallel=True"
        ),
        caught_by=("column_linear", "row_linear", "vocab_embedding", "tp_mlp"),
    ),
)
