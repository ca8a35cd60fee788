"""`shardproof repro`: runs the failing cases of a report again, in this fresh process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from verify import provenance
from verify.cluster import CLUSTERS, DEVICES, open_cluster
from verify.errors import BadArgument
from verify.finding import Finding
from verify.reference import one_thread
from verify.report.files import read
from verify.targets import load_target
from verify.verdict import Judgement, Verdict, judge


@dataclass(frozen=True)
class Recorded:
    """A failing case as a report has it."""

    property: str
    finding: Finding


@dataclass(frozen=True)
class Replayed:
    """A failing case and what it does now."""

    recorded: Recorded
    now: Judgement

    @property
    def same(self) -> bool:
        """Whether it fails just as it did: the same text, whatever the target's name."""
        was, now = self.recorded.finding, self.now.finding
        return now is not None and replace(now, target=was.target).message() == was.message()


@dataclass(frozen=True)
class Replay:
    """The failing cases of a report file, and where they will run again."""

    path: Path
    target: str
    cluster: str
    device: str | None
    cases: tuple[Recorded, ...]
    remarks: tuple[str, ...]

    @staticmethod
    def of(
        path: Path,
        *,
        target: str | None = None,
        cluster: str | None = None,
        device: str | None = None,
    ) -> Replay:
        """Read a report or a failure file; `target`, `cluster` and `device` take the place of those
        in it.

        Raises BadArgument for a file that is none, or has no case to run again.
        """
        document = read(path)
        cases = tuple(
            Recorded(failure["property"], Finding.from_json(data))
            for failure in document["failures"]
            for data in failure["findings"]
        )
        if not cases:
            raise BadArgument(f"report: {path} has no failing case to run again")
        if cluster is not None and cluster not in CLUSTERS:
            raise BadArgument(f"--cluster: {cluster!r} is not one of {', '.join(CLUSTERS)}")
        if device is not None and device not in DEVICES:
            raise BadArgument(f"--device: {device!r} is not one of {', '.join(DEVICES)}")
        was = document["cluster"]["name"]
        # torchrun's world ended with the run.
        chosen = cluster or ("sim" if was == "torchrun" else was)
        named = target or document["target"]["name"]
        load_target(named)
        where = device or document["cluster"].get("device")
        remarks = tuple(_remarks(document, named, chosen))
        return Replay(path, named, chosen, where, cases, remarks)

    def run(self) -> Iterator[Replayed]:
        """Each case, as it goes now."""
        size = max(case.finding.case.layout.world_size for case in self.cases)
        opened = open_cluster(self.cluster, world_size=size, device=self.device)
        with closing(opened) as cluster, one_thread():
            for recorded in self.cases:
                finding = recorded.finding
                now = judge(finding.check, finding.case, target_name=self.target, cluster=cluster)
                yield Replayed(recorded, now)


def headline(replayed: Replayed) -> str:
    """How a case went, in one line."""
    verdict, name = replayed.now.verdict, replayed.recorded.property
    if verdict is Verdict.FAILED:
        how = "fails again, in the same way" if replayed.same else "fails again, but differently"
        return f"{name} {how}:"
    if verdict is Verdict.PASSED:
        return f"{name} passes now."
    return f"{name} is {verdict.value} now: {replayed.now.reason.strip()}"


def _remarks(document: dict[str, Any], target: str, cluster: str) -> Iterator[str]:
    """What differs from the run of the report, one sentence each."""
    then = document["target"]
    if target != then["name"]:
        yield f"recorded with target {then['name']}, run again with {target}"
    elif (version := load_target(target).version()) != then["version"]:
        yield f"{target} {then['version']} then, {version} now"
    if cluster != document["cluster"]["name"]:
        yield f"recorded on cluster {document['cluster']['name']}, run again on {cluster}"
    yield from provenance.changes({"shardproof": document["shardproof"], **document["versions"]})
