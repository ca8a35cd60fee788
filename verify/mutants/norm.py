"""Mutants of the norms, and of what their replicated parameters' gradients are summed over."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_BOTH = ("norm", "qk_norm")
_mutant = partial(Mutant, family="norm", module="impl.norm", caught_by=_BOTH)

_BIAS = "self.bias = replicated_parameter(features, init=zeros_, **common) if bias else None"
_MARK = '"sequence_parallel": sequence_parallel or sharded_heads,'
_SQUARES = "of_x = of_normal - normal * (of_normal * normal).mean(-1, keepdim=True)"
_MEAN = "of_x = of_x - of_normal.mean(-1, keepdim=True)"
_WIDE = "wide = x.to(torch.promote_types(x.dtype, torch.float32))"
_STATISTIC = "scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)"
_OF_WEIGHT = "of_weight = (given * normal).flatten(0, -2).sum(0).to(weight.dtype)"

MUTANTS = (
    _mutant(
        name="norm-marked-by-class",
        wrong="Gradients are summed over tp for layer norms, not for RMS norms.",
        snippet=_MARK,
        replacement='"sequence_parallel": (sequence_parallel or sharded_heads) and self.centred,',
        seen="SP-02",
    ),
    _mutant(
        name="norm-of-heads-not-marked",
        wrong="Gradients of norms of heads are of this rank's heads only.",
        snippet=_MARK,
        replacement='"sequence_parallel": sequence_parallel,',
        caught_by=("qk_norm",),
        seen="megatron/core/distributed/finalize_model_grads.py, qk_layernorm",
    ),
    _mutant(
        name="norm-not-marked",
        wrong="Gradients under sequence parallelism are of this rank's tokens only.",
        snippet=_MARK,
        replacement='"sequence_parallel": sharded_heads,',
        caught_by=("norm",),
        seen="SP-02",
    ),
    _mutant(
        name="norm-always-marked",
        wrong="Gradients are summed over tp where every rank has them complete.",
        snippet=_MARK,
        replacement='"sequence_parallel": True,',
        caught_by=("norm",),
    ),
    _mutant(
        name="norm-bias-not-marked",
        wrong="The gradient of the bias is not summed over tp, that of the weight is.",
        snippet=_BIAS,
        replacement=(
            'del common["sequence_parallel"]\n'
            "        self.bias = (\n"
            "            replicated_parameter(features, init=zeros_, **common) if bias else None\n"
            "        )"
        ),
        seen="SP-03",
    ),
    _mutant(
        name="norm-offset-lost",
        wrong="A zero-centred weight is taken for the factor itself.",
        snippet="return weight.to(dtype) + 1.0 if zero_centered else weight.to(dtype)",
        replacement="return weight.to(dtype)",
    ),
    _mutant(
        name="norm-offset-lost-in-backward",
        wrong="Backward takes a zero-centred weight for the factor itself.",
        snippet="_factor(weight, scale.dtype, ctx.zero_centered)",
        replacement="_factor(weight, scale.dtype, False)",
    ),
    _mutant(
        name="norm-statistics-in-low-precision",
        wrong="Squares of float16 features are computed in float16, and overflow.",
        snippet=_WIDE,
        replacement="wide = x",
        caught_by=("norm",),
    ),
    _mutant(
        name="norm-epsilon-outside-of-root",
        wrong="The epsilon is added to the root.",
        snippet=_STATISTIC,
        replacement="scale = 1.0 / (wide.square().mean(-1, keepdim=True).sqrt() + eps)",
    ),
    _mutant(
        name="norm-unbiased-variance",
        wrong="The sum of squares is divided by one feature less.",
        snippet=_STATISTIC,
        replacement=(
            "squares = wide.square().sum(-1, keepdim=True) / max(x.shape[-1] - 1, 1)\n"
            "        scale = torch.rsqrt(squares + eps)"
        ),
    ),
    _mutant(
        name="norm-mean-over-batch",
        wrong="What is subtracted is the mean over rows too.",
        snippet="mean = wide.mean(-1, keepdim=True) if centred else None",
        replacement="mean = wide.mean((-2, -1), keepdim=True) if centred else None",
    ),
    _mutant(
        name="norm-always-centred",
        wrong="An RMS norm takes the mean off, as a layer norm.",
        snippet="mean = wide.mean(-1, keepdim=True) if centred else None",
        replacement="mean = wide.mean(-1, keepdim=True)",
    ),
    _mutant(
        name="norm-scale-a-constant",
        wrong="Backward takes the scale for a constant.",
        snippet=_SQUARES,
        replacement="of_x = of_normal",
    ),
    _mutant(
        name="norm-mean-a-constant",
        wrong="Backward takes the mean for a constant.",
        snippet=_MEAN,
        replacement="of_x = of_x - 0.0",
    ),
    _mutant(
        name="norm-weight-gradient-of-x",
        wrong="The gradient of the weight is of x instead of what is normalised.",
        snippet=_OF_WEIGHT,
        replacement="of_weight = (given * wide).flatten(0, -2).sum(0).to(weight.dtype)",
    ),
    _mutant(
        name="norm-weight-gradient-averaged",
        wrong="The gradient of the weight is a mean over rows.",
        snippet=_OF_WEIGHT,
        replacement="of_weight = (given * normal).flatten(0, -2).mean(0).to(weight.dtype)",
    ),
    _mutant(
        name="norm-keeps-float32",
        wrong="What is normalised is kept for backward in float32, beside x.",
        snippet="ctx.save_for_backward(x, mean, scale, weight)",
        replacement=(
            "ctx.save_for_backward(x, mean, scale, weight)\n"
            "        with torch.enable_grad():\n"
            "            ctx.normal = (wide * scale).requires_grad_().exp()"
        ),
        caught_by=("norm",),
    ),
    _mutant(
        name="norm-of-any-width",
        wrong="A single feature is normalised, and multiplied by every weight.",
        snippet="if x.shape[-1] != self.features:",
        replacement="if not x.shape[-1]:",
    ),
)
