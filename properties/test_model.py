"""A whole GPT, trained for several steps on any layout.

Laws: (1) the loss of every step, every parameter's gradient after finalisation, the norm of all
gradients, the learning rate and every parameter after the step are those of one device: with any
schedule of the pipeline, several microbatches, rows of several sequences, tokens that do not count,
norms, activations, positions, groups of heads or latents in their place, sinks, slopes and scales
of scores, algorithms of context parallelism, sequence parallelism, data parallelism with buckets,
overlap and shards, optimizers, clipping that changes gradients and clipping that does not; (2) so
they are with an embedding that is tied over two stages, (3) with layers shared out unevenly, and
several chunks a stage, (4) with experts in some layers and what their routers add to the loss, (5)
with dropout, under the masks that were drawn, and (6) with recomputation, which changes no bit; (7)
an evaluation between steps is right, and changes nothing; (8) the layout and (9) running twice
change nothing; (10) what cannot be computed is refused; (11) with modules that predict tokens
further on, their losses are those of one device, and so is all else, in training with them; (12) a
step whose gradients overflow on one rank is skipped by all, and changes the loss scale only; (13)
what is frozen stays as it is, and all else is trained as ever; (14) with overlap, gradients are
reduced within the last backward passes, and stages send each other activations and their gradients
and nothing else. Laws 1 to 7, 13 and 14 are asked of
models with what most implementations have too, so that those are seen that have no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import given

from verify.case import Case
from verify.oracle.gpt.model import FROZEN
from verify.runner.examiner import CheckCase
from verify.strategies.cases import Choices
from verify.strategies.dropouts import telling
from verify.strategies.gpt import model_cases, refusable_model_cases
from verify.strategies.gpt_choices import (
    DOUBLE,
    MODEL,
    OPTIMIZING,
    PLAIN,
    PLAIN_EXPERTS,
    PLAIN_TRAINING,
)
from verify.strategies.gpt_layouts import LARGE
from verify.strategies.training import with_copies

CLIPPED: Choices = {"clip": (2.0**-4, 2.0**-4, None), "order": OPTIMIZING["order"]}
SHARDED: Choices = {n: OPTIMIZING[n] for n in ("clip", "bucket", "distributed", "overlap")}

# Without what has laws of its own, and makes a case several times as long.
NEXT: Choices = {"multi_token": (0,), "evaluated": (False,)}
# Where packed sequences end depends on cp.
ALONE: Choices = {**NEXT, "packed": (0,)}
SKIPPED: Choices = {
    **{n: OPTIMIZING[n] for n in ("optimizer", "momentum", "clip", "distributed", "overlap")},
    "loss_scale": ("dynamic", "dynamic", "static"),
    "frozen": OPTIMIZING["frozen"],
    "hysteresis": OPTIMIZING["hysteresis"],
    "overflow": (1, 2, 0),
}
OVERLAPPED: Choices = {**PLAIN_TRAINING, "overlap": (True,)}

OF_MOST: Mapping[str, Any] = {
    "model": PLAIN,
    "plain": True,
    "latent": (False,),
    "uneven": (False,),
    "dtypes": ("float32", "bfloat16"),
}
EXPERTS: Mapping[str, Any] = {
    **OF_MOST,
    "model": PLAIN_EXPERTS,
    "experts": (True,),
    "anywhere": False,
    "dtypes": ("float32",),
}
# As most models do that have latents; many of those have experts, too.
LATENTS: Mapping[str, Any] = {
    **EXPERTS,
    "model": {**PLAIN_EXPERTS, "positions": ("rotary",), "interleaved": (True,)},
    "experts": (False, True),
    "latent": (True,),
    "sequence_parallel": (True,),
}
AHEAD: Mapping[str, Any] = {
    **OF_MOST,
    "model": {
        **PLAIN,
        "positions": ("none", "rotary"),
        "mask": ("causal",),
        "multi_token": (1, 2),
        # Where what is kept is distributed too, megatron-core's second module raises.
        "recompute": ("", "full", "selective"),
        "multi_token_scaling": MODEL["multi_token_scaling"],
        "multi_token_normalised": (True,),
    },
}
BALANCED: Choices = {
    **PLAIN_EXPERTS,
    "balance": ("sequence", "batch", "none"),
    "z_loss": (0.0, 0.25),
    "evaluated": (False,),
}
DROPPED: Choices = {
    **PLAIN,
    "hidden_dropout": (0.25, 0.1),
    "attention_dropout": (0.0, 0.25),
}
RECOMPUTED: Choices = {
    **PLAIN,
    "hidden_dropout": (0.0, 0.25),
    "recompute": ("full", "full_distributed"),
}
AGAIN: Choices = {**PLAIN, "attention_dropout": (0.0, 0.25), "recompute": ("selective",)}


@given(case=model_cases(steps=(2, 1, 3), worlds=LARGE))
def test_end_to_end(check: CheckCase, case: Case) -> None:
    """Laws 1, 3, 6 and 7. Must catch: a mean of means; a loss of the last stage that is scaled as
    if it were all; positions of a chunk; a sink or a shared latent that counts on one rank of tp
    only; a gradient that one axis of two has not summed; a norm of one stage; padding of the
    vocabulary that is predicted."""
    check("equivalence", case)


@given(
    case=telling(
        model_cases(
            model={"multi_token": (0,), "hidden_dropout": (0.0, 0.25)},
            uneven=(False, False, True),
            dtypes=DOUBLE,
            worlds=(2,),
        )
    )
)
def test_on_two_ranks(check: CheckCase, case: Case) -> None:
    """Laws 1 to 3 and 5 to 7. Must catch: what shows where one axis is split in two, sooner than
    among many ranks: tokens, targets or positions of others; an embedding that is dropped alike; a
    norm that is not there, or not summed; gradients of the step before."""
    check("equivalence", case)


@given(
    case=model_cases(
        options={**CLIPPED, **SHARDED}, model={"tied": (True,)}, min_pp=2, dtypes=DOUBLE
    )
)
def test_tied_embeddings(check: CheckCase, case: Case) -> None:
    """Law 2. Must catch: a copy that starts apart; gradients that are not summed, or over other
    stages; a copy that counts twice in the norm; shards of two copies that do not fit."""
    check("equivalence", case)


@given(
    case=model_cases(
        options={},
        model=NEXT,
        uneven=(True,),
        experts=(False, True),
        chunks=(1, 2, 3),
        min_pp=2,
        dtypes=DOUBLE,
    )
)
def test_stages_of_unequal_length(check: CheckCase, case: Case) -> None:
    """Law 3. Must catch: layers of the stage before; chunks in the order of stages; a first norm
    or last norm on another stage; experts in other layers, as if all chunks had as many."""
    check("equivalence", case)


@given(
    case=model_cases(
        options={**CLIPPED, **SHARDED, "loss_scale": OPTIMIZING["loss_scale"]},
        model={"evaluated": (False,)},
        experts=(True,),
        dtypes=DOUBLE,
    )
)
def test_mixture_of_experts(check: CheckCase, case: Case) -> None:
    """Law 4. Must catch: experts summed over dp; experts that count on one rank only, or on all, in
    the norm; the wrong layers with experts; auxiliary losses that are not scaled as the main one,
    or not averaged over microbatches and ranks."""
    check("equivalence", case)


@given(
    case=telling(
        model_cases(
            options={"optimizer": OPTIMIZING["optimizer"]},
            model={"hidden_dropout": (0.25, 0.1), "attention_dropout": (0.0, 0.25)},
            worlds=(2, 2, 4),
        )
    )
)
def test_dropout(check: CheckCase, case: Case) -> None:
    """Laws 5 and 7. Must catch: one stream for all stages; an embedding that is not dropped; masks
    drawn again in the backward of another microbatch; dropout in an evaluation."""
    check("equivalence", case)


@given(
    case=model_cases(
        options={},
        model={**NEXT, "hidden_dropout": (0.0, 0.25, 0.1), "recompute": ("full", "selective")},
        steps=(1,),
    )
)
def test_recomputation(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: other masks in backward than in forward, where other microbatches come
    between; a stream that goes on from where backward left it."""
    check("recomputation", case)


