"""What `shardproof repro` prints while the cases of a report run again."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from verify.console import console_of_stdout
from verify.replay import Replay, headline
from verify.report.table import STYLES
from verify.verdict import Verdict


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
