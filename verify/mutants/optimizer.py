"""Mutants of the optimizer: update rules, norms and clipping, loss scales, learning rates."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_of = partial(Mutant, family="optimizer", caught_by=("training_steps",))
_adam = partial(_of, module="impl.optimizer.adam")
_sgd = partial(_of, module="impl.optimizer.sgd")
_clip = partial(_of, module="impl.optimizer.clip")
_step = partial(_of, module="impl.optimizer.mixed")
_scale = partial(_of, module="impl.optimizer.loss_scale")
_rate = partial(_of, module="impl.optimizer.schedule", caught_by=("learning_rates",))

_RULES = (
    _adam(
        name="adam-decay-twice",
        wrong="Weight decay is part of the gradient too.",
        snippet="mean.lerp_(gradient, 1 - self.beta1)",
        replacement="mean.lerp_(gradient.add(values, alpha=weight_decay), 1 - self.beta1)",
    ),
    _adam(
        name="adam-epsilon-inside",
        wrong="Epsilon is added to the mean square, not to its root.",
        snippet=".sqrt_().add_(self.eps)",
        replacement=".add_(self.eps).sqrt_()",
    ),
    _adam(
        name="adam-mean-biased",
        wrong="The mean of gradients is not corrected for its start at zero.",
        snippet="value=-lr / (1 - self.beta1**step)",
        replacement="value=-lr",
    ),
    _sgd(
        name="sgd-decay-lost",
        wrong="Weights do not decay.",
        snippet="change = gradient.add(values, alpha=weight_decay)",
        replacement="change = gradient",
    ),
    _sgd(
        name="sgd-dampened",
        wrong="Momentum takes a part of the new gradient only.",
        snippet=".add_(change)",
        replacement=".add_(change, alpha=1 - self.momentum)",
    ),
    _step(
        name="update-of-gradients-only",
        wrong="A parameter whose gradient is zero neither decays nor goes on with its momentum.",
        snippet="        self.rule.update(\n            each.main,",
        replacement="        if not each.share.gradient.any():\n            return\n"
        "        self.rule.update(\n            each.main,",
    ),
    _step(
        name="step-counted-late",
        wrong="Adam's corrections are those of the next step.",
        snippet="step=self.updates,",
        replacement="step=self.updates + 1,",
    ),
    _step(
        name="step-one-rate-for-all",
        wrong="All groups have the same learning rate.",
        snippet="rate * group.lr_multiplier",
        replacement="rate",
    ),
    _step(
        name="step-one-decay-for-all",
        wrong="All groups have the same weight decay.",
        snippet="self.weight_decay * each.group.weight_decay_multiplier",
        replacement="self.weight_decay",
    ),
    _step(
        name="step-groups-by-decay",
        wrong="Of groups that decay alike, all have the learning rate of the last.",
        snippet="""\
        by_group = dict(zip(map(id, self.parameter_groups), rates, strict=True))
        for each in self.slots:
            self._update(each, lr=by_group[id(each.group)])
""",
        replacement="""\
        decays = [each.weight_decay_multiplier for each in self.parameter_groups]
        by_decay = dict(zip(decays, rates, strict=True))
        for each in self.slots:
            self._update(each, lr=by_decay[each.group.weight_decay_multiplier])
""",
        seen="CK-03",
    ),
    _step(
        name="step-main-parameters-only",
        wrong="Main parameters are updated, and those of the model stay.",
        snippet="if each.main is not each.share.values:",
        replacement="if each.main is each.share.values:",
    ),
    _step(
        name="step-groups-overlap",
        wrong="A parameter in two groups is taken to be in the second.",
        snippet="            if parameter in found:",
        replacement="            if parameter in found and not group.parameters:",
    ),
)
_NORMS = (
    _step(
        name="clip-counted-only",
        wrong="Of parameters that all ranks of tp have, only the first rank clips its copy.",
        snippet="gradients = [share.gradient for share in self.shares]",
        replacement="""gradients = [
                share.gradient
                for share in self.shares
                if getattr(share.parameter, "tensor_model_parallel", False)
                or self.groups.rank("tp") == 0
            ]""",
        seen="NORM-01",
    ),
    _clip(
        name="clip-amplifies",
        wrong="Gradients below the threshold are amplified, above it they stay.",
        snippet=".clamp(max=1.0)",
        replacement=".clamp(min=1.0)",
        seen="NORM-10",
    ),
    _clip(
        name="clip-never-refused",
        wrong="A negative threshold turns gradients around.",
        snippet="if not max_norm > 0:",
        replacement="if max_norm == 0:",
    ),
    _clip(
        name="norm-counts-copies",
        wrong="Every copy of a parameter over tp counts.",
        snippet='groups.rank("etp" if of_expert(share.parameter) else "tp") == 0',
        replacement='groups.rank("etp" if of_expert(share.parameter) else "tp") >= 0',
        seen="NORM-06",
    ),
    _clip(
        name="norm-without-experts",
        wrong="Experts are clipped by the norm of everything else.",
        snippet="for expert in (False, True):",
        replacement="for expert in (False,):",
        seen="NORM-08",
    ),
    _clip(
        name="norm-of-own-shard",
        wrong="The norm is that of this rank's shard of every bucket.",
        snippet="        if distributed:",
        replacement="        if distributed and order < 0:",
    ),
    _clip(
        name="norm-of-ranks-with-gradients",
        wrong="A rank that has a shard of padding leaves out the sum that the others wait in.",
        snippet="        if distributed:",
        replacement="        if distributed and mine:",
        seen="NORM-13",
    ),
    _clip(
        name="norm-of-what-a-stage-has",
        wrong="A stage without experts leaves out the sum over experts that the others wait in.",
        snippet="for expert in (False, True):",
        replacement="for expert in sorted({False, *(of_expert(s.parameter) for s in shares)}):",
        caught_by=("gpt_training",),
        seen="HANG-02",
    ),
    _clip(
        name="norm-of-experts-over-tp",
        wrong="Experts on other ranks of ep do not count.",
        snippet="groups.etp_ep_pp if expert else groups.tp_pp",
        replacement="groups.tp_pp",
        seen="NORM-08",
    ),
    _clip(
        name="norm-of-norms",
        wrong="Norms of parameters are added, not their powers.",
        snippet="(norms**order).sum()",
        replacement="norms.sum() ** order",
    ),
    _step(
        name="norm-of-the-first-step",
        wrong="The norm is kept, and gradients that have changed since are clipped by it.",
        snippet="        if self.max_norm is not None:\n",
        replacement="""\
        self.kept = norm = getattr(self, "kept", norm)
        if self.max_norm is not None:
