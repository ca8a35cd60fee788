"""Mutants of the vocabulary-parallel cross entropy."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_mutant = partial(
    Mutant, family="loss", module="impl.cross_entropy", caught_by=("vocab_cross_entropy",)
)

_MAXIMUM = "maximum = all_reduce(x.amax(-1), op=dist.ReduceOp.MAX, group=group)"
_HERE = "here = (targets >= self.part.start) & (targets < self.part.stop)"
_UPSTREAM = "slope *= gradient.masked_fill(targets == classes.ignore_index, 0.0).unsqueeze(-1)"

_KEPT = """\
        ctx.save_for_backward(logits, targets, maximum, total)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, maximum, total = ctx.saved_tensors
"""

MUTANTS = (
    _mutant(
        name="loss-keeps-probabilities",
        wrong="For backward the probabilities are kept beside the logits.",
        snippet=_KEPT,
        replacement=_KEPT.replace(
            "maximum, total)", "maximum, total, (logits - maximum.unsqueeze(-1)).exp())"
        ).replace("maximum, total = ", "maximum, total, _ = "),
    ),
    _mutant(
        name="loss-local-maximum",
        wrong="The maximum is not exchanged, and the sums of exponentials have different units.",
        snippet=_MAXIMUM,
        replacement="maximum = x.amax(-1)",
    ),
    _mutant(
        name="loss-no-maximum",
        wrong="No maximum is subtracted, so that large logits overflow.",
        snippet=_MAXIMUM,
        replacement="maximum = torch.zeros_like(x[..., 0])",
    ),
    _mutant(
        name="loss-sum-of-maxima",
        wrong="The maxima are summed, so that large logits underflow.",
        snippet=_MAXIMUM,
        replacement="maximum = all_reduce(x.amax(-1), group=group)",
    ),
    _mutant(
        name="loss-first-class-lost",
        wrong="A target that is the first class of a rank's part belongs to nobody.",
        snippet=_HERE,
        replacement="here = (targets > self.part.start) & (targets < self.part.stop)",
    ),
    _mutant(
        name="loss-target-on-every-rank",
        wrong="Ranks that do not have the target add the logit of their first class.",
        snippet="of_target = x.gather(-1, index).squeeze(-1).where(here, 0.0)",
        replacement="of_target = x.gather(-1, index).squeeze(-1)",
    ),
    _mutant(
        name="loss-target-gradient-on-every-rank",
        wrong="Ranks that do not have the target take its gradient from their first class.",
        snippet="-classes.extra * here.to(slope.dtype).unsqueeze(-1)",
        replacement="-classes.extra * torch.ones_like(index, dtype=slope.dtype)",
        seen="CE-03",
    ),
    _mutant(
        name="loss-first-upstream",
        wrong="Every token's gradient is multiplied by the upstream gradient of the first.",
        snippet=_UPSTREAM,
        replacement=(
            "counted = (targets != classes.ignore_index).unsqueeze(-1)\n"
            "    slope *= gradient.flatten()[0] * counted"
        ),
        seen="CE-05",
    ),
    _mutant(
        name="loss-ignored-gradient",
        wrong="Ignored targets have no loss, but a gradient.",
        snippet=_UPSTREAM,
        replacement="slope *= gradient.unsqueeze(-1)",
    ),
    _mutant(
        name="loss-ignored-counts",
        wrong="Ignored targets have a loss, but no gradient.",
        snippet="loss = loss.masked_fill(targets == classes.ignore_index, 0.0)",
        replacement="loss = loss.clone()",
    ),
    _mutant(
        name="loss-smoothing-over-own-part",
        wrong="The mean of log p that label smoothing takes is over this rank's classes only.",
        snippet="loss -= classes.share * of_all",
        replacement="loss -= classes.share * terms[2]",
        seen="megatron-core 0.16.1, vocab_parallel_cross_entropy",
    ),
    _mutant(
        name="loss-smoothing-without-gradient",
        wrong="Label smoothing is in the loss, and only the target's part of it in the gradient.",
        snippet="slope[..., : classes.real] -= classes.share",
        replacement="slope[..., : classes.real] -= 0.0",
    ),
    _mutant(
        name="loss-smoothing-to-padding",
        wrong="Label smoothing is shared with the padding of the vocabulary.",
        snippet="share = label_smoothing / (total - 1) if label_smoothing else 0.0",
        replacement="share = label_smoothing / (padded - 1) if label_smoothing else 0.0",
    ),
    _mutant(
        name="loss-smoothing-twice-to-target",
        wrong="The target has its share of the smoothing on top of 1 - a.",
        snippet="extra=1.0 - label_smoothing - share",
        replacement="extra=1.0 - label_smoothing",
    ),
    _mutant(
        name="loss-padding-gradient",
        wrong="Padding is masked in the loss, but not in the gradient.",
        snippet="x = classes.masked(logits)\n    slope =",
        replacement="x = logits.to(_compute_dtype(logits), copy=True)\n    slope =",
    ),
    _mutant(
        name="loss-padding-only-rank",
        wrong="A rank that has nothing but padding masks only the end of it.",
        snippet="real=min(max(total - part.start, 0), len(part))",
        replacement="real=min(total - part.start, len(part))",
    ),
    _mutant(
        name="loss-float64-in-float32",
        wrong="Logits in float64 are rounded to float32.",
        snippet="return torch.float64 if logits.dtype is torch.float64 else torch.float32",
        replacement="return torch.float32",
        seen="megatron-core 0.16.1, vocab_parallel_cross_entropy",
    ),
    _mutant(
        name="loss-in-logits-precision",
        wrong="The loss of bfloat16 logits is computed in bfloat16.",
        snippet="return torch.float64 if logits.dtype is torch.float64 else torch.float32",
        replacement="return logits.dtype",
    ),
    _mutant(
        name="loss-any-smoothing",
        wrong="A label smoothing of one and more is accepted.",
        snippet="if not 0.0 <= label_smoothing < 1.0:",
        replacement="if not 0.0 <= label_smoothing:",
    ),
    _mutant(
        name="loss-of-any-targets",
        wrong="The target of one token is taken for all.",
        snippet="    if targets.shape != logits.shape[:-1]:",
        replacement="    targets = targets.expand(logits.shape[:-1])\n    if False:",
    ),
    _mutant(
        name="loss-of-no-class",
        wrong="A target that is no class has a loss, as if its logit were the largest.",
        snippet="((targets < 0) | (targets >= self.total)) & (targets != self.ignore_index)",
        replacement="torch.zeros_like(targets, dtype=torch.bool)",
        caught_by=("vocab_cross_entropy", "linear_cross_entropy"),
        seen="megatron-core 0.16.1, vocab_parallel_cross_entropy",
    ),
    _mutant(
        name="loss-of-padding",
        wrong="A target among the padding has a loss, as if its logit were the largest.",
        snippet="((targets < 0) | (targets >= self.total)) & (targets != self.ignore_index)",
        replacement="(targets < 0) & (targets != self.ignore_index)",
        caught_by=("vocab_cross_entropy", "linear_cross_entropy"),
    ),
)
