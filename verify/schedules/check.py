"""The check `schedule`: a target's table of a pipeline schedule obeys `verify.schedules.laws`.

The case names the kind in its option `kind`, pp and vpp in its layout, and `microbatches`.
"""

from __future__ import annotations

from typing import Any

from verify.case import Case
from verify.checks.blame import Bench
from verify.cluster.base import Cluster
from verify.errors import BadArgument, Mismatch, NotSupported
from verify.oracle.terms import known_options, one_of, sizes
from verify.schedules.laws import KINDS, Plan, complaints
from verify.schedules.table import Table, table_of
from verify.target import Target

CONCEPT = "pipeline_schedule"
_MOST_DETAILS = 6


def schedule_check(case: Case, *, target_name: str, cluster: Cluster) -> int:
    """The table obeys all laws. Asks the target in this process: a table needs no ranks. One that
    there is no published schedule of may be refused."""
    bench = Bench("schedule", case, target_name, cluster)
    bench.require_support(case)
    plan = plan_of(case)
    try:
        details = complaints(table_from(bench.target, case), plan)
    except BadArgument as error:
        if not plan.possible:
            raise
        details = (str(error),)
    except Mismatch as error:
        details = (str(error),)
    if details:
        raise bench.mismatch("schedule", details=details[:_MOST_DETAILS])
    return plan.pp


def plan_of(case: Case) -> Plan:
    """What the case asks for. Raises BadArgument for other sizes or options than it has."""
    known_options(case, "kind")
    (microbatches,) = sizes(case, "microbatches")
    kind = one_of(case, "kind", KINDS)
    return Plan(kind=kind, pp=case.layout.pp, vpp=case.layout.vpp, microbatches=microbatches)


def table_from(target: Target, case: Case) -> Table:
    """The target's table of a case. Raises NotSupported where it has none to give, Mismatch where
    it fails, and BadArgument where it refuses."""
    give: Any = getattr(target, "schedule", None)
    if give is None:
        raise NotSupported(f"{target.name} does not tell its pipeline schedules")
    plan = plan_of(case)
    try:
        plain = give(plan.kind, case.layout, plan.microbatches)
    except ValueError as error:
        raise BadArgument(f"{target.name} refuses {case}: {error}") from error
    except Exception as error:
        raise Mismatch(f"making the table: {type(error).__name__}: {error}") from error
    return table_of(plain)
