"""How often a right implementation is called wrong: all suites, seed after seed, on this machine
alone, until so many examples are done; what is done is kept, and the summary is of all of it.

    ci/false-alarms --examples 100000 -n 2

Whatever fails of the reference implementation is a false alarm, or a defect of it: somebody looks.
A line of the journal is one seed with some options. A seed that is cut short is run again; those
that are in the journal are not, and their reports are kept only if something failed, or a pair was
missed that is required. With other options, as `--suite` for suites that take less time for each
example, a folder goes on too.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import click

from verify.parent import die_with_parent
from verify.report import read
from verify.report.files import write_text
from verify.report.table import pairs_text
from verify.runner.record import total

PER_PROPERTY = 50
FOLDER, SUMMARY = "shardproof-false-alarms", "docs/false-alarms.md"
_BAD = ("failed", "unknown")


@click.command()
@click.option("--examples", default=100_000, show_default=True, help="At least so many in all.")
@click.option("--max-examples", default=PER_PROPERTY, show_default=True, help="Of each property.")
@click.option("--first-seed", default=1, show_default=True, help="The seed to begin with.")
@click.option("--target", default="impl", show_default=True, help="The right implementation.")
@click.option("--suite", default="", help="Only these suites, separated by commas.")
@click.option("--require-pairs", is_flag=True, help="As in a run: all that are on offer.")
@click.option("-n", "workers", default="2", show_default=True, help="Processes.")
@click.option("--folder", default=FOLDER, show_default=True, help="The journal and what failed.")
@click.option("--summary", default=SUMMARY, show_default=True, help="Beside it, the same as JSON.")
def main(
    examples: int,
    max_examples: int,
    first_seed: int,
    target: str,
    suite: str,
    require_pairs: bool,
    workers: str,
    folder: str,
    summary: str,
) -> None:
    """Run all suites on a right implementation and count what is called wrong. Goes on where it was
    stopped; exits with 1 if anything failed, or misses a pair that is required."""
    options = ["--target", target, "--max-examples", str(max_examples)]
    options += ["--suite", suite] if suite else []
    options += ["--require-pairs"] * require_pairs
    seed, lines = first_seed, journal(Path(folder))
    if any(line["target"].split()[0] != target for line in lines):
        raise click.UsageError(f"--folder: {folder} is of another target; name another folder")
    seeds = {line["seed"] for line in lines if line["options"] == options}
    while sum(line["examples"] for line in lines) < examples:
        while seed in seeds:
            seed += 1
        lines.append(_one_seed(seed, options, workers, Path(folder)))
        seeds.add(seed)
        document = described(lines)
        write_text(Path(summary).with_suffix(".json"), json.dumps(document, indent=1) + "\n")
        write_text(Path(summary), text_of(document, examples))
        so_far = f"{document['examples']} examples, {len(document['alarms'])} alarms"
        click.echo(f"seed {seed}: {so_far} so far")
    sys.exit(1 if described(lines)["alarms"] or any(map(_lacks_pairs, lines)) else 0)


def _lacks_pairs(line: Mapping[str, Any]) -> bool:
    return "--require-pairs" in line["options"] and line["pairs"]["missed"] > 0


def journal(folder: Path) -> list[dict[str, Any]]:
    """What is done. A last line that was cut short by an interruption is not done, and removed.
    Raises click.UsageError for a journal that is none."""
    path, found = folder / "journal.jsonl", []
    whole = path.read_text().splitlines(keepends=True) if path.exists() else []
    if whole and not whole[-1].endswith("\n"):
        write_text(path, "".join(whole[:-1]))
        del whole[-1]
    for line in whole:
        try:
            found.append(json.loads(line))
            found[-1]["options"], found[-1]["seed"]
        except (ValueError, TypeError, KeyError):
            said = f"--folder: {path} is no journal of false alarms; name another folder"
            raise click.UsageError(said) from None
    return found


def _one_seed(seed: int, options: Sequence[str], workers: str, folder: Path) -> dict[str, Any]:
    """Run one seed and note what came of it."""
    report = folder / f"seed-{seed}-{crc32(' '.join(options).encode()):08x}"
    command = [sys.executable, "-m", "verify", "run", "--profile", "ci", *options]
    command += ["--seed", str(seed), "--report", str(report), "-n", workers]
    folder.mkdir(parents=True, exist_ok=True)
    with report.with_suffix(".log").open("w") as log:
        done = subprocess.run(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
            preexec_fn=die_with_parent,
        )
    if done.returncode not in (0, 1) or not (report / "report.json").exists():
        raise click.ClickException(f"seed {seed}: no report; see {log.name}")
    document = read(report / "report.json")
    if not document["finished"]:
        raise click.ClickException(f"seed {seed}: it did not finish; see {log.name}")
    line = line_of(document, options)
    with (folder / "journal.jsonl").open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    if done.returncode == 0:
        shutil.rmtree(report)
        Path(log.name).unlink()
    return line


def line_of(document: Mapping[str, Any], options: Sequence[str]) -> dict[str, Any]:
    """A line of the journal, of the report of a seed."""
    coverage, rows = document["coverage"], document["properties"]
    return {
        "seed": document["seed"],
        "options": list(options),
        "commit": _commit(),
        "target": f"{document['target']['name']} {document['target']['version']}",
        "platform": document["platform"],
        "versions": document["versions"],
        "seconds": document["seconds"],
        "properties": len(rows),
        "examples": coverage["examples"],
        "compared": sum(row["compared"] for row in rows),
        "arithmetic": coverage["arithmetic"],
        "pairs": coverage["pairs"],
        "concepts": {space["concept"]: space["examples"] for space in coverage["concepts"]},
        "layouts": [each["text"] for each in coverage["layouts"]],
        "alarms": [
            {"property": each["property"], "verdict": each["verdict"], "said": _said(each)}
            for each in document["failures"]
            if each["verdict"] in _BAD
        ],
    }


def _said(failure: Mapping[str, Any]) -> str:
    cases = [json.dumps(finding["case"]) for finding in failure["findings"]]
    return (failure["reason"] or "; ".join(cases))[:2000]


def _commit() -> str:
    """The commit of the working directory, with a plus where impl, verify or properties differ
    from it."""
    git = ["git", "describe", "--always", "--abbrev=12", "--exclude=*"]
    given = subprocess.run(git, capture_output=True, text=True, check=False)
    paths = ["git", "status", "--porcelain", "--", "impl", "verify", "properties"]
    changed = subprocess.run(paths, capture_output=True, text=True, check=False).stdout.strip()
    return (given.stdout.strip() or "unknown") + "+" * bool(changed)


def described(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The summary of all lines."""
    return {
        "examples": sum(line["examples"] for line in lines),
        "compared": sum(line["compared"] for line in lines),
        "seconds": round(sum(line["seconds"] for line in lines), 1),
        "runs": _runs(lines),
        "commits": list(dict.fromkeys(line["commit"] for line in lines)),
        "targets": list(dict.fromkeys(line["target"] for line in lines)),
        "platforms": list(dict.fromkeys(line["platform"] for line in lines)),
        "versions": lines[-1]["versions"] if lines else {},
        "layouts": len({text for line in lines for text in line["layouts"]}),
        "arithmetic": total([line["arithmetic"] for line in lines]),
        "concepts": total([line["concepts"] for line in lines]),
        "alarms": [{"seed": line["seed"], **each} for line in lines for each in line["alarms"]],
    }


