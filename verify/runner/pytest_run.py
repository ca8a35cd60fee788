"""Sets up a run of properties under pytest: options, Hypothesis' settings, and the two plugins, the
examiner where properties run and the collector where the report is written.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import fields
from functools import partial

import pytest
import torch

from verify.errors import BadArgument, HarnessError
from verify.known import KnownFindings
from verify.pytest_plugin import NAME, PACKAGE
from verify.reference import one_thread
from verify.runner import check_fixture
from verify.runner.check_fixture import EXAMINER
from verify.runner.collector import Collector
from verify.runner.draws import use_profile
from verify.runner.examiner import Examiner
from verify.runner.limits import Limits, limits, set_limits
from verify.runner.options import DEFAULT_WORLD_SIZE, PROFILES, RunOptions
from verify.runner.suites import suite_names, suites
from verify.targets import load_target

COLLECTOR = f"{NAME}-collector"


def set_up(config: pytest.Config) -> None:
    """Register the plugins of a run. Raises pytest.UsageError, in one line, for a wrong option.

    With the torchrun cluster only rank 0 returns; the other ranks serve it until it ends.
    """
    worker = hasattr(config, "workerinput")
    given = {
        field.name: getattr(config.option, f"{NAME}_{field.name}") for field in fields(RunOptions)
    }
    if worker:
        given["seed"] = config.workerinput["shardproof_seed"]  # type: ignore[attr-defined]
    try:
        options = RunOptions.parse(given)
        names_package = PACKAGE in config.invocation_params.args
        check_names(options, names_package=names_package)
        check_device(options)
        known = known_findings(options, names_package=names_package)
        world_size = _world_size(options, config)
    except (BadArgument, HarnessError) as error:
        raise pytest.UsageError(str(error)) from None
    given_limits = Limits(
        world_size, options.lenses, options.cluster == "sim" and options.adversary
    )
    config.add_cleanup(partial(set_limits, limits()))
    set_limits(given_limits)
    config.add_cleanup(use_profile(options))
    threads = ExitStack()
    threads.enter_context(one_thread())
    config.add_cleanup(threads.close)
    if not _is_controller(config):
        config.pluginmanager.register(Examiner(options, given_limits, known, config), EXAMINER)
        config.pluginmanager.register(check_fixture)
    if not worker:
        config.pluginmanager.register(Collector(options, world_size, known, config), COLLECTOR)


def _is_controller(config: pytest.Config) -> bool:
    """Whether xdist's workers run the properties."""
    return bool(getattr(config.option, "tx", None)) and not hasattr(config, "workerinput")


def check_names(options: RunOptions, *, names_package: bool) -> None:
    """Raise BadArgument for a suite that there is not, where the run is of the package."""
    known = suite_names() if names_package else []
    for name in options.suites:
        if names_package and name not in known:
            raise BadArgument(f"--suite: {name!r} is not one of {', '.join(known)}")


def check_device(options: RunOptions) -> None:
    """Raise BadArgument for GPUs that this machine lacks; in torchrun's world, ranks tell of theirs
    when they join."""
    if options.device != "cuda" or options.cluster == "torchrun":
        return
    needed = 1 if options.cluster == "sim" else options.max_world_size or DEFAULT_WORLD_SIZE
    if (present := torch.cuda.device_count()) < needed:
        fewer = f", or --max-world-size {present}" if present else ""
        raise BadArgument(
            f"--device: cuda needs a GPU{' a rank' * (needed > 1)}, {needed} in all; torch sees"
            f" {present} here; take cpu{fewer}"
        )


def known_findings(options: RunOptions, *, names_package: bool) -> KnownFindings:
    """The findings of `--known`, which are of this target and version, and of properties that there
    are where the run is of the package. Raises BadArgument, also for a target that is none."""
    target = load_target(options.target)
    if options.known is None:
        return KnownFindings()
    found = KnownFindings.read(options.known, target=options.target, version=target.version())
    if names_package:
        names = [f"{suite.name}.{name}" for suite in suites() for name in suite.properties]
        found.check_properties(options.known, names)
    return found


def _world_size(options: RunOptions, config: pytest.Config) -> int:
    """The largest world of the run; takes part in torchrun's world where that is the cluster."""
    if options.cluster == "sim":
        return options.max_world_size or PROFILES[options.profile].world_size
    if options.cluster != "torchrun":
        return options.max_world_size or DEFAULT_WORLD_SIZE
    if getattr(config.option, "numprocesses", None) or getattr(config.option, "tx", None):
        raise BadArgument("-n: the torchrun cluster is one world; leave -n out")
    from verify.cluster.place import Place
    from verify.cluster.torchrun import join

    started = Place.from_environment().world_size
    if options.max_world_size is not None and options.max_world_size > started:
        raise BadArgument(
            f"--max-world-size: {options.max_world_size} is more than the {started} ranks started"
        )
    join()
    return options.max_world_size or started
