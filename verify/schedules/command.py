"""The command `shardproof schedule`; what it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path

import click

from verify.errors import BadArgument, Mismatch

KIND_NAMES = "gpipe, 1f1b, interleaved, zb-h1"


@click.command()
@click.option("--pp", type=int, default=4, metavar="N", help="Pipeline stages. Default: 4.")
@click.option("--vpp", type=int, default=1, metavar="N", help="Chunks of a stage. Default: 1.")
@click.option("--microbatches", type=int, default=8, metavar="N", help="Default: 8.")
@click.option(
    "--kind",
    metavar="NAME",
    help=f"{KIND_NAMES}. Default: interleaved with vpp above 1, else 1f1b.",
)
@click.option(
    "--target", default="impl", metavar="NAME", help="Whose table. Default: impl; see `targets`."
)
@click.option(
    "--svg",
    "svg_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the picture to FILE too.",
)
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
def schedule(
    pp: int, vpp: int, microbatches: int, kind: str | None, target: str, svg_path: Path | None
) -> None:
    """Show a pipeline schedule: who computes what when, its bubble, and what it keeps.

    The table is the target's, and is held against the laws of schedules first: exits with 1 if it
    breaks one, or the target has no tables, with 2 if the command is wrong or the target refuses.

    \b
    One forward, one backward, on four stages; and with two chunks a stage, as a picture:
        shardproof schedule --pp 4 --microbatches 8
        shardproof schedule --pp 4 --vpp 2 --microbatches 8 --svg interleaved.svg
    How much of the bubble zero-bubble saves:
        shardproof schedule --pp 4 --microbatches 8 --kind zb-h1
    """
    from verify.case import Case
    from verify.console import console_of_stdout
    from verify.layout import Layout
    from verify.schedules.check import CONCEPT, plan_of, table_from
    from verify.schedules.laws import complaints
    from verify.schedules.picture import picture
    from verify.schedules.svg import svg
    from verify.targets import load_target

    kind = kind or ("interleaved" if vpp > 1 else "1f1b")
    layout, shape = Layout(pp=pp, vpp=vpp), {"microbatches": microbatches}
    case = Case(concept=CONCEPT, layout=layout, shape=shape, options={"kind": kind})
    plan = plan_of(case)
    table = table_from(load_target(target), case)
    if wrong := complaints(table, plan):
        raise Mismatch(f"the schedule of {target} is not well-formed: {wrong[0]}")
    console = console_of_stdout()
    for line in picture(table, plan):
        console.print(line, soft_wrap=True)
    if svg_path is None:
        return
    try:
        svg_path.write_text(svg(table, plan), encoding="utf-8")
    except OSError as error:
        raise BadArgument(f"--svg: cannot write {svg_path}: {error.strerror}") from error
    console.print(f"written to {svg_path}", soft_wrap=True)
