"""Pipeline schedules as tables: what every stage does, in its order.

Laws, in full in `verify.schedules.laws`: (1) every forward and backward once; (2) everything after
what it needs, each tensor sent once and received before it is used; (3) no stage waits for ever,
even where a send is done only when it is received; (4) the bubble and (5) the activations kept at
the peak are the published ones of GPipe, 1F1B, interleaved 1F1B and ZB-H1.
"""

from __future__ import annotations

from hypothesis import given

from verify.case import Case
from verify.runner.examiner import CheckCase
from verify.strategies.pipeline import schedule_cases


@given(case=schedule_cases())
def test_every_table_is_well_formed(check: CheckCase, case: Case) -> None:
    """Laws 1 to 5. Must catch: a warm-up too long or too short; chunks in the wrong order; a weight
    gradient put off too little or too much; a transfer to the wrong stage, or where it locks."""
    check("schedule", case)
