"""What the commands other than `run` print: targets, suites, and failures that are run again."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from verify.display import console_of_stdout
from verify.errors import BadArgument
from verify.replay import Replay, headline
from verify.report.table import STYLES
from verify.suites import suites
from verify.targets import TARGETS, load_target
from verify.verdict import Verdict


def print_targets() -> None:
    """A line for each built-in target, and its stand-ins."""
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


def print_replay(replay: Replay) -> int:
    """Run the cases again and print each as it goes; 0 if all pass now, else 1."""
    console = console_of_stdout()
    for remark in replay.remarks:
        console.print(Text(f"note: {remark}"), soft_wrap=True)
    verdicts = []
    for replayed in replay.run():
        verdicts.append(replayed.now.verdict)
        style = STYLES[replayed.now.verdict.value]
        console.print(Text(headline(replayed), style), soft_wrap=True)
        if (finding := replayed.now.finding) is not None:
            _print_finding(
                console, finding.message(str(replay.path)), finding.divergences and finding.table()
            )
    return 0 if set(verdicts) == {Verdict.PASSED} else 1


def _print_finding(console: Console, message: str, table: object) -> None:
    console.print(Text(f"\n{message}\n"), soft_wrap=True)
    if table:
        console.print(Text(f"{table}\n"), soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
