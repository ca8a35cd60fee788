"""Mutants of the mixture of experts: its dispatchers, experts and layer."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_of = partial(Mutant, family="experts")
_dispatch = partial(_of, module="impl.moe.dispatch", caught_by=("moe_dispatch",))
_order = partial(_of, module="impl.moe.permutation", caught_by=("moe_dispatch",))
_expert = partial(_of, module="impl.moe.experts", caught_by=("moe_layer",))
_layer = partial(_of, module="impl.moe.layer", caught_by=("moe_layer",))

_DISPATCH = (
    _dispatch(
        name="gather-first-experts",
        wrong="Every rank takes itself for the owner of the first experts.",
        snippet="local = everyone[:, mine.start : mine.stop]",
        replacement="local = everyone[:, : len(mine)]",
        seen="MOE-01",
    ),
    _dispatch(
        name="exchange-axes-swapped",
        wrong="Chunks are taken to come by ep and then etp, not by etp and then ep.",
        snippet="expert.repeat_interleave(table.flatten())",
        replacement="expert.repeat_interleave(table.transpose(0, 1).flatten())",
        seen="MOE-03",
    ),
    _dispatch(
        name="exchange-experts-first",
        wrong="Chunks are taken to be sorted by expert when they arrive.",
        snippet=".repeat(sources)",
        replacement=".repeat_interleave(sources)",
    ),
    _dispatch(
        name="exchange-not-put-back",
        wrong="Before they go home, outputs are permuted once more instead of back.",
        snippet="outputs.index_select(0, order.argsort())",
        replacement="outputs.index_select(0, order)",
        seen="MOE-10",
    ),
    _dispatch(
        name="gather-gradient-not-summed",
        wrong="Below experts that are split over etp, gradients are those of one rank.",
        snippet="gather_from_sequence_parallel_region(tokens, group=self.block_group)",
        replacement=(
            "gather_from_sequence_parallel_region(\n"
            "            tokens,\n"
            "            group=self.block_group,\n"
            "            tensor_parallel_output_grad=False,\n"
            "        )"
        ),
        caught_by=("moe_dispatch", "moe_layer"),
        seen="MOE-05",
    ),
    _dispatch(
        name="gather-gradient-of-weights-not-summed",
        wrong="The gradient of the weights is that of one rank.",
        snippet="gather_from_sequence_parallel_region(probabilities, group=self.block_group)",
        replacement=(
            "gather_from_sequence_parallel_region(\n"
            "                probabilities,\n"
            "                group=self.block_group,\n"
            "                tensor_parallel_output_grad=False,\n"
            "            )"
        ),
        caught_by=("moe_dispatch", "moe_layer"),
        seen="MOE-05",
    ),
    _dispatch(
        name="exchange-gradient-of-own-copy",
        wrong="Of the copies for the ranks of etp, only the first has a gradient.",
        snippet="x.repeat(size, 1), [x.shape[0]]",
        replacement="torch.cat([x, x.detach().repeat(size - 1, 1)]), [x.shape[0]]",
        caught_by=("moe_dispatch", "moe_layer"),
        seen="MOE-05",
    ),
    _dispatch(
        name="exchange-first-summand",
        wrong="Of the summands over etp, only the first comes home.",
        snippet=".unflatten(0, (size, own)).sum(0)",
        replacement=".unflatten(0, (size, own))[0]",
    ),
    _dispatch(
        name="exchange-weights-by-token",
        wrong="Weights are taken token by token, and outputs come expert by expert.",
        snippet="weights = probabilities.t()[chosen.t()]",
        replacement="weights = probabilities[chosen]",
    ),
    _dispatch(
        name="exchange-counts-of-own-tokens",
        wrong="Counts are taken to be alike on every rank.",
        snippet="of_ep = all_gather(counts.unsqueeze(0), dim=0, group=self.ep_group)[",
        replacement="of_ep = counts.expand(self.ep_group.size(), -1)[",
    ),
    _order(
        name="pairs-in-one-place",
        wrong="The outputs of a token's experts overwrite each other.",
        snippet="slots = chosen.cumsum(1)[tokens, experts] - 1",
        replacement="slots = 0 * experts",
    ),
    _order(
        name="pairs-averaged",
        wrong="The gradient of a token is the mean of its pairs'.",
        snippet="return _summed(gradient, ctx.permutation), None",
        replacement="return _summed(gradient, ctx.permutation) / ctx.permutation.width, None",
    ),
)
_EXPERTS = (
    _expert(
        name="experts-bias-on-every-rank",
        wrong="Every rank of etp adds the bias to its summand.",
        snippet="first = dist.get_rank(self.etp_group) == 0",
        replacement="first = 1",
        seen="TPL-03",
    ),
    _expert(
        name="experts-bias-gradient-of-one",
        wrong="Only the first rank of etp has a gradient of the bias.",
        snippet="copy_to_tensor_parallel_region(biases, group=self.etp_group) * first",
        replacement="biases * first",
    ),
    _expert(
        name="experts-packed-as-one",
        wrong="Gate and up are cut over etp as if they were one.",
        snippet='"partition_stride": stride',
        replacement='"partition_stride": 1',
        seen="TPL-06",
    ),
    _expert(
        name="experts-gate-and-up-exchanged",
        wrong="The activation is applied to up.",
        snippet="silu(gate) * up",
        replacement="silu(up) * gate",
    ),
    _expert(
        name="experts-in-reverse",
        wrong="A rank's experts are counted from its last.",
        snippet="linear(rows, weight[i])",
        replacement="linear(rows, weight[-1 - i])",
    ),
    _expert(
        name="experts-empty-left-out",
        wrong="An expert without tokens hands its weights to the next one's.",
        snippet="y: Tensor = _GroupedMatmul.apply(*as_autocast(x, self.weight), counts)",
        replacement=(
            "counts = [count for count in counts if count] + [0] * counts.count(0)\n"
            "        y: Tensor = _GroupedMatmul.apply(*as_autocast(x, self.weight), counts)"
        ),
    ),
    _expert(
        name="experts-marked-dense",
        wrong="Experts look like parameters that all of dp have copies of.",
        snippet='"allreduce": False',
        replacement='"allreduce": True',
    ),
    _expert(
        name="experts-ffn-rounded",
        wrong="An ffn that does not divide loses its rest.",
        snippet="        self.activation = activation\n",
        replacement="""\
        self.activation = activation
        ffn -= ffn % dist.get_world_size(etp_group)
