"""What there is: the lists that `shardproof targets` and `shardproof suites` print."""

from __future__ import annotations

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from verify.console import console_of_stdout
from verify.errors import BadArgument
from verify.runner.suites import suites


def print_targets() -> None:
    """A line for each built-in target, and its stand-ins."""
    from verify.targets import TARGETS, load_target

    console = console_of_stdout()
    table = _table("target", "version", "of it not its own code")
    stand_ins = {}
    for name in TARGETS:
        try:
            target = load_target(name)
            version, stand_ins[name] = target.version(), target.stand_ins()
        except BadArgument as error:
            table.add_row(name, "-", Text(str(error).rpartition(": ")[2]))
        else:
            count = len(stand_ins[name])
            table.add_row(name, version, f"{count} stand-ins" if count else "nothing")
    console.print(table)
    for name, lines in stand_ins.items():
        if lines:
            console.print(f"\nstand-ins of {name} on this machine:")
        for line in lines:
            console.print(Text(f"  {line}"))
    console.print(
        "\nAny other: --target package.module:Target (verify/target.py says what it has)."
    )


def print_suites() -> None:
    """Each suite with the first lines of what it and its properties say."""
    console = console_of_stdout()
    for number, suite in enumerate(suites()):
        console.print(
            Text.assemble("\n" * bool(number), (suite.name, "bold"), f": {suite.summary}")
        )
        for name, summary in suite.properties.items():
            console.print(Text(f"  {name}"))
            console.print(Padding(Text(summary, "dim"), (0, 0, 0, 4)))


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