""",
        seen="NORM-11",
    ),
)
_SCALES = (
    _step(
        name="skip-not-agreed-over-tp",
        wrong="A rank of tp goes on where another skips.",
        snippet="(self.groups.tp_dp_cp, self.groups.pp)",
        replacement="(self.groups.dp_cp, self.groups.pp)",
    ),
    _step(
        name="skip-not-agreed-over-shards",
        wrong="A rank that has a shard of padding goes on where the others skip.",
        snippet="(self.groups.tp_dp_cp, self.groups.pp)",
        replacement="(self.groups.tp_pp,)",
    ),
    _step(
        name="skip-counts-for-the-schedule",
        wrong="A skipped step counts as an update.",
        snippet="            self.loss_scale.update(overflow=overflow)\n",
        replacement=(
            "            self.loss_scale.update(overflow=overflow)\n"
            "            self.updates += overflow\n"
        ),
    ),
    _step(
        name="scale-stays-in-gradients",
        wrong="Gradients keep the scale of the loss.",
        snippet="share.gradient.mul_(1.0 / scale)",
        replacement="share.gradient.mul_(1.0)",
    ),
    _scale(
        name="scale-grows-after-overflow",
        wrong="Steps before an overflow count for the growth after it.",
        snippet="self.steps, self.overflows = 0, self.overflows + 1",
        replacement="self.overflows += 1",
    ),
    _scale(
        name="scale-growth-counts-as-overflow",
        wrong="A scale that has grown has one overflow of its hysteresis behind it.",
        snippet="self.steps, self.overflows = 0, 0",
        replacement="self.steps, self.overflows = 0, 1",
    ),
    _scale(
        name="scale-below-its-minimum",
        wrong="The scale shrinks on, below the minimum that it was given.",
        snippet="self.value = max(self.value * self.backoff, self.minimum)",
        replacement="self.value = self.value * self.backoff",
    ),
    _scale(
        name="scale-without-hysteresis",
        wrong="Each overflow shrinks the scale.",
        snippet="if self.overflows >= self.hysteresis:",
        replacement="if self.overflows:",
    ),
)
_RATES = (
    _rate(
        name="rate-warm-up-early",
        wrong="Warm-up begins with its second rate.",
        snippet="return self.maximum * step / self.warmup_steps",
        replacement="return self.maximum * (step + 1) / self.warmup_steps",
    ),
    _rate(
        name="rate-decays-from-zero",
        wrong="The decay counts from the first update, not from the end of warm-up.",
        snippet="(step - first) / (self.decay_steps - first)",
        replacement="step / self.decay_steps",
    ),
    _rate(
        name="rate-minimum-as-floor",
        wrong="Rates fall towards zero and stop at the minimum.",
        snippet="return self.minimum + left * (self.maximum - self.minimum)",
        replacement="return max(self.minimum, left * self.maximum)",
    ),
    _rate(
        name="rate-for-ever",
        wrong="After the end the rate is the largest.",
        snippet="""        if step > self.decay_steps:
            return self.minimum""",
        replacement="""        if step > self.decay_steps:
            return self.maximum""",
    ),
    _rate(
        name="rate-before-the-first",
        wrong="A step before the first has a rate, below zero while it warms up.",
        snippet="        if step < 0:",
        replacement="        if step < -self.warmup_steps:",
    ),
    _rate(
        name="rate-annealing-at-once",
        wrong="Annealing begins with the end of warm-up.",
        snippet="""            first = self.decay_steps - self.annealing_steps
        else:""",
        replacement="""            pass
        else:""",
    ),
    _rate(
        name="rate-root-of-zero-warm-up",
        wrong="Without warm-up the inverse square root never begins.",
        snippet="start = max(self.warmup_steps, 1)",
        replacement="start = self.warmup_steps or self.decay_steps",
    ),
)
MUTANTS = (*_RULES, *_NORMS, *_SCALES, *_RATES)
