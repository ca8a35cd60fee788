"""The options of a run, as the command and the pytest plugin take them: read, checked, passed on.

Needs no torch, so that a wrong option is told at once.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from verify.case import LENSES, Lens
from verify.cluster import CLUSTERS, DEVICES
from verify.errors import BadArgument

DEFAULT_REPORT = "shardproof-report"
SEED_BITS = 32
DEFAULT_WORLD_SIZE = 16


@dataclass(frozen=True)
class Profile:
    """How much is drawn: examples a property, and whether the seed is a fresh one every time; and
    the largest world of a cluster that runs any, unless the run says which."""

    examples: int
    fresh_seed: bool
    meaning: str
    world_size: int = DEFAULT_WORLD_SIZE


PROFILES: Mapping[str, Profile] = {
    "quick": Profile(20, False, "a look, in seconds; always the same examples"),
    "ci": Profile(100, False, "what a gate runs; always the same examples"),
    "nightly": Profile(1000, False, "ten times that; always the same examples", 64),
    "explore": Profile(100, True, "as many as ci, and others every time"),
}


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of one run. `device` and `max_world_size` None are the cluster's defaults;
    `adversary` says whether a cluster that can have one draws it with the cases. `database` keeps
    failing examples, and with `again` only those that it has are run. `require_pairs` fails a run
    that misses a pair of values which it could have had, and has properties draw on for them."""

    target: str = "impl"
    suites: tuple[str, ...] = ()
    profile: str = "quick"
    max_examples: int = PROFILES["quick"].examples
    seed: int = 0
    cluster: str = "sim"
    device: str | None = None
    max_world_size: int | None = None
    lenses: tuple[Lens, ...] = LENSES
    report: Path = Path(DEFAULT_REPORT)
    known: Path | None = None
    known_strict: bool = False
    adversary: bool = True
    database: Path | None = None
    again: bool = False
    require_pairs: bool = False

    @staticmethod
    def parse(given: Mapping[str, Any]) -> RunOptions:
        """Options from text or numbers, by the names of the fields; None or absent is the default.

        Without a seed, it is 0, or a fresh one with the profile `explore`. Raises BadArgument.
        """
        known = {name: value for name, value in given.items() if value is not None}
        profile = _one_of("--profile", known.get("profile", "quick"), PROFILES)
        fresh = secrets.randbits(SEED_BITS) if PROFILES[profile].fresh_seed else 0
        report = Path(known.get("report", DEFAULT_REPORT))
        if report.exists() and not report.is_dir():
            raise BadArgument(f"--report: {report} is a file; name a directory")
        world, listed = known.get("max_world_size"), known.get("known")
        if known.get("known_strict") and listed is None:
            raise BadArgument("--known-strict: there is nothing to be strict about without --known")
        database = known.get("database")
        if known.get("again") and database is None:
            raise BadArgument("--again: there are no examples to run again without --database")
        return RunOptions(
            target=str(known.get("target", "impl")),
            suites=_names("--suite", known.get("suites", "")),
            profile=profile,
            max_examples=whole_number(
                "--max-examples", known.get("max_examples", PROFILES[profile].examples), least=1
            ),
            seed=whole_number("--seed", known.get("seed", fresh), least=0),
            cluster=_one_of("--cluster", known.get("cluster", "sim"), CLUSTERS),
            device=None
            if known.get("device") is None
            else _one_of("--device", known["device"], DEVICES),
            max_world_size=None
            if world is None
            else whole_number("--max-world-size", world, least=1),
            lenses=_lenses(known.get("lenses", ",".join(LENSES))),
            report=report,
            known=None if listed is None else Path(listed),
            known_strict=bool(known.get("known_strict", False)),
            adversary=bool(known.get("adversary", True)),
            database=None if database is None else Path(database),
            again=bool(known.get("again", False)),
            require_pairs=bool(known.get("require_pairs", False)),
        )

    def arguments(self) -> list[str]:
        """The options as `shardproof run` and pytest with the plugin take them."""
        given = ["--target", self.target, "--profile", self.profile]
        given += ["--max-examples", str(self.max_examples), "--seed", str(self.seed)]
        given += ["--cluster", self.cluster, "--report", str(self.report)]
        if self.suites:
            given += ["--suite", ",".join(self.suites)]
        if self.device is not None:
            given += ["--device", self.device]
        if self.max_world_size is not None:
            given += ["--max-world-size", str(self.max_world_size)]
        if self.lenses != LENSES:
            given += ["--lens", ",".join(self.lenses)]
        if self.known is not None:
            given += ["--known", str(self.known)]
        given += ["--known-strict"] * self.known_strict
        given += ["--no-adversary"] * (not self.adversary)
        if self.database is not None:
            given += ["--database", str(self.database)]
        given += ["--again"] * self.again
        given += ["--require-pairs"] * self.require_pairs
        return given


def _one_of(option: str, value: object, allowed: Collection[str]) -> str:
    if value not in allowed:
        raise BadArgument(f"{option}: {value!r} is not one of {', '.join(allowed)}")
    return str(value)


def whole_number(option: str, value: object, *, least: int) -> int:
    """A number given as text. Raises BadArgument, naming the option."""
    try:
        number = int(str(value))
    except ValueError:
        number = least - 1
    if number < least:
        raise BadArgument(f"{option}: {value!r} is not a whole number from {least} up")
    return number


def _names(option: str, text: object) -> tuple[str, ...]:
    names = [name.strip() for name in str(text).split(",")] if str(text).strip() else []
    if "" in names:
        raise BadArgument(f"{option}: {text!r} has an empty name; separate names by one comma")
    return tuple(dict.fromkeys(names))


def _lenses(text: object) -> tuple[Lens, ...]:
    names = [_one_of("--lens", name, LENSES) for name in _names("--lens", text)]
    if not names:
        raise BadArgument(f"--lens: name at least one of {', '.join(LENSES)}")
    return tuple(cast(Lens, lens) for lens in LENSES if lens in names)
