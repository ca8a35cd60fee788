"""`shardproof mutants`: which mutants, and what is shown and written of them."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from verify.cluster.sim.defects import OPERATORS
from verify.console import console_of_stdout
from verify.errors import BadArgument
from verify.mutants import CATALOGUE, AnyMutant
from verify.mutants.equivalent import Equivalents
from verify.mutants.generated import PREFIX, generate, is_in, require_modules
from verify.mutants.history import PREFIX as HISTORY
from verify.mutants.history import find_historic, mutants_of
from verify.mutation.display import Progression, print_score
from verify.mutation.document import complaints, validate
from verify.mutation.outcome import Outcome
from verify.mutation.pool import number_of_workers
from verify.mutation.score import TARGET, Choice, score
from verify.mutation.trials import WORLD_SIZE, Surveyed
from verify.report.document import RunFacts, describe_failure
from verify.report.files import write, write_text
from verify.runner.options import RunOptions
from verify.runner.record import file_name
from verify.runner.suites import suite_names

PASSED, NOT_PASSED = 0, 1
FAILURES = "failures"
NONE_LISTED = Equivalents(())


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which mutants: hand-made ones, ones `generated` from the source, or from the `history` of
    what is communicated; of these classes, names and modules, all if empty, but not of the modules
    in `without`; a package stands for all modules in it. Of the latter two, those only that are
    not listed as equivalent if they are to be `unlisted`. At most `sample` of them, by the
    seed."""

    generated: bool = False
    history: bool = False
    unlisted: bool = False
    classes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    sample: int | None = None


def run(
    selection: Selection,
    options: RunOptions,
    *,
    workers: str | None,
    shrink: bool,
    every: bool,
    within: float | None,
    json_path: Path | None,
    report: Path | None,
) -> int:
    """Find the score, print it, write it: 0 if every mutant is caught or equivalent, else 1.

    Raises BadArgument for a name that there is not.
    """
    size = number_of_workers(workers)
    _require("--suite", options.suites, suite_names())
    chosen = select(selection, seed=options.seed)
    console = console_of_stdout()
    progress = Progression(console)
    try:
        document, outcomes = score(
            chosen,
            options,
            workers=size,
            shrink=shrink,
            every=every,
            within=within,
            watcher=progress,
        )
    finally:
        progress.stop()
    validate(document)
    console.print()
    print_score(console, document)
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    for path in (json_path, report and report / "mutants.json"):
        if path is not None:
            write_text(path, text)
            console.print(f"written: {path}", soft_wrap=True)
    if report is not None:
        _write_failures(report, document, outcomes, options)
    return NOT_PASSED if complaints(document) else PASSED


def _write_failures(
    report: Path, document: Mapping[str, Any], outcomes: Mapping[str, Outcome], options: RunOptions
) -> None:
    """A file for each mutant that is caught, of the failure that caught it."""
    for name, outcome in outcomes.items():
        if outcome.record is not None and outcome.record.findings:
            facts = RunFacts(
                options=replace(options, target=f"{TARGET}@{name}"),
                max_world_size=options.max_world_size or WORLD_SIZE,
                workers=document["workers"],
                started=document["started"],
                seconds=document["seconds"],
                finished=True,
            )
            path = report / FAILURES / file_name(name)
            write(path, describe_failure(facts, outcome.record))


def select(selection: Selection, *, seed: int) -> Sequence[AnyMutant] | Choice:
    """The mutants of a selection, in the order of the catalogue or the source; of a history they
    are chosen when it is known. Raises BadArgument for names that there are not, and where nothing
    is left."""
    for option, given in (("--module", selection.modules), ("--without", selection.without)):
        require_modules(TARGET, given, option=option)
    if selection.unlisted and not (selection.generated or selection.history):
        raise BadArgument(
            "--unlisted: no hand-made mutant is listed; give --generated or --history"
        )
    if selection.history and selection.generated:
        raise BadArgument("--history: mutants are generated from it or from the source; give one")
    if selection.history:
        for name in selection.names:
            find_historic(TARGET, name.removeprefix(HISTORY))
        _require("--class", selection.classes, OPERATORS)
        listed = Equivalents.read()
        _require_fresh(listed.without_a_line(TARGET))
        return partial(_of_history, selection, seed, listed)
    if not selection.generated:
        return _selected(selection, seed, list(CATALOGUE[TARGET].values()))
    known, listed = generate(TARGET, selection.modules), Equivalents.read()
    _require_fresh(listed.stale(known))
    return _selected(selection, seed, known, PREFIX, listed)


def _require_fresh(stale: Sequence[str]) -> None:
    if stale:
        raise BadArgument(f"verify/mutants/equivalent.toml: {stale[0]}; change the entry")


def _of_history(
    selection: Selection, seed: int, listed: Equivalents, surveyed: Sequence[Surveyed]
) -> Sequence[AnyMutant]:
    places = (place for each in surveyed for place in each.communicated)
    return _selected(selection, seed, mutants_of(TARGET, places), HISTORY, listed)


def _selected(
    selection: Selection,
    seed: int,
    known: Sequence[AnyMutant],
    prefix: str = "",
    listed: Equivalents = NONE_LISTED,
) -> Sequence[AnyMutant]:
    """Those of `known` that are asked for, and not `listed` if they are to be unlisted."""
    names = [f"{prefix}{name.removeprefix(prefix)}" for name in selection.names]
    _require("--name", names, {each.name for each in known})
    _require("--class", selection.classes, {each.family for each in known})
    modules, without = (
        tuple(f"{TARGET}.{name}" for name in each)
        for each in (selection.modules, selection.without)
    )
    chosen = [
        each
        for each in known
        if (not names or each.name in names)
        and (not selection.classes or each.family in selection.classes)
        and (not modules or any(is_in(each.module, name) for name in modules))
        and not any(is_in(each.module, name) for name in without)
        and not (selection.unlisted and listed.reason(each))
    ]
    if selection.sample is not None and selection.sample < len(chosen):
        kept = set(random.Random(seed).sample([each.name for each in chosen], selection.sample))
        chosen = [each for each in chosen if each.name in kept]
    if not chosen:
        raise BadArgument("mutants: none is of all the names, classes and modules asked for")
    return chosen


def _require(option: str, given: Collection[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            listed = sorted(known)
            more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
            raise BadArgument(f"{option}: {name!r} is not one of {', '.join(listed[:20])}{more}")
