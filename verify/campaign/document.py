"""The merged report of a campaign, as JSON types; `schema.json` here is the contract."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verify.campaign.plan import Plan, Unit
from verify.finding import Finding
from verify.provenance import machine, shardproof_version, target_facts, versions
from verify.report.files import write
from verify.runner.pytest_run import known_findings
from verify.runner.record import file_name, total
from verify.verdict import Verdict, opens_gate, worst

FORMAT, FORMAT_VERSION = "shardproof campaign", 2
# From what says most of a known finding to what says least.
_STATES = ("fails", "fails when its case is run", "no longer fails", "not seen")
_HEAD = (
    "format_version", "shardproof", "versions", "platform", "target", "cluster", "profile", "seed",
    "options", "started",
)  # fmt: skip


@dataclass
class Failure:
    """A failure that units found, the same in each: one property, and one shrunk case or one known
    finding. `file` replays it; `again` says whether it failed when it was run again, None if that
    is not known."""

    property: str
    verdict: str
    reason: str
    finding: dict[str, Any] | None
    seeds: list[int]
    file: str | None
    again: bool | None = None

    def to_json(self) -> dict[str, Any]:
        """The failure as the document has it."""
        return {**vars(self), "seeds": sorted(self.seeds)}


@dataclass
class Row:
    """A property over all its units."""

    property: str
    verdicts: list[Verdict] = field(default_factory=list)
    examples: int = 0
    seconds: float = 0.0
    failed_seeds: list[int] = field(default_factory=list)
    known: dict[tuple[int, str, str], str] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any], seed: int) -> None:
        """Take in the row of one unit's report."""
        verdict = Verdict(row["verdict"])
        self.verdicts.append(verdict)
        self.examples += row["examples"]
        self.seconds += row["seconds"]
        if verdict in (Verdict.FAILED, Verdict.KNOWN, Verdict.UNKNOWN):
            self.failed_seeds.append(seed)
        # Several that are known of a property may have one reason and one reference.
        for place, each in enumerate(row["known"]):
            key = place, each["reason"], each["reference"]
            before = self.known.get(key, _STATES[-1])
            self.known[key] = min(before, each["state"], key=_STATES.index)

    def to_json(self) -> dict[str, Any]:
        """The row as the document has it."""
        known = [{"reason": r, "reference": f, "state": s} for (_, r, f), s in self.known.items()]
        return {
            "property": self.property,
            "verdict": worst(self.verdicts).value,
            "seeds": len(self.verdicts),
            "failed_seeds": sorted(self.failed_seeds),
            "examples": self.examples,
            "seconds": round(self.seconds, 3),
            "known": known,
        }


