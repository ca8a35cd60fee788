"""The document of a mutation score, as JSON types; `schema.json` is the contract."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema

from verify.mutants import AnyMutant, Mutant
from verify.mutants.generated import Generated
from verify.mutation.outcome import Fate, Outcome
from verify.provenance import machine, shardproof_version, target_facts, versions
from verify.runner.options import RunOptions

FORMAT, FORMAT_VERSION = "shardproof mutants", 3
_SCHEMA = Path(__file__).with_name("schema.json")

Examined = tuple[AnyMutant, Outcome, str]


def describe(
    examined: Sequence[Examined],
    options: RunOptions,
    *,
    target: str,
    started: str,
    seconds: float,
    workers: int,
    shrink: bool,
    every: bool,
    within: float | None,
) -> dict[str, Any]:
    """The document of mutants, what came of each, and why it is equivalent if it is said to be."""
    rows = [_row(*each) for each in examined]
    classes = dict.fromkeys(row["class"] for row in rows)
    facts = target_facts(target)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "shardproof": shardproof_version(),
        "versions": versions(),
        "platform": machine(),
        "target": {"name": facts["name"], "version": facts["version"]},
        "profile": {"name": options.profile, "max_examples": options.max_examples},
        "seed": options.seed,
        "suites": list(options.suites),
        "shrunk": shrink,
        "every": every,
        "within": within,
        "workers": workers,
        "started": started,
        "seconds": round(seconds, 3),
        "mutants": rows,
        "total": _sum(rows),
        "classes": {name: _sum([row for row in rows if row["class"] == name]) for name in classes},
    }


def validate(document: Mapping[str, Any]) -> None:
    """Raise jsonschema.ValidationError where a document is not as the schema says."""
    schema = json.loads(_SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(document)


def complaints(document: Mapping[str, Any]) -> list[str]:
    """What keeps a run from being good: mutants that no property catches, unless they are
    equivalent, and mutants that are said to be and are not."""
    found = []
    for row in document["mutants"]:
        caught = row["fate"] == Fate.CAUGHT.value
        if caught and row["equivalent"]:
            found.append(f"{row['name']} is listed as equivalent, and {row['caught_by']} fails")
        elif not caught and not (row["equivalent"] and row["fate"] == Fate.SURVIVED.value):
            found.append(f"{row['name']} {'' if row['fate'] == 'survived' else 'is '}{row['fate']}")
    return found


def _row(mutant: AnyMutant, outcome: Outcome, equivalent: str) -> dict[str, Any]:
    record = outcome.record
    finding = record.findings[0] if record and record.findings else None
    return {
        "name": mutant.name,
        "class": mutant.family,
        "module": mutant.module,
        "wrong": mutant.wrong,
        "snippet": mutant.snippet,
        "replacement": mutant.replacement,
        "function": mutant.function if isinstance(mutant, Generated) else None,
        "seen": mutant.seen if isinstance(mutant, Mutant) else None,
        "concepts": list(mutant.caught_by) if isinstance(mutant, Mutant) else [],
        "fate": outcome.fate.value,
        "caught_by": outcome.caught_by,
        "properties": list(outcome.properties),
        "failing": list(outcome.failing),
        "undecided": list(outcome.undecided),
        "examples": outcome.examples,
        "seconds": round(outcome.seconds, 3),
        "case": finding.case.to_json() if finding else None,
        "case_text": str(finding.case) if finding else "",
        "message": finding.message() if finding else (record.reason if record else ""),
        "reason": outcome.reason,
        "equivalent": equivalent,
    }


def _sum(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts, the score of all and of those that are not equivalent, and times to detection."""
    caught = _with(rows, Fate.CAUGHT)
    equivalent = [row for row in rows if row["equivalent"]]
    times = [row["seconds"] for row in caught]
    others = len(rows) - len(equivalent)
    counted = sum(1 for row in caught if not row["equivalent"])
    return {
        "mutants": len(rows),
        "caught": len(caught),
        "survived": len(_with(rows, Fate.SURVIVED)),
        "unknown": len(_with(rows, Fate.UNKNOWN)),
        "equivalent": len(equivalent),
        "score": round(len(caught) / len(rows), 4) if rows else None,
        "score_without_equivalent": round(counted / others, 4) if others else None,
        "median_seconds": round(statistics.median(times), 3) if times else None,
        "worst_seconds": max(times, default=None),
    }


def _with(rows: Iterable[Mapping[str, Any]], fate: Fate) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["fate"] == fate.value]
