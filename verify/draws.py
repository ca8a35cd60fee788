"""Hypothesis' settings of a run: how many examples, from which seed, and nothing else that could
make two runs draw differently.
"""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.core
from hypothesis import HealthCheck, Phase, settings
from hypothesis.internal.conjecture import providers

from verify.options import RunOptions

# Running a case takes as long as it takes: that is no sign of an unhealthy strategy.
_SUPPRESSED = (HealthCheck.too_slow, HealthCheck.data_too_large)
_PHASES = (Phase.explicit, Phase.generate, Phase.target, Phase.shrink)


def use_profile(options: RunOptions) -> Callable[[], None]:
    """Draw as `options` say in every property that is imported from now on; how to undo that.

    Hypothesis also draws constants that it finds in the modules that happen to be imported, which
    depend on the cluster, the target and where the package is installed. Here it draws none.
    """
    before = settings.get_current_profile_name()
    seed, constants = hypothesis.core.global_force_seed, providers._get_local_constants
    name = f"shardproof-{options.profile}"
    settings.register_profile(
        name,
        settings(
            max_examples=options.max_examples,
            deadline=None,
            database=None,
            derandomize=False,
            print_blob=False,
            phases=_PHASES,
            suppress_health_check=_SUPPRESSED,
        ),
    )
    settings.load_profile(name)
    hypothesis.core.global_force_seed = options.seed  # type: ignore[assignment]
    providers._get_local_constants = providers.Constants

    def undo() -> None:
        settings.load_profile(before)
        hypothesis.core.global_force_seed = seed
        providers._get_local_constants = constants

    return undo
