"""What cannot be computed is refused: by an error, on every rank, that names the size or option.

Laws: (1) a size that does not divide by tp is refused, also where some ranks would have enough; (2)
options that do not go together are refused; (3) a value out of range is refused; (4) all ranks
refuse, none waits for another; (5) an input of another width than the weight's is not computed. A
case is valid but for one thing. Never is a wrong size or option computed silently.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.runner.examiner import CheckCase
from verify.strategies.cases import STRIDES, Choices, cases, refusable_cases
from verify.strategies.misfits import misfit_cases

CONTIGUOUS: Choices = {"strides": STRIDES[:1]}
_EXCHANGES = ("all_to_all_sp_to_hp", "all_to_all_hp_to_sp")
_SPLITS = ("scatter_to_tp", "scatter_to_sp", "reduce_scatter_to_sp", "reduce_scatter_last_dim")


@given(case=refusable_cases(*_SPLITS))
def test_a_split_that_does_not_divide(check: CheckCase, case: Case) -> None:
    """Laws 1 and 4, of the mappings. Must catch: a division that rounds down and drops the rest."""
    check("refusal", case)


@given(case=refusable_cases(*_EXCHANGES))
def test_an_exchange_that_does_not_divide(check: CheckCase, case: Case) -> None:
    """Laws 1 and 4, of all-to-all. Must catch: a rest that makes one chunk more than there are
    ranks, and mixes them."""
    check("refusal", case)


@given(case=refusable_cases("column_linear", "row_linear", faults="size"))
def test_a_linear_layer_that_does_not_divide(check: CheckCase, case: Case) -> None:
    """Laws 1 and 4: features, or a sequence to scatter. Must catch: a layer narrower than asked
    for; a reduce-scatter of a sequence with a rest."""
    check("refusal", case)


@given(case=refusable_cases("vocab_embedding", "tp_mlp", faults="size"))
def test_a_module_that_does_not_divide(check: CheckCase, case: Case) -> None:
    """Laws 1 and 4: a vocabulary, a sequence to scatter, a hidden layer. Must catch: a vocabulary
    that loses its last rows."""
    check("refusal", case)


@given(case=refusable_cases("column_linear", "row_linear", "vocab_embedding", faults="option"))
def test_options_that_do_not_go_together(check: CheckCase, case: Case) -> None:
    """Laws 2 and 4: gather_output, or an input that is not parallel, with sequence parallelism;
    scatter without it. Must catch: an option that is accepted and ignored, or refused without
    saying which."""
    check("refusal", case)


@given(case=refusable_cases("vocab_cross_entropy"))
def test_a_smoothing_out_of_range(check: CheckCase, case: Case) -> None:
    """Laws 3 and 4: one, above one, below zero, or of a single class. Must catch: a smoothing that
    is quietly left out."""
    check("refusal", case)


@given(case=misfit_cases(cases("column_linear", "row_linear", "tp_mlp", options=CONTIGUOUS)))
def test_features_that_do_not_fit(check: CheckCase, case: Case) -> None:
    """Law 5. Must catch: a product with a part of the weight."""
    check("misfit", case)
