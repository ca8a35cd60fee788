"""What the files of a report hold, as JSON types; `schema.json` is the contract.

Two kinds of file, `report` (a run) and `failure` (one property of it), have the same head and the
same list `failures`, so that either can be replayed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from verify.coverage.space import pair_counts, spaces_of
from verify.layout import Layout
from verify.provenance import machine, shardproof_version, target_facts, versions
from verify.runner.options import RunOptions
from verify.runner.record import Record, file_name, total
from verify.verdict import Verdict, opens_gate, worst

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known of a run apart from its records; `started` is ISO 8601, in UTC."""

    options: RunOptions
    max_world_size: int
    workers: int
    started: str
    seconds: float
    finished: bool
    rank_state: Mapping[str, Sequence[str]] = field(default_factory=dict)


def describe_run(facts: RunFacts, records: Sequence[Record]) -> dict[str, Any]:
    """The document of a run, whether or not it has finished."""
    verdicts = [record.verdict for record in records]
    gone = [e for r in records for e in r.known if e.state == "no longer fails"]
    overall = worst(verdicts) if facts.finished else worst([*verdicts, Verdict.UNKNOWN])
    coverage = _coverage(records, finished=facts.finished)
    lacking = facts.options.require_pairs and coverage["pairs"]["missed"] > 0
    return {
        **_head("report", facts),
        "seconds": round(facts.seconds, 3),
        "finished": facts.finished,
        "verdict": overall.value,
        "opens_gate": facts.finished
        and opens_gate(verdicts)
        and not (gone and facts.options.known_strict)
        and not lacking,
        "properties": [_row(record) for record in records],
        "coverage": coverage,
        "failures": [_failure(record) for record in records if _is_failure(record)],
    }


def describe_failure(facts: RunFacts, record: Record) -> dict[str, Any]:
    """The document of one property that did not pass."""
    return {**_head("failure", facts), "failures": [_failure(record)]}


def _head(kind: str, facts: RunFacts) -> dict[str, Any]:
    options = facts.options
    return {
        "format": f"shardproof {kind}",
        "format_version": FORMAT_VERSION,
        "shardproof": shardproof_version(),
        "versions": versions(),
        "platform": machine(),
        "target": {
            **target_facts(options.target),
            "rank_state": {name: list(lines) for name, lines in facts.rank_state.items()},
        },
        "cluster": {
            "name": options.cluster,
            "device": options.device,
            "max_world_size": facts.max_world_size,
        },
        "profile": {"name": options.profile, "max_examples": options.max_examples},
        "seed": options.seed,
        "options": {
            "suites": list(options.suites),
            "lenses": list(options.lenses),
            "workers": facts.workers,
            "adversary": options.adversary and options.cluster == "sim",
            "known": None if options.known is None else str(options.known),
            "known_strict": options.known_strict,
            "require_pairs": options.require_pairs,
        },
        "started": facts.started,
    }


def _is_failure(record: Record) -> bool:
    return record.verdict in (Verdict.FAILED, Verdict.KNOWN, Verdict.UNKNOWN)


def _failure(record: Record) -> dict[str, Any]:
    findings = [finding.to_json() for finding in record.findings]
    return {
        "property": record.property,
        "verdict": record.verdict.value,
        "reason": record.reason,
        "file": f"failures/{file_name(record.property)}" if record.findings else None,
        "findings": findings,
        "traceback": record.traceback,
    }


def _row(record: Record) -> dict[str, Any]:
    known = record.to_json()
    del known["findings"], known["traceback"]
    arithmetic = known.pop("arithmetic")
    layouts = known.pop("layouts")
    del known["options"], known["rows"], known["open"]
    return {**known, "suite": record.suite, "layouts": len(layouts), "lenses": list(arithmetic)}


def _coverage(records: Sequence[Record], *, finished: bool) -> dict[str, Any]:
    """What was covered; pairs only of a run that has finished, because they are many."""
    layouts = []
    spaces = spaces_of(records) if finished else []
    for text, count in total([record.layouts for record in records]).items():
        layout = json.loads(text)
        layouts.append({"text": str(Layout.from_json(layout)), "count": count, "layout": layout})
    return {
        "examples": sum(record.examples for record in records),
        "layouts": layouts,
        "arithmetic": total([record.arithmetic for record in records]),
        "options": total([record.options for record in records]),
        "pairs": pair_counts(spaces),
        "concepts": [space.to_json() for space in spaces],
    }
