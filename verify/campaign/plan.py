"""What a campaign is: a run's options, its suites, a range of seeds, and the units they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from verify.errors import BadArgument
from verify.runner.options import RunOptions

DEFAULT_REPORT = "shardproof-campaign"


@dataclass(frozen=True)
class Unit:
    """What one worker does at a time: one suite with one seed; `again`, only the failing examples
    that the campaign has of the suite."""

    suite: str
    seed: int
    again: bool = False

    @property
    def name(self) -> str:
        """The unit as the name of a file."""
        return f"{self.suite}-{'again' if self.again else self.seed}"

    def __str__(self) -> str:
        return f"{self.suite} {'once more' if self.again else f'seed {self.seed}'}"

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON types, whose fields are `Unit`'s."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A campaign: `run` are the options of every unit but suite, seed and report; seeds are those
    from `first` up to, and without, `end`."""

    run: RunOptions
    suites: tuple[str, ...]
    first: int
    end: int

    def units(self) -> list[Unit]:
        """Every unit, seed by seed, so that all suites have been tried soon."""
        return [Unit(suite, seed) for seed in range(self.first, self.end) for suite in self.suites]

    def options(self, unit: Unit) -> RunOptions:
        """The options of a unit's run; report and database are set where it runs."""
        return replace(self.run, suites=(unit.suite,), seed=unit.seed)

    def identity(self) -> list[str]:
        """What two invocations of one campaign have in common: all but the seeds and the place."""
        given = replace(self.run, suites=self.suites, seed=0, report=Path(DEFAULT_REPORT))
        return given.arguments()


def parse_seeds(text: str) -> tuple[int, int]:
    """`0:100` or `100`, which is the same, as (0, 100). Raises BadArgument."""
    first, _, end = text.rpartition(":")
    try:
        found = int(first or 0), int(end)
    except ValueError:
        found = (0, 0)
    if not 0 <= found[0] < found[1]:
        raise BadArgument(
            f"--seeds: {text!r} is no range of seeds like 0:100, which is 0 to 99, or 100"
        )
    return found


def parse(given: Mapping[str, Any], seeds: str, known_suites: list[str]) -> Plan:
    """A plan from options as text. Raises BadArgument."""
    run = RunOptions.parse({**given, "report": given.get("report") or DEFAULT_REPORT})
    if run.cluster == "torchrun":
        raise BadArgument("--cluster: a campaign starts its own processes; take sim or process")
    first, end = parse_seeds(seeds)
    return Plan(run=run, suites=run.suites or tuple(known_suites), first=first, end=end)
