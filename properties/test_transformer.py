"""A whole transformer layer under tensor, sequence and context parallelism.

Laws: (1) the output, the gradient of the input and of every parameter are those of one device, with
any algorithm and placement of context parallelism, norm, activation, grouping of heads, latents,
rotary embedding and way of scoring (key padding, ALiBi, sinks, scaling by the layer), of one
sequence or of packed ones; (2) so they are with dropout, under the masks that were drawn: alike
where ranks hold copies, independent where they hold parts, and outside of training without any; (3)
recomputation, selective or full, of an input that is distributed over tp or not, changes no bit,
and leaves every random stream as it was; (4) a rank communicates what the published diagram shows,
around each pair of linears over tp and around attention over cp, and nothing else, and (5) keeps
its share of the activations; (6) the layout and (7) running twice change nothing; (8) what cannot
be computed is refused. Groups have second ones with other data.
"""

from __future__ import annotations

from hypothesis import assume, given

from verify.case import Case
from verify.runner.examiner import CheckCase
from verify.strategies.cases import STRIDES
from verify.strategies.dropouts import telling
from verify.strategies.transformer import RECOMPUTED, layer_cases, refusable_layer_cases

DROPOUT = (0.25, 0.1, 0.0)


@given(case=layer_cases(packed=(0, 2, 2, 1), strides=STRIDES))
def test_output_and_gradients(check: CheckCase, case: Case) -> None:
    """Law 1. Must catch: rotary positions of a rank's part; a norm's gradient that is summed over
    one axis of two; a norm of heads whose gradient is of this rank's; a residual of what is
    normalised; the second half of a layer fed with the first one's input."""
    check("equivalence", case)


@given(case=layer_cases(plain=True, sequence_parallel=(True,), lenses=("native",)))
def test_latents_of_most_layers(check: CheckCase, case: Case) -> None:
    """Law 1, with sequence parallelism. Must catch: a norm of a latent, or a narrow weight, whose
    gradient is of this rank's tokens; a gradient of the shared key of this rank's heads only;
    positions of the first features of a head."""
    check("equivalence", case)


@given(
    case=telling(
        layer_cases(
            dropout=DROPOUT,
            attention_dropout=(0.0, 0.25),
            recompute=("", *RECOMPUTED),
            packed=(0, 0, 2),
        )
    )
)
def test_dropout(check: CheckCase, case: Case) -> None:
    """Law 2. Must catch: one stream for all ranks where sequence or context parallelism split the
    tokens; a stream of tp where they do not; both dropouts of a layer alike; shares of attention
    that are dropped alike on ranks with other heads or other rows, or not at all over cp."""
    check("equivalence", case)


@given(
    case=layer_cases(
        dropout=DROPOUT, attention_dropout=(0.25, 0.0), recompute=("", *RECOMPUTED), training=False
    )
)
def test_nothing_is_dropped_outside_of_training(check: CheckCase, case: Case) -> None:
    """Law 2. Must catch: either dropout of a layer in an evaluation, also where it is computed
    again."""
    check("equivalence", case)


@given(case=layer_cases(dropout=DROPOUT, attention_dropout=(0.0, 0.25), recompute=RECOMPUTED))
def test_recomputation(check: CheckCase, case: Case) -> None:
    """Law 3. Must catch: other masks in backward than in forward; a stream that goes on from where
    backward left it."""
    check("recomputation", case)


@given(
    case=layer_cases(
        algorithms=("all_gather",),
        min_tp=2,
        min_cp=2,
        sequence_parallel=(True,),
        lenses=("fp64",),
    )
)
def test_the_published_diagram(check: CheckCase, case: Case) -> None:
    """Law 4, with an all-gather of K and V and sequence parallelism. Must catch: any collective
    beside the four pairs around the linears and that around attention."""
    check("communication", case)


@given(case=layer_cases(recompute=("", *RECOMPUTED), lenses=("fp64",)))
def test_communication_and_memory(check: CheckCase, case: Case) -> None:
    """Law 4, and law 5 of full recomputation. Must catch: a layer that gathers what it has; an
    activation that is kept although it is computed again."""
    check("communication", case)
    if str(case.options.get("recompute", "")).startswith("full"):
        check("memory", case)


@given(
    case=layer_cases(
        recompute=("", "selective"),
        qk_norm=(False,),
        rotary=(False, False, True),
        latent=(False,),
        lenses=("fp64",),
    )
)
def test_what_is_kept(check: CheckCase, case: Case) -> None:
    """Law 5. Must catch: an activation kept twice, or whole under sequence parallelism; a fused
    projection that is kept beside the queries, keys and values that were cut from it."""
    assume(case.shape["groups"] >= case.layout.tp)
    check("memory", case)


@given(case=layer_cases())
def test_the_layout_does_not_matter(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: another formula for one rank."""
    check("invariance", case)


@given(
    case=layer_cases(dropout=DROPOUT, attention_dropout=(0.0, 0.25), recompute=("", *RECOMPUTED))
)
def test_the_same_bits_again(check: CheckCase, case: Case) -> None:
    """Law 7. Must catch: a receive that is read before it is done; a generator left by an earlier
    run."""
    check("determinism", case)


@given(case=refusable_layer_cases())
def test_what_cannot_be_computed_is_refused(check: CheckCase, case: Case) -> None:
    """Law 8. Must catch: heads or features that do not divide, left over."""
    check("refusal", case)