def _runs(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was run with which options: the seeds, how many examples each had, and all had."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in lines:
        new = {"options": line["options"], "seeds": [], "counts": [], "examples": 0}
        own = found.setdefault(tuple(line["options"]), new)
        own["seeds"].append(line["seed"])
        own["counts"].append(line["examples"])
        if "--require-pairs" in line["options"]:
            own.setdefault("pairs", {})[str(line["seed"])] = line["pairs"]
        own["examples"] += line["examples"]
    return list(found.values())


def text_of(document: Mapping[str, Any], wanted: int) -> str:
    """The summary as Markdown; made by the script and by nobody else."""
    count, alarms = document["examples"], document["alarms"]
    found = f"{len(alarms) or 'no'} alarm{'s' * (len(alarms) != 1)}"
    state = "" if count >= wanted else f" (so far: {wanted} are wanted)"
    lines = [
        "# False alarms",
        "",
        f"{count:,} examples{state} on the unmodified {', '.join(document['targets'])}: {found}.",
        "",
        f"{document['compared']:,} elements were compared, on {document['layouts']} layouts, in"
        f" {document['seconds'] / 60:.0f} minutes on {'; '.join(document['platforms'])}; commits"
        f" {', '.join(document['commits'])}.",
        "",
        "Made by this script, which goes on where it was stopped:",
        "",
        *_commands(document["runs"]),
        "",
        "| suites | seeds | examples |",
        "|---|---|---:|",
        *(
            f"| {_suites(run['options'])} | {_ranges(run['seeds'])} | {run['examples']:,} |"
            for run in document["runs"]
        ),
        "",
        *(
            f"With seed {seed}, {pairs_text(pairs)}.\n"
            for run in document["runs"]
            for seed, pairs in run.get("pairs", {}).items()
        ),
        "| lens and dtype | examples |",
        "|---|---:|",
        *(f"| {name} | {n:,} |" for name, n in document["arithmetic"].items()),
        "",
        "| concept | examples |",
        "|---|---:|",
        *(f"| {name} | {n:,} |" for name, n in document["concepts"].items()),
    ]
    if alarms:
        lines += ["", "## Alarms", ""]
        lines += [f"- seed {e['seed']}, {e['property']}: {e['verdict']}" for e in alarms]
    return "\n".join(lines) + "\n"


def _commands(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those that make the same again, one after the other: each goes on from a seed without a gap,
    and says how many there are then."""
    found, so_far = [], 0
    for run in runs:
        counts = dict(zip(run["seeds"], run["counts"], strict=True))
        for first, last in _consecutive(run["seeds"]):
            so_far += sum(counts[seed] for seed in range(first, last + 1))
            given = f"--examples {so_far} --first-seed {first} {' '.join(run['options'])}"
            found.append(f"    ci/false-alarms {given}")
    return found


def _suites(options: Sequence[str]) -> str:
    """`norm, mlp`, or `all`."""
    named = options[options.index("--suite") + 1] if "--suite" in options else "all"
    return named.replace(",", ", ")


def _ranges(seeds: Sequence[int]) -> str:
    """`1 to 3, 7`."""
    pairs = _consecutive(seeds)
    return ", ".join(f"{a} to {b}" if a < b else str(a) for a, b in pairs) or "none"


def _consecutive(seeds: Sequence[int]) -> list[tuple[int, int]]:
    """The first and the last of each range of seeds without a gap."""
    ordered = sorted(seeds)
    starts = [seed for seed in ordered if seed - 1 not in seeds]
    ends = [seed for seed in ordered if seed + 1 not in seeds]
    return list(zip(starts, ends, strict=True))


if __name__ == "__main__":
    main()
