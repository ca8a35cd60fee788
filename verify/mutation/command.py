"""The command `shardproof mutants`; what it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from verify.errors import BadArgument
from verify.names_option import names_option
from verify.runner.options import RunOptions

DEFAULT_PROFILE = "ci"


@click.command()
@names_option("--class", "classes", "Only these classes of mutants, see the table.")
@names_option("--name", "names", "Only these mutants.")
@names_option("--module", "modules", "Only in these modules and packages: linear,moe.")
@names_option("--without", "without", "Not in these modules and packages.")
@names_option("--suite", "suites", "Only with properties of these suites.")
@click.option(
    "--generated", is_flag=True, help="Mutants generated from the source, not the hand-made ones."
)
@click.option(
    "--history",
    is_flag=True,
    help="Mutants generated from what examples communicate, at every place.",
)
@click.option(
    "--unlisted",
    is_flag=True,
    help="Of either of these only those that are not listed as equivalent.",
)
@click.option(
    "--sample", type=click.IntRange(min=1), metavar="K", help="K of them, chosen by the seed."
)
@click.option("--profile", metavar="NAME", help="How much is drawn, as in a run. Default: ci.")
@click.option("--max-examples", metavar="N", help="Examples a property, instead of the profile's.")
@click.option("--seed", metavar="N", help="Seed of all that is drawn. Default: 0.")
@click.option(
    "--shrink/--no-shrink", default=True, help="Whether cases that fail are made smaller."
)
@click.option(
    "--every",
    is_flag=True,
    help="Run every property about a mutant, not only up to the first that fails.",
)
@click.option(
    "--within",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="Seconds for a mutant; nothing is known of one that is not caught by then.",
)
@click.option("-n", "workers", metavar="N|auto", help="Spread the mutants over N processes.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="All of it, as JSON.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="That as DIR/mutants.json, and in DIR/failures what `shardproof repro` takes.",
)
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
def mutants(
    generated: bool,
    history: bool,
    unlisted: bool,
    sample: int | None,
    shrink: bool,
    every: bool,
    within: float | None,
    workers: str | None,
    json_path: Path | None,
    report: Path | None,
    **given: Any,
) -> int:
    """Check the properties: which of them catches which deliberate defect of impl, and how soon.

    Runs on each mutant the properties that are about it, up to the first that fails. Exits with 0
    if all mutants are caught, or listed as equivalent in verify/mutants/equivalent.toml; with 1 if
    one survives, nothing is known of it, or it is listed and caught; with 2 if the command is
    wrong.

    \b
    All hand-made mutants, and those of one class:
        shardproof mutants -n auto
        shardproof mutants --class linear
    One of them, and the case that shows it again:
        shardproof mutants --name row-bias-before-sum --report mutants
        shardproof repro mutants/failures/row-bias-before-sum.json
    Which properties catch those of one class, and which would be missed:
        shardproof mutants --class linear --every --max-examples 25 --no-shrink
    A sample of what can be generated, in two modules, and in all but a package:
        shardproof mutants --generated --module linear,mappings --sample 50 --no-shrink
        shardproof mutants --generated --without pretrain --sample 50 --no-shrink
    A sample of what can go wrong with what is communicated, at any of its places:
        shardproof mutants --history --sample 50 --no-shrink
    A first look at many, without waiting for what none will catch:
        shardproof mutants --generated --module moe --no-shrink --within 20 --unlisted
    """
    from verify.mutation.run import Selection, run

    lists = ("classes", "names", "modules", "without")
    selection = Selection(
        generated=generated,
        history=history,
        unlisted=unlisted,
        sample=sample,
        **{name: _names(name, given.pop(name)) for name in lists},
    )
    options = RunOptions.parse({**given, "profile": given["profile"] or DEFAULT_PROFILE})
    return run(
        selection,
        options,
        workers=workers,
        shrink=shrink,
        every=every,
        within=within,
        json_path=json_path,
        report=report,
    )


def _names(option: str, text: str | None) -> tuple[str, ...]:
    names = [] if text is None else [name.strip() for name in text.split(",")]
    if "" in names:
        raise BadArgument(f"{option}: {text!r} has an empty name; separate names by one comma")
    return tuple(dict.fromkeys(names))
