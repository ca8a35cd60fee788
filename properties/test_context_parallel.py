"""Attention over a sequence that is split over cp: all-gather, ring, Ulysses, and two levels.

Laws: (1) the output and the gradients of q, k, v and sinks are those of attention of the whole
sequence on one device, whichever algorithm, placement and mask, with key padding that is marked on
the ranks that hold it, ALiBi, sinks and scaling by the layer; (2) so they are for packed sequences,
of which none sees another or its padding; (3) what is cut is every token once, at its own position;
(4) under zigzag placement all ranks compute equally many blocks, and whatever the placement none
that the mask forbids in full; (5) a rank communicates and (6) keeps what the published formulas
say, and marks of padding once; (7) large scores overflow nowhere; (8) the layout and (9) running
twice change nothing; (10) what cannot be computed is refused; (11) a layer of attention under tp,
sequence parallelism and cp together has the gradients of one device, and only the collectives of
its parts; (12) with dropout of shares the output and the gradients are those under the union of the
masks, which differ on all ranks, and backward moves no random stream; (13) inputs of which one does
not fit the others are not computed, (14) nor are packed sequences whose lengths do not add up;
(15) the tokens further on that multi-token prediction asks for are those of the whole sequence, on
whichever rank they lie, and never those of another.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.misfit import HOW
from verify.runner.examiner import CheckCase
from verify.strategies.cases import STRIDES
from verify.strategies.context import attention_cases, block_cases, split_cases
from verify.strategies.context_refusals import refusable_cases
from verify.strategies.dropouts import telling
from verify.strategies.misfits import misfit_cases

PACKED = (1, 2, 3)
LENGTHS = ("cu_seqlens", "cu_seqlens_padded")


@given(case=attention_cases(algorithms=("all_gather",), strides=STRIDES))
def test_all_gather(check: CheckCase, case: Case) -> None:
    """Law 1. Must catch: a gradient of K or V that is not summed over cp, or scattered to another
    rank; chunks taken in the wrong order; a gathered K of another dtype, or read too early; marks
    of padding in the order of the sequence; distances of places in memory."""
    check("equivalence", case)


@given(case=attention_cases(algorithms=("ring",), strides=STRIDES))
def test_ring(check: CheckCase, case: Case) -> None:
    """Law 1. Must catch: peers by group rank; a step's predicate the wrong way round; backward with
    the K and V of step 0; gradients that stop one rank short of home; a block weighted by its
    own total; receives read before they are done, sends that wait for each other; a sink that
    counts once for every block, or not at all."""
    check("equivalence", case)


@given(case=attention_cases(algorithms=("ulysses",), strides=STRIDES))
def test_ulysses(check: CheckCase, case: Case) -> None:
    """Law 1. Must catch: an exchange that leaves ranks and heads in the wrong order, at batches of
    one or two; heads with another's kv head; repeated kv heads whose gradients are not added;
    sinks or slopes of the first heads on every rank."""
    check("equivalence", case)


@given(case=attention_cases(algorithms=("hierarchical",), strides=STRIDES))
def test_hierarchical(check: CheckCase, case: Case) -> None:
    """Law 1. Must catch: levels exchanged, or made from the first ranks of the world; the chunks of
    inner ranks in another order than the exchange leaves them."""
    check("equivalence", case)


@given(case=attention_cases(packed=PACKED))
def test_packed_sequences(check: CheckCase, case: Case) -> None:
    """Law 2. Must catch: attention across sequences; to padding, or of it; one cut through all
    sequences together; lengths without padding where those with it belong."""
    check("equivalence", case)


@given(case=telling(attention_cases(packed=(0, 0, 1, 2), dropout=0.25, strides=STRIDES)))
def test_dropout_of_shares(check: CheckCase, case: Case) -> None:
    """Law 12. Must catch: shares that backward drops anew, or not at all; a row's total of what is
    kept of it; a mask by where chunks lie in memory, or the same for every step of the ring."""
    check("equivalence", case)


@given(case=split_cases("context_split"))
def test_every_token_has_one_place(check: CheckCase, case: Case) -> None:
    """Law 3. Must catch: contiguous chunks for zigzag ones; positions of a rank's places instead of
    the sequence's, or running on through packed sequences; a whole sequence on every rank."""
    check("equivalence", case)


@given(case=attention_cases(packed=(0, 0, *PACKED), blocks=True, lenses=("fp64",)))
def test_the_load_is_balanced(check: CheckCase, case: Case) -> None:
    """Law 4. Must catch: blocks that are computed and masked, or skipped although one pair counts;
    a window that skips nothing; a predicate that is off by one chunk."""
    check("equivalence", case)