""",
    ),
    _layer(
        name="layer-copies-dispatched",
        wrong="Without sequence parallelism the ranks of tp dispatch all their copies.",
        snippet='groups.size("tp") > 1 and not sequence_parallel',
        replacement="False",
    ),
    _layer(
        name="layer-gradient-of-gather-summed",
        wrong="Where the parts of tokens are gathered again, copies of gradients are summed.",
        snippet="y, group=self.groups.tp, tensor_parallel_output_grad=False",
        replacement="y, group=self.groups.tp",
    ),
    _layer(
        name="layer-tokens-by-sequence",
        wrong="Tokens come back in the order of the batch, which holds for one sequence only.",
        snippet="return y.view(x.shape)",
        replacement="return y.view(x.shape[1], x.shape[0], -1).transpose(0, 1)",
        seen="MOE-06",
    ),
    _layer(
        name="layer-counts-without-tp",
        wrong="Counts of a micro-batch are not reduced over tp.",
        snippet="microbatch_group=groups.tp_cp if sequence_parallel else groups.cp,",
        replacement="microbatch_group=groups.cp,",
    ),
    _layer(
        name="layer-counts-over-the-world",
        wrong="Global counts are summed over stages too, which have other layers at other times.",
        snippet="global_group=groups.tp_dp_cp if sequence_parallel else groups.dp_cp,",
        replacement="global_group=torch.distributed.group.WORLD,",
        caught_by=("gpt_training",),
        seen="GRP-09",
    ),
    _layer(
        name="layer-output-wide",
        wrong="The output has the dtype of the scores.",
        snippet="dispatched.combine(outputs, probabilities).to(x.dtype)",
        replacement="dispatched.combine(outputs, probabilities)",
    ),
    _layer(
        name="layer-shared-experts-last",
        wrong="Shared experts see what the others made of a token.",
        snippet="y + self.shared(x)",
        replacement="y + self.shared(y)",
    ),
)
MUTANTS = (*_DISPATCH, *_EXPERTS)
