"""Whether two runs of one profile were the same: the same examples, verdicts and coverage.

    python -m verify.report.same ONE TWO

compares two report directories, or their files. Exits with 0 if they are the same, with 1 and a
line for each difference if not, and with 2 where they are not of one command; over how many
processes each was spread, and how long it took, is nobody's difference.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from verify.errors import BadArgument
from verify.report.files import read

_SHOWN, _REPORT = 60, "shardproof report"
# Of a property, what the machine decides: seconds, and the words and places of an error.
_INCIDENTAL = ("seconds", "reason")


@click.command()
@click.argument("one", type=click.Path(path_type=Path))
@click.argument("two", type=click.Path(path_type=Path))
def main(one: Path, two: Path) -> None:
    """Compare the reports ONE and TWO of the same command."""
    try:
        found = [*differences(*(read(_file(path)) for path in (one, two)))]
    except BadArgument as error:
        raise click.UsageError(str(error)) from None
    for line in found:
        click.echo(line)
    click.echo(f"{len(found) or 'no'} difference{'s' * (len(found) != 1)}: {one}, {two}")
    sys.exit(bool(found))


def differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[str]:
    """A line for each property, and each part of the coverage, that is not the same in two reports.
    Raises BadArgument where they are not of one command, or not whole."""
    for each in (one, two):
        if each["format"] != _REPORT:
            raise BadArgument(f"report: {each['format']!r} is not {_REPORT!r}; give that of a run")
    for name, of_one, of_two in _told(one, two):
        if of_one != of_two:
            raise BadArgument(f"report: {name} is {of_one} and {of_two}; compare one command's")
    if not (one["finished"] and two["finished"]):
        raise BadArgument("report: a run did not finish; compare whole ones")
    rows = [{row["property"]: row for row in each["properties"]} for each in (one, two)]
    for name in dict.fromkeys([*rows[0], *rows[1]]):
        yield from _apart(name, rows[0].get(name, {}), rows[1].get(name, {}))
    yield from _apart("coverage", one["coverage"], two["coverage"])


def _told(one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What says which command was run, in both."""
    for name in ("target", "cluster", "profile", "seed"):
        yield name, one[name], two[name]
    for name in one["options"]:
        if name != "workers":
            yield name, one["options"][name], two["options"].get(name)


def _apart(name: str, one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*one, *two]):
        if key not in _INCIDENTAL and one.get(key) != two.get(key):
            yield f"{name}: {key} {_short(one.get(key))}, {_short(two.get(key))}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _file(path: Path) -> Path:
    return path / "report.json" if path.is_dir() else path


if __name__ == "__main__":
    main()