@given(
    case=model_cases(options=SHARDED, model=ALONE, uneven=(False,), one_padding=True, steps=(1,))
)
def test_the_layout_does_not_matter(check: CheckCase, case: Case) -> None:
    """Law 8. Must catch: another formula for one rank."""
    check("invariance", case)


@given(case=model_cases(model={**NEXT, "hidden_dropout": (0.0, 0.25)}, steps=(1,)))
def test_the_same_bits_again(check: CheckCase, case: Case) -> None:
    """Law 9. Must catch: a tensor that is read before it is there; a generator left by an earlier
    run."""
    check("determinism", case)


@given(case=model_cases(options=SHARDED, model={"multi_token": (1, 2, 3)}, uneven=(False,)))
def test_multi_token_prediction(check: CheckCase, case: Case) -> None:
    """Law 11. Must catch: tokens moved by one place too few, within a rank's chunks, or from the
    next sequence; the last tokens, which nothing follows, in the loss; losses that are not divided
    by the number of depths; a copy of the embedding on the last stage that follows its own
    gradient."""
    check("equivalence", case)


@given(case=model_cases(options={**SHARDED, "optimizer": ("adam", "sgd")}, steps=(1,), **AHEAD))
def test_multi_token_prediction_of_most_models(check: CheckCase, case: Case) -> None:
    """Law 11, of modules that are given normalised states. Must catch: tokens or targets moved by
    one place too few; states before the last norm; losses that are not divided by the number of
    depths; a copy of the embedding on the last stage that follows its own gradient."""
    check("equivalence", case)


