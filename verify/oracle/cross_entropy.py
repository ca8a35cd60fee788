"""The cross entropy of logits split over tp along the vocabulary; one loss a token, no mean.

    loss = -(1 - a) log p[target] - a / (K - 1) * sum of log p[other classes],   p = softmax(logits)

With label smoothing a the target keeps 1 - a and the other K - 1 classes share a: Megatron's
convention (its docstring derives it), which is torch's with label_smoothing = a K / (K - 1).

With z_loss z, z (log sum exp(logits))^2 is added (arXiv:2204.02311, section 5).

Vocabularies are padded to divide by tp. K is `vocabulary`, or with mask_padding `real_vocabulary`:
then the classes beyond it count as logits of minus infinity, have no share of the smoothing and get
no gradient. Targets lie within the real vocabulary. With `ignored`, targets may be -100; their
loss and all of their gradient are zero.

Whatever the dtype of the logits, all of it is computed in float32, and the loss is float32, as
megatron-core's `vocab_parallel_cross_entropy` does (its first step is `logits.float()`); only
float64 stays float64. The gradient has the dtype of the logits.

Where the target is all but certain, the loss is the logarithm of a sum just above 1, and its
gradient the difference of two numbers near 1: both have the rounding errors of 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from verify.case import Case
from verify.errors import BadArgument
from verify.oracle.contract import IGNORED, Contract, TensorSpec
from verify.oracle.terms import fit, known_options, number, sizes, switches
from verify.placement import Replicate, Shard

_SWITCHES = {"ignored": False, "mask_padding": False}
OPTIONS = ("label_smoothing", "z_loss", *_SWITCHES)


def vocab_cross_entropy(case: Case) -> Contract:
    """logits [sequence, batch, vocabulary] and their gradient Shard(-1) over tp; targets and loss
    [sequence, batch] Replicate. Forward exchanges the maximum, the target's logit and the sum of
    exponentials; backward exchanges nothing. Kept are this rank's logits, or their exponentials,
    and three numbers a token.

    Raises BadArgument for label_smoothing outside [0, 1) or of a single class, and for a real
    vocabulary that exceeds the padded one.
    """
    known_options(case, *OPTIONS)
    sequence, batch, vocabulary = sizes(
        case, "sequence", "batch", "vocabulary", optional=("real_vocabulary",)
    )
    real, losses = losses_of(case)
    return Contract(
        inputs={
            "logits": TensorSpec(
                (sequence, batch, vocabulary), {"tp": Shard(-1)}, {"tp": Shard(-1)}, terms=1.0
            ),
            "targets": TensorSpec((sequence, batch), grad_placements=None, high=real),
        },
        parameters={},
        outputs={
            "loss": TensorSpec(
                (sequence, batch), {"tp": Replicate()}, {"tp": Replicate()}, terms=1.0
            )
        },
        reference=lambda inputs, parameters: {"loss": losses(inputs["logits"], inputs["targets"])},
        kept=sequence * batch * (vocabulary // case.layout.tp + 3),
    )


def losses_of(case: Case) -> tuple[int, Callable[[Tensor, Tensor], Tensor]]:
    """The number of real classes, and the loss of every target, of logits and targets, by the
    options of a case. Raises BadArgument as `vocab_cross_entropy` does."""
    vocabulary = case.shape["vocabulary"]
    real = case.shape.get("real_vocabulary", vocabulary)
    if real > vocabulary:
        raise BadArgument(
            f"case.shape.real_vocabulary: {real} exceeds vocabulary={vocabulary}, its padded size"
        )
    masked = switches(case, _SWITCHES)["mask_padding"]
    classes = real if masked else vocabulary
    smoothing, z_loss = _smoothing(case, classes), number(case, "z_loss", least=0.0) or 0.0
    losses = partial(loss_of, classes=classes, smoothing=smoothing, z_loss=z_loss)

    def checked(logits: Tensor, targets: Tensor) -> Tensor:
        if masked and logits.shape[-1] < case.shape.get("real_vocabulary", 0):
            raise ValueError(f"logits: {logits.shape[-1]} are fewer than the {real} real classes")
        return losses(logits, targets)

    return real, checked


def loss_of(
    logits: Tensor, targets: Tensor, *, classes: int, smoothing: float, z_loss: float
) -> Tensor:
    """The loss of every target over the first `classes` logits, float32 or float64."""
    fit("targets", targets, logits.shape[:-1])
    wide = logits if logits.dtype is torch.float64 else logits.float()
    log_p = torch.log_softmax(wide[..., :classes], dim=-1)
    counted = targets != IGNORED
    of_target = log_p.gather(-1, targets.where(counted, 0).unsqueeze(-1)).squeeze(-1)
    loss = -of_target
    if smoothing:
        of_others = (log_p.sum(-1) - of_target) / (classes - 1)
        loss = -(1 - smoothing) * of_target - smoothing * of_others
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(wide[..., :classes], -1) ** 2
    return loss.where(counted, 0.0)


def _smoothing(case: Case, classes: int) -> float:
    smoothing = case.options.get("label_smoothing", 0.0)
    number = isinstance(smoothing, int | float) and not isinstance(smoothing, bool)
    if not number or not 0 <= float(smoothing) < 1:  # type: ignore[arg-type]
        raise BadArgument(f"case.options.label_smoothing: {smoothing!r} is not in [0, 1)")
    if smoothing and classes == 1:
        raise BadArgument(
            f"case.options.label_smoothing: {smoothing!r} needs another class to move it to; the"
            " vocabulary has 1"
        )
    return float(smoothing)  # type: ignore[arg-type]
