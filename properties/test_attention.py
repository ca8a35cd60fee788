"""Attention of heads that are split over tp, and the self-attention block (arXiv:1909.08053).

Laws: (1) output and all gradients are those of one device, for every mask, grouping of heads and
way of scoring; (2) copies on several ranks are equal; (3) a query that may attend to nothing gives
zeros, and scores of any size give numbers; (4) ranks drop different shares, and under the union of
their masks law 1 holds, and outside of training without any; (5) a block communicates what its two
linear layers do, and attention nothing; (6) a block keeps for backward what is published; (7)
memory order, (8) the layout and (9) running twice change nothing; (10) heads, groups and options
that cannot be computed are refused; (11) inputs of which one does not fit the others are not
computed. Sequence parallelism is on or off.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.runner.examiner import CheckCase
from verify.strategies.attention import CERTAIN, attention_cases, refusable_attention_cases
from verify.strategies.cases import STRIDES, Choices
from verify.strategies.dropouts import telling
from verify.strategies.misfits import misfit_cases

BOTH = ("core_attention", "self_attention")
PLAIN: Choices = {
    **CERTAIN,
    "norm": ("none",),
    "rotary": (False,),
    "padding": (False,),
    "alibi": (False,),
    "sink": (False,),
    "layer_number": (None,),
    "scale": (None,),
}
LARGE: Choices = {**CERTAIN, "magnitude": (16, 256)}
DROPPED: Choices = {**CERTAIN, "dropout": (0.1, 0.5)}
SCORED: Choices = {"dropout": (0.0,)}
ANY: Choices = {"strides": STRIDES[:1]}
SUNK: Choices = {**CERTAIN, **ANY, "sink": (True,)}
LONGER = ("longer",)
PROMISED: Choices = {**ANY, "norm": ("none",), "rotary": (False,)}


@given(case=attention_cases("core_attention", options=SCORED))
def test_attention_of_heads(check: CheckCase, case: Case) -> None:
    """Laws 1 to 3 and 7. Must catch: slopes, sinks or scales of another rank's heads; a key of the
    wrong group; a mask that is shifted, or of the other triangle; a softmax in low precision; NaN
    of a row that is masked as a whole; a scaling by the layer that is not undone."""
    check("equivalence", case)


@given(case=attention_cases("self_attention", options=PLAIN))
def test_the_block(check: CheckCase, case: Case) -> None:
    """Laws 1 and 2. Must catch: packed rows that are read as all queries, all keys, all values;
    fewer groups than ranks with the neighbour's key, another's queries, or a gradient of the key
    that is not summed over the ranks that share it."""
    check("equivalence", case)


@given(case=attention_cases("self_attention", options=SCORED))
def test_the_block_with_every_way_of_scoring(check: CheckCase, case: Case) -> None:
    """Laws 1 to 3 and 7. Must catch: per-head constants of the wrong ranks; padding that is not
    handed on, or is of this rank's tokens; groups told apart by the order of storage; a norm of
    queries or keys whose gradient is of this rank's heads; positions of this rank's tokens."""
    check("equivalence", case)


@given(case=attention_cases("core_attention", lenses=("fp64",), options=LARGE))
def test_scores_of_any_size(check: CheckCase, case: Case) -> None:
    """Law 3. Must catch: exponentials that overflow; a sink that is left out of the maximum."""
    check("equivalence", case)


@given(case=telling(attention_cases(*BOTH, options=DROPPED)))
def test_dropout_of_shares(check: CheckCase, case: Case) -> None:
    """Law 4. Must catch: ranks that draw from one stream, and so drop alike in different heads; a
    dropout before the softmax, or of the output; no scaling by the rate."""
    check("equivalence", case)


@given(case=attention_cases(*BOTH, options=DROPPED, training=False))
def test_nothing_is_dropped_outside_of_training(check: CheckCase, case: Case) -> None:
    """Law 4. Must catch: a rate that is the module's in an evaluation too; a scaling that stays."""
    check("equivalence", case)


@given(case=attention_cases(*BOTH, options=ANY))
def test_what_is_communicated(check: CheckCase, case: Case) -> None:
    """Law 5. Must catch: an all-gather where groups are not shared; a sum that is done twice, or of
    the whole sequence under sequence parallelism."""
    check("communication", case)


@given(case=attention_cases("self_attention", options=PROMISED))
def test_what_is_kept(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: an input that is kept whole under sequence parallelism; keys repeated for
    every head; a mask or a packed projection that is kept besides."""
    check("memory", case)


@given(case=attention_cases(*BOTH))
def test_the_layout_does_not_matter(check: CheckCase, case: Case) -> None:
    """Law 8. Must catch: a path of its own for one rank, or for a group a rank."""
    check("invariance", case)


@given(case=attention_cases("self_attention", options=ANY))
def test_the_same_bits_again(check: CheckCase, case: Case) -> None:
    """Law 9. Must catch: a gather that is read before it is done; a mask from a stream that goes on
    from run to run."""
    check("determinism", case)


@given(case=refusable_attention_cases(*BOTH))
def test_what_cannot_be_computed(check: CheckCase, case: Case) -> None:
    """Law 10. Must catch: a rank with the heads that remain, or that begins in the middle of a
    group; groups of unequal size; a packed weight that loses its last rows; a window, a layer
    number or a dropout that is quietly left out."""
    check("refusal", case)


@given(case=misfit_cases(attention_cases(*BOTH, options={**CERTAIN, **ANY})))
def test_inputs_that_do_not_fit(check: CheckCase, case: Case) -> None:
    """Law 11. Must catch: keys of one batch or token that are broadcast to the values of several;
    heads that groups do not divide; a slope or a sink for all heads; marks of other tokens."""
    check("misfit", case)


@given(
    case=misfit_cases(attention_cases("core_attention", options=SUNK), how=LONGER, tensors=("q",))
)
def test_heads_that_have_no_sink(check: CheckCase, case: Case) -> None:
    """Law 11. Must catch: the sink of one head, or its slope, for all that are given."""
    check("misfit", case)