@given(case=model_cases(options=SKIPPED, model=NEXT, steps=(2, 3), dtypes=DOUBLE))
def test_skipped_and_frozen(check: CheckCase, case: Case) -> None:
    """Laws 12 and 13. Must catch: a stage that goes on alone; a loss scale that only one rank
    halves; a skipped step that counts; stages without anything to train; layers that are not
    trained where their input needs no gradient; one copy of an embedding that is frozen."""
    check("equivalence", case)


@given(case=model_cases(options=PLAIN_TRAINING, steps=(2, 1, 3), **OF_MOST))
def test_what_most_models_have(check: CheckCase, case: Case) -> None:
    """Laws 1, 2, 6 and 7. Must catch: what the laws say, where nothing unusual is asked for."""
    check("equivalence", case)


@given(
    case=model_cases(
        options={**SHARDED, "optimizer": ("adam", "sgd")},
        chunks=(1, 2, 3),
        min_pp=2,
        steps=(1,),
        **{**OF_MOST, "uneven": (True,)},
    )
)
def test_unequal_stages_of_most_models(check: CheckCase, case: Case) -> None:
    """Law 3. Must catch: layers of another stage where first and last stages have their own."""
    check("equivalence", case)


@given(case=model_cases(options={**PLAIN_TRAINING, "frozen": FROZEN[1:]}, **OF_MOST))
def test_frozen_parts_of_most_models(check: CheckCase, case: Case) -> None:
    """Law 13. Must catch: layers that are not trained, as the input that they are computed again
    from needs no gradient."""
    check("equivalence", case)


@given(case=model_cases(options={}, steps=(1,), **{**OF_MOST, "model": RECOMPUTED}))
def test_recomputation_of_most_models(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: a microbatch that is computed again from the input of another."""
    check("recomputation", case)


@given(case=model_cases(options={}, steps=(1,), **{**OF_MOST, "model": AGAIN}))
def test_recomputed_attention_of_most_models(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: gradients that reach what is before it in another memory order."""
    check("recomputation", case)


@given(
    case=telling(
        model_cases(options={"optimizer": OPTIMIZING["optimizer"]}, **{**OF_MOST, "model": DROPPED})
    )
)
def test_dropout_of_most_models(check: CheckCase, case: Case) -> None:
    """Laws 5 and 7. Must catch: an embedding whose parts on the ranks of tp are dropped alike;
    copies that are not."""
    check("equivalence", case)


@given(case=model_cases(options=PLAIN_TRAINING, steps=(1,), **LATENTS))
def test_latents_of_most_models(check: CheckCase, case: Case) -> None:
    """Laws 1, 2, 6 and 7, with sequence parallelism. Must catch: gradients of narrow weights, or of
    norms of latents, that are of this rank's tokens; a gradient of the shared key of this rank's
    heads only; narrow weights that count once for each rank of tp in the norm of all gradients;
    scores scaled by a part of the key."""
    check("equivalence", case)


@given(case=model_cases(options=PLAIN_TRAINING, steps=(2, 1), **EXPERTS))
def test_experts_of_most_models(check: CheckCase, case: Case) -> None:
    """Law 4. Must catch: gradients of experts that are not summed over edp, or over more than that;
    experts that count on one rank only, or on all, in the norm; the wrong layers with experts."""
    check("equivalence", case)


@given(case=model_cases(options={}, steps=(1,), **{**EXPERTS, "anywhere": True}))
def test_experts_anywhere_of_most_models(check: CheckCase, case: Case) -> None:
    """Law 4. Must catch: experts that are divided otherwise than all else, as if they were not;
    ranks that are counted in another order."""
    check("equivalence", case)


@given(
    case=model_cases(
        options={**SHARDED, "optimizer": ("adam", "sgd")},
        steps=(1,),
        **{**EXPERTS, "model": BALANCED},
    )
)
def test_auxiliary_losses_of_most_models(check: CheckCase, case: Case) -> None:
    """Law 4. Must catch: auxiliary losses that are not averaged over microbatches and ranks, that
    each rank of tp adds all of, or that recomputation adds twice."""
    check("equivalence", case)


@given(case=with_copies(model_cases(options=OVERLAPPED, steps=(2,), **OF_MOST)))
def test_traffic_of_most_models(check: CheckCase, case: Case) -> None:
    """Law 14. Must catch: gradients that are reduced when the last stage of the pipeline is done,
    as without overlap; shapes that are announced where all are alike."""
    check("traffic", case)


@given(case=refusable_model_cases())
def test_refusals(check: CheckCase, case: Case) -> None:
    """Law 10. Must catch: layers left over; a schedule or positions that there are not;
    microbatches that cannot be grouped; a sequence that is longer than all may be."""
    check("refusal", case)
