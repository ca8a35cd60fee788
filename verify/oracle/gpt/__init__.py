"""The contract of a whole GPT that is trained: everything of the other contracts at once.

Embeddings, transformer layers, a last norm, logits, cross entropy; on any layout; accumulated over
microbatches through a pipeline, clipped, and applied by an optimizer, for several steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from verify.case import Case
from verify.errors import BadArgument
from verify.oracle.context import PLACEMENTS
from verify.oracle.contract import Contract, Tensors, TensorSpec
from verify.oracle.gpt.dropouts import masks_of
from verify.oracle.gpt.model import FROZEN, OPTIONS, Model, training_case
from verify.oracle.gpt.parameters import Stack, stacks_of
from verify.oracle.gpt.reference import ModelPlan, Training
from verify.oracle.gpt.routers import settled
from verify.oracle.learning_rates import rates_of
from verify.oracle.terms import one_of
from verify.oracle.training_plan import FACTORS, plan_of
from verify.placement import Cut, Listed, Partial, Placement, Placements, Shard

AXES = ("tp", "cp", "dp", "pp", "etp", "ep", "edp")


def gpt_training(case: Case) -> Contract:
    """tokens, targets [steps, microbatches, batch, sequence] of the vocabulary, and mask, which
    says what counts: the sequence as `placement` says over cp, the batch Shard over dp, Replicate
    over tp and pp. With `packed` each row has so many sequences, which lie as those of
    `context_split`, with other padding in each microbatch: a loss of further tokens counts those of
    the same sequence only.

    Of every step: `loss`, the mean over all tokens that count; `norm` of all gradients before
    clipping, each parameter counted once; the `scale` of the loss; the learning `rates`; with
    `evaluated`, the loss of the same data afterwards, without dropout; with `multi_token` modules
    the mean loss of each, `further` [steps, multi_token]; on every rank. `gradient
    NAME` after finalisation and `new NAME` after the step, of every stack of parameters (see
    `verify.oracle.gpt.parameters`), the first dimension being the step; with `distributed`, a
    gradient is the sum over dp and cp, of experts over edp, of shards with zeros around them.

    An embedding that is tied, or that `multi_token` modules look tokens up in, is on the first
    stage and on the last, and starts with what the first one has. Of their losses the mean times
    `multi_token_scaling` is trained beside the main loss. Each is given the states of the one
    before it, with `multi_token_normalised` behind their last norm, as logits are made of them.

    In the step that is to `overflow`, the rank with the number that the seed is modulo their number
    multiplies the gradient of what its first chunk gives by infinity, so that some parameter's is
    not finite: a part of an embedding alone, without positions, need not have one. `skipped` says
    of each step if it was: it has a norm and gradients of zero, and changes nothing but the scale.

    Options: those of `transformer_layer` but marks of padding, with `layer_scaling` instead of a
    number, and the sizes of latents where it has them; of `training_steps`, the order of the norm
    being `order`, and `frozen` a word of names; `positions`, none, rotary (with a rotary_dim) or
    learned; `max_sequence`, the most tokens of a sequence, padding included, those of a row unless
    given; `tied`; the vocabulary is padded to a `multiple` of tp; `every`, which layers have the
    case's `experts`, with the auxiliary losses of `moe_layer`; `first`, `last` and `split`, how
    layers are shared out; the `pipeline` schedule; `dispatcher`. With `overlap` the first stage,
    if it has one chunk, begins to reduce gradients over dp within backward passes, from the second
    step on; experts' need not. Stages send each other activations and their gradients, whole or in
    tp parts, and nothing else: all have one shape, which every stage knows. See
    `verify.checks.traffic`.
    """
    model = Model.of(case)
    if (longest := max(model.sequences.padded)) > model.max_sequence:
        raise BadArgument(
            f"case.options.max_sequence: {model.max_sequence} is less than the {longest} tokens of"
            " the longest sequence"
        )
    stacks = stacks_of(model)
    steps, shape = case.shape["steps"], case.shape
    plan = ModelPlan(**vars(plan_of(training_case(case), steps, frozen=FROZEN)))
    training = Training(model, stacks, plan, rates_of(training_case(case), steps))
    cut = model.sequences.cut(one_of(case, "placement", PLACEMENTS))
    placed: Placements = {"cp": replace(cut, dim=3), "dp": Shard(2)}
    size = (steps, shape["microbatches"], shape["batch"], shape["sequence"])
    highs = {"tokens": shape["vocabulary"], "targets": shape["vocabulary"], "mask": 2}
    divided, over = _divided(model)
    return Contract(
        axes=AXES,
        inputs={
            **{name: TensorSpec(size, placed, None, high=high) for name, high in highs.items()},
            **model.lengths,
        },
        parameters={name: stack.full for name, stack in stacks.items()},
        outputs=_outputs(model, plan, stacks),
        reference=training.run,
        frozen=frozenset(stacks),
        abrupt=plan.optimizer == "adam",
        masks=masks_of(model),
        divided=divided,
        over=over,
        settle=_settles(training),
        message=_activation(case),
    )


def _activation(case: Case) -> int:
    """The elements of what a stage gives the next, of one microbatch."""
    layout, shape = case.layout, case.shape
    split = layout.cp * (layout.tp if layout.sequence_parallel else 1)
    return shape["sequence"] // split * (shape["batch"] // layout.dp) * shape["hidden"]


def _settles(training: Training) -> Callable[[Tensors, Tensors], Tensors] | None:
    """In float32, tokens that no router is in doubt about. With dropout nothing is known of what
    routers are given, and in 16 bits some router of a model always is in doubt."""
    model = training.model
    dropouts = model.layer.hidden_dropout or model.layer.attention_dropout
    if model.rule is None or model.case.dtype != "float32" or dropouts:
        return None

    def settle(inputs: Tensors, parameters: Tensors) -> Tensors:
        return settled(inputs, parameters, training.is_in_doubt)

    return settle


def _divided(model: Model) -> tuple[dict[str, int], dict[str, tuple[str, ...]]]:
    """What ranks share out beside the tensors that are given: that of a layer, and tokens."""
    case, layout = model.case, model.case.layout
    divided, over = dict(model.inner.divided), dict(model.inner.over)
    if layout.sequence_parallel:
        divided["sequence"], over["sequence"] = case.shape["sequence"], ("cp", "tp")
    if model.rule is None:
        return divided, over
    divided |= {"experts": model.rule.experts, "ffn of experts": case.shape["ffn"]}
    over |= {"experts": ("ep",), "ffn of experts": ("etp",)}
    if "shared_ffn" in case.shape:
        divided["shared_ffn"], over["shared_ffn"] = case.shape["shared_ffn"], ("tp",)
    if not layout.sequence_parallel:
        tokens = case.shape["sequence"] // layout.cp * (case.shape["batch"] // layout.dp)
        divided["tokens"], over["tokens"] = tokens, ("tp",)
    return divided, over


def _outputs(model: Model, plan: ModelPlan, stacks: Mapping[str, Stack]) -> dict[str, TensorSpec]:
    """Causes first: the losses of all steps but the first depend on all the rest."""
    case, steps = model.case, model.case.shape["steps"]
    told = TensorSpec((steps,), grad_placements=None)
    found = {"scale": told, "rates": TensorSpec((steps, len(FACTORS[plan.groups])), {}, None)}
    for name, stack in stacks.items():
        if plan.is_frozen(name):
            continue
        copies = ("edp",) if ".experts." in name else ("dp", "cp")
        summed = {axis: Partial() for axis in copies} if plan.distributed else {}
        placed = {**later(stack.placements), **summed}
        shape = (steps, *stack.full)
        found[f"gradient {name}"] = TensorSpec(shape, placed, None)
    for name, stack in stacks.items():
        found[f"new {name}"] = TensorSpec((steps, *stack.full), later(stack.placements), None)
    found |= {"norm": told, "loss": told, "skipped": told}
    if model.depths:
        found["further"] = TensorSpec((steps, model.depths), {}, None)
    return found | ({"evaluation": told} if case.options.get("evaluated", False) else {})


def later(placements: Placements) -> Placements:
    """The placements of a tensor with one dimension more in front."""
    found: dict[str, Placement] = {}
    for axis, placement in placements.items():
        if isinstance(placement, Listed):
            found[axis] = Listed(placement.dim + 1, placement.indices)
        elif isinstance(placement, Shard):
            found[axis] = Shard(placement.dim + 1, placement.stride)
        else:
            assert not isinstance(placement, Cut)
            found[axis] = placement
    return found


__all__ = ["OPTIONS", "gpt_training", "stacks_of"]
