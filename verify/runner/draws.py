"""Hypothesis' settings of a run: how many examples, from which seed, and nothing else that could
make two runs draw differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import hypothesis.core
from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.internal.conjecture import providers
from hypothesis.internal.conjecture.engine import ConjectureRunner

from verify.runner.options import RunOptions

# Running a case takes as long as it takes: that is no sign of an unhealthy strategy.
_SUPPRESSED = (HealthCheck.too_slow, HealthCheck.data_too_large)
# What is kept of other runs must not change what this one draws: it is run on demand only.
_AGAIN = (Phase.reuse,)
_PHASES = (Phase.explicit, Phase.generate, Phase.target, Phase.shrink)


class Examples(int):
    """So many examples. Hypothesis begins with small ones, a tenth of all, which it finds by this
    division: the same few cases over and over. Here it draws none."""

    def __floordiv__(self, other: int) -> int:
        return 0


def name_examples(test: Any, name: str) -> None:
    """Have the database keep a property's failing examples by its name. Hypothesis keeps none where
    a seed is forced, and elsewhere by the path of the file, which another machine may not have."""
    test._hypothesis_internal_database_key = name.encode()


@contextmanager
def seeded(name: str, *, seed: int | None = None) -> Iterator[None]:
    """While inside, the property `name` draws from a seed of its own, made of `seed` or of that of
    the run. Properties that draw from the same strategies would draw alike from the same seed."""
    before = hypothesis.core.global_force_seed
    made = sha256(f"{name} {before if seed is None else seed}".encode()).digest()
    hypothesis.core.global_force_seed = int.from_bytes(made[:8])  # type: ignore[assignment]
    try:
        yield
    finally:
        hypothesis.core.global_force_seed = before


@contextmanager
def limited(test: Any, *, examples: int) -> Iterator[None]:
    """While inside, `test` draws so many examples."""
    before = test._hypothesis_internal_use_settings
    test._hypothesis_internal_use_settings = settings(before, max_examples=Examples(examples))
    try:
        yield
    finally:
        test._hypothesis_internal_use_settings = before


def _no_mutations(runner: object, data: object) -> None:
    """In the place of Hypothesis' mutations."""


def _database(folder: Path) -> DirectoryBasedExampleDatabase:
    folder.mkdir(parents=True, exist_ok=True)
    return DirectoryBasedExampleDatabase(folder)


def use_profile(options: RunOptions) -> Callable[[], None]:
    """Draw as `options` say in every property that is imported from now on; how to undo that.

    Hypothesis also draws constants that it finds in the modules that happen to be imported, which
    depend on the cluster, the target and where the package is installed. Here it draws none. Nor
    does it begin with small examples, or follow one by five that repeat most of it: each reaches
    for new pairs.
    """
    before = settings.get_current_profile_name()
    seed, constants = hypothesis.core.global_force_seed, providers._get_local_constants
    mutations = ConjectureRunner.generate_mutations_from
    name = f"shardproof-{options.profile}"
    settings.register_profile(
        name,
        settings(
            max_examples=Examples(options.max_examples),
            deadline=None,
            database=None if options.database is None else _database(options.database),
            derandomize=False,
            print_blob=False,
            phases=_AGAIN if options.again else _PHASES,
            suppress_health_check=_SUPPRESSED,
        ),
    )
    settings.load_profile(name)
    hypothesis.core.global_force_seed = options.seed  # type: ignore[assignment]
    providers._get_local_constants = providers.Constants
    ConjectureRunner.generate_mutations_from = _no_mutations  # type: ignore[assignment,method-assign]

    def undo() -> None:
        settings.load_profile(before)
        hypothesis.core.global_force_seed = seed
        providers._get_local_constants = constants
        ConjectureRunner.generate_mutations_from = mutations  # type: ignore[method-assign]

    return undo