class Merge:
    """What the units of a campaign found, together."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.rows: dict[str, Row] = {}
        self.failures: dict[str, Failure] = {}
        self.lost: dict[Unit, str] = {}
        self.lost_attempts = 0
        self.units = 0
        self._layouts: dict[str, int] = {}
        self._files: set[str] = set()
        self._listed = known_findings(plan.run, names_package=False)
        self._known: set[str] = set()

    def add(self, unit: Unit, document: Mapping[str, Any]) -> None:
        """Take in the report of a unit, and write a file for each failure that is new."""
        self.units += 1
        for row in document["properties"]:
            self.rows.setdefault(row["property"], Row(row["property"])).add(row, unit.seed)
        covered = document["coverage"]["layouts"]
        counts = {json.dumps(each["layout"], sort_keys=True): each["count"] for each in covered}
        self._layouts = total([self._layouts, counts])
        for key, part in self._parts(document):
            if key not in self.failures:
                self.failures[key] = self._new(part, document)
            if unit.seed not in self.failures[key].seeds:
                self.failures[key].seeds.append(unit.seed)

    def failing(self) -> set[str]:
        """The suites of which failing examples are kept."""
        found = (
            failure.property
            for key, failure in self.failures.items()
            if self._has_example(key, failure.verdict, failure.finding)
        )
        return {name.partition(".")[0] for name in found}

    def again(self, suite: str, document: Mapping[str, Any]) -> None:
        """Take in what the failing examples of a suite did when they were run again."""
        found = {
            key: part["property"]
            for key, part in self._parts(document)
            if self._has_example(key, part["verdict"], part["findings"])
        }
        fail = set(found.values())
        for key, failure in self.failures.items():
            if failure.property.partition(".")[0] != suite:
                continue
            if not self._has_example(key, failure.verdict, failure.finding):
                continue
            # Of several examples that fail alike, Hypothesis shows the smallest.
            alike = None if failure.property in fail else False
            failure.again = True if key in found else alike

    def _has_example(self, key: str, verdict: str, finding: object) -> bool:
        """Whether an example is kept of a failure, as it is of all that failed and is not known."""
        return key not in self._known and (bool(finding) or verdict == Verdict.FAILED.value)

    def describe(self, *, seconds: float, finished: bool, workers: int) -> dict[str, Any]:
        """The document, whether or not the campaign has finished."""
        rows = [row.to_json() for row in self.rows.values()]
        verdicts = [Verdict(row["verdict"]) for row in rows]
        missing = [Verdict.UNKNOWN] * (bool(self.lost) or not finished)
        plan, run = self.plan, self.plan.run
        gone = [e for row in rows for e in row["known"] if e["state"] == "no longer fails"]
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "shardproof": shardproof_version(),
            "versions": versions(),
            "platform": machine(),
            "target": target_facts(run.target),
            "options": plan.identity(),
            "suites": list(plan.suites),
            "seeds": {"first": plan.first, "end": plan.end},
            "workers": workers,
            "seconds": round(seconds, 3),
            "finished": finished,
            "verdict": worst([*verdicts, *missing]).value,
            "opens_gate": not missing and opens_gate(verdicts) and not (gone and run.known_strict),
            "totals": {
                "units": len(plan.units()),
                "done": self.units,
                "lost_attempts": self.lost_attempts,
                "examples": sum(row["examples"] for row in rows),
                "layouts": len(self._layouts),
                "failures": len(self.failures),
            },
            "properties": sorted(rows, key=lambda row: str(row["property"])),
            "failures": [each.to_json() for each in self.failures.values()],
            "lost": [
                {"suite": u.suite, "seed": None if u.again else u.seed, "reason": why}
                for u, why in self.lost.items()
            ],
        }

    def _new(self, part: Mapping[str, Any], document: Mapping[str, Any]) -> Failure:
        file = None
        if part["findings"]:
            file = self._file(part["property"])
            head = {name: document[name] for name in _HEAD}
            failure = {**part, "file": file}
            write(
                self.folder / file, {"format": "shardproof failure", **head, "failures": [failure]}
            )
        finding = part["findings"][0] if part["findings"] else None
        return Failure(part["property"], part["verdict"], part["reason"], finding, [], file)

    def _file(self, name: str) -> str:
        stem, number = file_name(name).removesuffix(".json"), 1
        while (file := f"failures/{stem}{f'-{number}' if number > 1 else ''}.json") in self._files:
            number += 1
        self._files.add(file)
        return file

    def _parts(self, document: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each finding of a report as a failure of its own, with what makes it the same as another:
        the property and the case, or which of the known ones it is, as those are not made smaller;
        without a finding, or beside known ones only, the property and the reason."""
        for failure in document["failures"]:
            beside = failure["verdict"] != Verdict.KNOWN.value
            for finding in failure["findings"]:
                made = Finding.from_json(finding)
                number = self._listed.number(failure["property"], made)
                same = made.case.to_json() if number is None else number
                key = json.dumps([failure["property"], finding["check"], same], sort_keys=True)
                part = {**failure, "findings": [finding]}
                if number is None:
                    beside = False
                else:
                    self._known.add(key)
                    part |= {"verdict": Verdict.KNOWN.value, "reason": "", "traceback": ""}
                yield key, part
            if beside:
                key = json.dumps([failure["property"], failure["reason"]])
                yield key, {**failure, "findings": []}
