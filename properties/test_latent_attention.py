"""Multi-latent attention split over tp by heads (arXiv:2405.04434).

Laws: (1) output and all gradients are those of one device, with a latent of the queries and
without; the gradients of the narrow weights, which every rank has, are complete; (2) copies on
several ranks are equal; (3) ranks drop different shares; (4) what is summed or gathered is narrow;
(5) memory order, (6) the layout and (7) running twice change nothing; (8) what cannot be computed
is refused. Sequence parallelism is on or off; what most implementations have is asked for alone:
keys that share the part with positions, which turns in pairs of neighbours.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.runner.examiner import CheckCase
from verify.strategies.attention import CERTAIN, attention_cases, refusable_attention_cases
from verify.strategies.cases import STRIDES, Choices

CONCEPT = "latent_attention"
PLAIN: Choices = {
    **CERTAIN,
    "norm": ("none",),
    "rotary": (False,),
    "padding": (False,),
    "alibi": (False,),
    "sink": (False,),
    "layer_number": (None,),
}
ANY: Choices = {"strides": STRIDES[:1]}
TURNED: Choices = {**PLAIN, "rotary": (True,), "interleaved": (True,), "scale": (None,)}
NORMALISED: Choices = {**TURNED, "norm": ("rms", "layer")}


@given(case=attention_cases(CONCEPT, options=PLAIN))
def test_output_and_gradients(check: CheckCase, case: Case) -> None:
    """Laws 1 and 2. Must catch: a gradient of the shared key of this rank's heads only; narrow
    weights with the gradient of this rank's tokens under sequence parallelism, or summed where it
    is complete; the split of latent and shared key, or of a head's key and value, elsewhere; a
    scale of a part of the key."""
    check("equivalence", case)


@given(case=attention_cases(CONCEPT, options=TURNED))
def test_positions_of_most_models(check: CheckCase, case: Case) -> None:
    """Laws 1 and 2. Must catch: a gradient of the shared key of this rank's heads only; positions
    in the part of a head that has none, or in one of query and key only."""
    check("equivalence", case)


@given(case=attention_cases(CONCEPT, min_tp=2, sequence_parallel=(True,), options=NORMALISED))
def test_split_sequences_of_most_models(check: CheckCase, case: Case) -> None:
    """Laws 1 and 2. Must catch: a norm of a latent, or a narrow weight, whose gradient is of this
    rank's tokens; latents of one rank's tokens for those of all; a shared key that is cut."""
    check("equivalence", case)


@given(case=attention_cases(CONCEPT, options={}))
def test_every_way_of_scoring(check: CheckCase, case: Case) -> None:
    """Laws 1, 3 and 5. Must catch: arguments that do not reach the core; ranks that drop alike in
    different heads; memory in the order of storage; a norm of a latent whose gradient is of this
    rank's tokens; positions in the part of a head that has none."""
    check("equivalence", case)


@given(case=attention_cases(CONCEPT, options=ANY))
def test_what_is_communicated(check: CheckCase, case: Case) -> None:
    """Law 4. Must catch: a gather of x, or of all heads' keys and values, in place of latents."""
    check("communication", case)


@given(case=attention_cases(CONCEPT))
def test_the_layout_does_not_matter(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: a path of its own for one rank."""
    check("invariance", case)


@given(case=attention_cases(CONCEPT, options=ANY))
def test_the_same_bits_again(check: CheckCase, case: Case) -> None:
    """Law 7. Must catch: a latent that is read before it is gathered; a mask from a stream that
    goes on from run to run."""
    check("determinism", case)


@given(case=refusable_attention_cases(CONCEPT))
def test_what_cannot_be_computed(check: CheckCase, case: Case) -> None:
    """Law 8. Must catch: a rank with the heads that remain, or with fewer; an option that is
    quietly left out."""
    check("refusal", case)
