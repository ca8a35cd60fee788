"""Mutants of the router of a mixture of experts, its losses, and its bias."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_of = partial(Mutant, family="routing")
_router = partial(_of, module="impl.moe.router", caught_by=("moe_router",))
_balance = partial(_of, module="impl.moe.balance", caught_by=("moe_router",))
_bias = partial(_of, module="impl.moe.balance", caught_by=("moe_expert_bias",))

_ROUTER = (
    _router(
        name="router-not-marked",
        wrong="Under sequence parallelism the router's gradient is not summed over tp.",
        snippet="            sequence_parallel=sequence_parallel,\n            dtype=dtype,\n",
        replacement="            dtype=dtype,\n",
        caught_by=("moe_router", "moe_layer"),
    ),
    _router(
        name="router-bias-in-weights",
        wrong="The bias of experts reaches the weights, not their choice only.",
        snippet="        probabilities = scores.where(chosen, 0.0)\n        if choice.top_k > 1:",
        replacement=(
            "        seen = scores if bias is None else scores + bias\n"
            "        probabilities = seen.where(chosen, 0.0)\n        if choice.top_k > 1:"
        ),
    ),
    _router(
        name="router-sigmoids-undivided",
        wrong="Chosen sigmoids are not divided by their sum.",
        snippet="if choice.top_k > 1:\n            # The",
        replacement="if choice.top_k > scores.shape[-1]:\n            # The",
    ),
    _router(
        name="router-softmax-of-all",
        wrong="Weights are the chosen of the softmax of all, whether pre_softmax or not.",
        snippet="elif choice.pre_softmax:",
        replacement="elif True:",
    ),
    _router(
        name="router-unscaled",
        wrong="The scaling of the weights is left out.",
        snippet="return chosen, probabilities * choice.scaling",
        replacement="return chosen, probabilities",
    ),
    _router(
        name="router-best-of-group",
        wrong="A group of experts is ranked by its best score instead of the sum of several.",
        snippet="top_k_of(best.sum(-1), choice.group_top_k)",
        replacement="top_k_of(best.amax(-1), choice.group_top_k)",
    ),
    _router(
        name="router-all-groups",
        wrong="A token may go to any group of experts.",
        snippet="grouped.masked_fill(~admitted, -torch.inf).flatten(-2)",
        replacement="grouped.flatten(-2)",
    ),
    _router(
        name="capacity-rounded-down",
        wrong="An expert's capacity is rounded down.",
        snippet="math.ceil(tokens",
        replacement="math.floor(tokens",
    ),
    _router(
        name="capacity-of-one-choice",
        wrong="An expert's capacity is that of tokens with one choice.",
        snippet="tokens * choice.top_k * choice.capacity",
        replacement="tokens * choice.capacity",
    ),
    _router(
        name="capacity-drops-the-largest",
        wrong="The tokens that weigh an expert least are those it keeps.",
        snippet="ranked = probabilities.masked_fill(~chosen, -1.0)",
        replacement="ranked = (1 - probabilities).masked_fill(~chosen, -1.0)",
    ),
    _router(
        name="capacity-drops-the-first",
        wrong="By position, the last tokens are kept instead of the first.",
        snippet="chosen & (chosen.cumsum(0) <= room)",
        replacement="chosen & (chosen.flip(0).cumsum(0).flip(0) <= room)",
    ),
    _router(
        name="capacity-weights-kept",
        wrong="A choice that is dropped keeps its weight.",
        snippet="            probabilities = probabilities.where(chosen, 0.0)\n        losses",
        replacement="        losses",
    ),
    _router(
        name="capacity-weights-divided-again",
        wrong="The weights that are left of a token are made to sum to one.",
        snippet="            probabilities = probabilities.where(chosen, 0.0)\n        losses",
        replacement=(
            "            probabilities = probabilities.where(chosen, 0.0)\n"
            "            total = probabilities.sum(-1, keepdim=True)\n"
            "            probabilities = probabilities / total.clamp_min(1e-9)\n"
            "        losses"
        ),
    ),
    _router(
        name="router-more-groups-than-divide",
        wrong="Groups that do not divide the experts are accepted.",
        snippet="if self.groups < 1 or num_experts % self.groups:",
        replacement="if self.groups < 1:",
    ),
)
_LOSSES = (
    _balance(
        name="balance-own-counts",
        wrong="The load-balancing loss counts this rank's tokens only.",
        snippet="counts = all_reduce(counted.sum(dims), group=group)",
        replacement="counts = counted.sum(dims)",
        caught_by=("moe_router", "moe_layer"),
    ),
    _balance(
        name="balance-global-is-a-batch",
        wrong="The global loss counts the tokens of one micro-batch.",
        snippet='group = global_group if level == "global" else microbatch_group',
        replacement="group = microbatch_group",
    ),
    _balance(
        name="balance-not-a-mean",
        wrong="Losses of micro-batches are summed.",
        snippet='sets = 1 if level == "global" else ranks // microbatch_ranks',
        replacement="sets = 1",
    ),
    _balance(
        name="balance-sequences-summed",
        wrong="Losses of sequences are summed.",
        snippet='    sets *= batch if level == "sequence" else 1\n',
        replacement="",
    ),
    _balance(
        name="balance-without-top-k",
        wrong="The loss grows with the number of choices of a token.",
        snippet="(experts / (top_k * tokens * tokens * sets))",
        replacement="(experts / (tokens * tokens * sets))",
    ),
    _balance(
        name="balance-without-gradient",
        wrong="The scores that a loss is made of have no gradient.",
        snippet="total = (scores.sum(dims) * counts).sum()",
        replacement="total = (scores.detach().sum(dims) * counts).sum() + 0 * scores.sum()",
    ),
    _balance(
        name="loss-scale-ignored",
        wrong="Auxiliary losses get the gradient one.",
        snippet="torch.full_like(loss, scale)",
        replacement="torch.ones_like(loss)",
    ),
    _balance(
        name="z-loss-of-own-tokens",
        wrong="The z loss is a mean over this rank's tokens.",
        snippet="squares.sum() / (squares.numel() * dist.get_world_size(global_group))",
        replacement="squares.mean()",
        caught_by=("moe_router", "moe_layer"),
    ),
    _bias(
        name="bias-own-counts",
        wrong="The bias of experts follows this rank's tokens.",
        snippet="counts = all_reduce(self.counts, group=self.group)",
        replacement="counts = self.counts.clone()",
        seen="MOE-08",
    ),
    _bias(
        name="bias-counts-kept",
        wrong="The counts of a step are kept for the next.",
        snippet="        self.counts.zero_()\n",
        replacement="",
    ),
    _bias(
        name="bias-counts-evaluation",
        wrong="Tokens count in evaluation too.",
        snippet="if self.training and torch.is_grad_enabled():",
        replacement="if torch.is_grad_enabled():",
        seen="MOE-08",
    ),
    _bias(
        name="bias-counts-twice",
        wrong="Tokens count again when a forward pass is recomputed.",
        snippet="if self.training and torch.is_grad_enabled():",
        replacement="if self.training:",
        seen="REC-03",
    ),
    _bias(
        name="bias-other-way",
        wrong="The bias of busy experts rises.",
        snippet="behind = counts.sum() - counts * counts.numel()",
        replacement="behind = counts * counts.numel() - counts.sum()",
    ),
)
MUTANTS = (*_ROUTER, *_LOSSES)