@given(case=attention_cases(packed=(0, 1, 2), min_cp=2, lenses=("fp64",)))
def test_communication(check: CheckCase, case: Case) -> None:
    """Law 5. Must catch: K and V that are gathered with all heads, or sent once too often;
    gradients all-reduced instead of scattered."""
    check("communication", case)


@given(case=attention_cases(packed=(0, 1, 2), lenses=("fp64",)))
def test_memory(check: CheckCase, case: Case) -> None:
    """Law 6. Must catch: the gathered K and V kept for backward; those of every step of the ring;
    the weights of a block."""
    check("memory", case)


@given(case=attention_cases(lenses=("fp64",), magnitude=1024, zeros="grad out"))
def test_large_scores(check: CheckCase, case: Case) -> None:
    """Law 7, of the output; no gradients, which vanish. Must catch: exponentials of scores as they
    are; a merge of blocks by sums of exponentials."""
    check("equivalence", case)


@given(case=attention_cases(packed=(0, 1, 2)) | split_cases("tokens_ahead", padded=False))
def test_the_layout_does_not_matter(check: CheckCase, case: Case) -> None:
    """Law 8. Must catch: a path of its own for one rank that computes something else."""
    check("invariance", case)


@given(
    case=attention_cases(packed=(0, 1, 2), lenses=("fp64", "native"))
    | split_cases("tokens_ahead", padded=False)
)
def test_the_same_bits_again(check: CheckCase, case: Case) -> None:
    """Law 9. Must catch: a block that is read before it has arrived; gradients added to what an
    earlier run left."""
    check("determinism", case)


@given(case=refusable_cases("tokens"))
def test_tokens_that_do_not_divide_are_refused(check: CheckCase, case: Case) -> None:
    """Law 10. Must catch: a division of the sequence, or of a packed one, that rounds down."""
    check("refusal", case)


@given(case=refusable_cases("heads"))
def test_heads_that_do_not_divide_are_refused(check: CheckCase, case: Case) -> None:
    """Law 10. Must catch: heads that are dropped or given twice; levels that are made up."""
    check("refusal", case)


@given(case=refusable_cases("options"))
def test_options_that_mean_nothing_are_refused(check: CheckCase, case: Case) -> None:
    """Law 10. Must catch: a window that is accepted and ignored; a name taken for the default."""
    check("refusal", case)


@given(case=block_cases())
def test_layer(check: CheckCase, case: Case) -> None:
    """Law 11. Must catch: gradients of parameters left to this rank's chunks, or summed over the
    wrong group; a sequence cut by tp before cp."""
    check("equivalence", case)


@given(case=block_cases(lenses=("fp64",)))
def test_communication_of_a_layer(check: CheckCase, case: Case) -> None:
    """Law 11. Must catch: a collective beside those around attention and around each pair of
    linears; one over the wrong group."""
    check("communication", case)
    check("memory", case)


@given(case=misfit_cases(attention_cases(packed=(0, 0, 1, 2))))
def test_inputs_that_do_not_fit(check: CheckCase, case: Case) -> None:
    """Law 13. Must catch: keys of one batch or token that are broadcast to the values of several;
    heads that kv heads do not divide; a slope or a sink for all heads; marks of other tokens."""
    check("misfit", case)


@given(
    case=misfit_cases(
        attention_cases(packed=PACKED)
        | split_cases("context_split", "tokens_ahead", packed=PACKED),
        how=HOW,
        tensors=LENGTHS,
    )
)
def test_lengths_that_do_not_add_up(check: CheckCase, case: Case) -> None:
    """Law 14. Must catch: a sequence whose padding is another's; more tokens than places; places
    that belong to no sequence."""
    check("misfit", case)


@given(case=split_cases("tokens_ahead", padded=False))
def test_tokens_ahead(check: CheckCase, case: Case) -> None:
    """Law 15. Must catch: what is at the other end of a chunk, or on the neighbour of another; the
    first token of the next packed sequence; a depth that does not begin where the one before is."""
    check("equivalence", case)


@given(case=split_cases("tokens_ahead", packed=PACKED))
def test_tokens_ahead_beside_padding(check: CheckCase, case: Case) -> None:
    """Law 15. Must catch: padding for a token further on; sequences that are taken to begin where
    they would without padding."""
    check("equivalence", case)
