"""The command `shardproof`: a thin front, whose commands import what they need when they run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from verify.errors import BadArgument, ShardproofError
from verify.mutation.command import mutants
from verify.names_option import names_option
from verify.runner.options import PROFILES, RunOptions
from verify.schedules.command import schedule

EXIT_FAILED, EXIT_USAGE = 1, 2
_BROKE = "this is a defect of shardproof or of the target's adapter; --debug shows the traceback"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit. An error is one line on stderr, with --debug a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = cli.main(given, prog_name="shardproof", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(EXIT_USAGE)
    except (click.ClickException, BadArgument) as error:
        _stop(given, error, EXIT_USAGE)
    except (KeyboardInterrupt, click.Abort) as error:
        _stop(given, error, EXIT_FAILED, "interrupted")
    except ShardproofError as error:
        _stop(given, error, EXIT_FAILED)
    except Exception as error:
        _stop(given, error, EXIT_FAILED, f"{type(error).__name__}: {error}: {_BROKE}")


def _stop(given: list[str], error: BaseException, code: int, said: str | None = None) -> NoReturn:
    if "--debug" in given:
        raise error
    text = said or (
        error.format_message() if isinstance(error, click.ClickException) else str(error)
    )
    # In torchrun's world every rank finds the same mistake, and rank 0 speaks for all.
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank == "0" or "torchrun" not in " ".join(given):
        click.echo(f"shardproof: error: {' '.join(text.split())}", err=True)
    sys.exit(code)


_debug = click.option(
    "--debug", is_flag=True, help="Show tracebacks of what went wrong, of pytest and of shardproof."
)
_quietly_debug = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="shardproof")
def cli() -> None:
    """Checks that a parallel implementation of transformer training computes what one device would
    have computed.

    \b
    Check the reference implementation, then megatron-core:
        shardproof run
        shardproof run --target megatron-core --profile ci
    \b
    Look at a failure again:
        shardproof repro shardproof-report/report.json
    """


_PROFILES = "; ".join(
    f"{name}: {each.examples} examples a property, {each.meaning}"
    for name, each in PROFILES.items()
)


@cli.command()
@click.option(
    "--target", metavar="NAME", help="impl (default), megatron-core, or package.module:Target."
)
@names_option("--suite", "suites", "Only these suites; see `shardproof suites`.")
@click.option("--profile", metavar="NAME", help=f"{_PROFILES}. Default: quick.")
@click.option("--max-examples", metavar="N", help="Examples a property, instead of the profile's.")
@click.option("--seed", metavar="N", help="Seed of all that is drawn. Default: 0.")
@click.option(
    "--cluster", metavar="NAME", help="What runs the ranks: sim (default), process, torchrun."
)
@click.option(
    "--device", metavar="NAME", help="cpu or cuda: one GPU in sim, a GPU a rank elsewhere."
)
@click.option("--max-world-size", metavar="N", help="The most ranks of a case.")
@names_option("--lens", "lenses", "Arithmetic: exact,fp64,native. Default: all.")
@click.option(
    "--known", metavar="FILE", help="Findings known of the target, which may fail (docs/report.md)."
)
@click.option(
    "--known-strict", is_flag=True, default=None, help="Exit with 1 if one no longer fails."
)
@click.option(
    "--adversary/--no-adversary",
    default=None,
    help="Whether sim delays and reorders what ranks do, and stops machines. Default: yes.",
)
@click.option("--database", metavar="DIR", help="Keep failing examples in Hypothesis' form there.")
@click.option("--again", is_flag=True, default=None, help="Run only the examples of --database.")
@click.option(
    "--require-pairs",
    is_flag=True,
    default=None,
    help="Exit with 1 if a pair of values that could be is not exercised, after a few more examples"
    " (docs/coverage.md).",
)
@click.option("--report", metavar="DIR", help="Where the report goes. Default: shardproof-report.")
@click.option("-n", "workers", metavar="N|auto", help="Spread the properties over N processes.")
@_debug
def run(workers: str | None, debug: bool, **given: Any) -> int:
    """Check a target: draw cases, run them on N ranks and on one, and compare.

    Exits with 0 if every property passed, failed as known or is not supported by the target and one
    passed or is known, with 1 if one failed or nothing is known of it, with 2 if the command is
    wrong. The report has what was
    covered and every failure; `shardproof repro` runs a failure again.

    \b
    Twenty examples a property, on the reference implementation:
        shardproof run
    A gate for a fork, whose adapter is the class Target in fork/adapter.py:
        shardproof run --target fork.adapter:Target --profile ci -n auto
    The same for an implementation of which some failures are known:
        shardproof run --target megatron-core --known ci/known/megatron-core-0.16.1.toml
    Only linear layers, in exact arithmetic, other cases than usual:
        shardproof run --suite linear --lens exact --seed 7
    In the four processes of a world that torchrun starts:
        torchrun --nproc-per-node 4 -m verify run --cluster torchrun
    """
    options = RunOptions.parse(given)
    from verify.runner.run import run as run_suites

    return run_suites(options, workers=workers, debug=debug)


@cli.command()
@click.option("--target", metavar="NAME", help="As of `shardproof run`.")
@names_option("--suite", "suites", "Only these suites.")
@click.option("--profile", metavar="NAME", help="As of `shardproof run`. Default: quick.")
@click.option("--max-examples", metavar="N", help="Examples a property and seed.")
@click.option("--seeds", metavar="FIRST:END", default="0:10", help="Seeds. Default: 0:10, 0 to 9.")
@click.option("--cluster", metavar="NAME", help="What runs the ranks: sim (default), process.")
@click.option("--max-world-size", metavar="N", help="The most ranks of a case.")
@names_option("--lens", "lenses", "Arithmetic: exact,fp64,native.")
@click.option("--known", metavar="FILE", help="Findings known of the target, which may fail.")
@click.option("--known-strict", is_flag=True, default=None, help="As of `shardproof run`.")
@click.option("--adversary/--no-adversary", default=None, help="As of `shardproof run`.")
@click.option("--address", metavar="ADDRESS", help="A Ray cluster. Default: one on this machine.")
@click.option("-n", "workers", metavar="N", help="Units at a time. Default: all CPUs.")
@click.option("--unit-timeout", metavar="S", default="3600", help="Seconds a unit. Default: 3600.")
@click.option("--report", metavar="DIR", help="Default: shardproof-campaign.")
@click.option("--resume", is_flag=True, help="Go on with the campaign that the report is of.")
@_quietly_debug
def campaign(
    seeds: str,
    address: str | None,
    workers: str | None,
    unit_timeout: str,
    resume: bool,
    **given: Any,
) -> int:
    """Run the suites with many seeds on many machines, through Ray, and merge what they find.

    A unit is one suite with one seed. Each failure is reported once, whatever seeds find it, and
    what is done is on disk at once: after any interruption, `--resume` runs the failing examples
    again and goes on. Exits as `shardproof run` does. Needs shardproof[campaign].

    \b
    A hundred seeds on this machine, and on a Ray cluster that has Shardproof installed:
        shardproof campaign --target impl --profile ci --seeds 0:100
        shardproof campaign --target impl --seeds 0:5000 --address ray://head:10001
    Go on after an interruption:
        shardproof campaign --target impl --profile ci --seeds 0:100 --resume
    """
    from verify.campaign.plan import parse
    from verify.runner.options import whole_number
    from verify.runner.suites import suite_names

    plan = parse(given, seeds, suite_names())
    count = None if workers is None else whole_number("-n", workers, least=1)
    timeout = whole_number("--unit-timeout", unit_timeout, least=1)
    from verify.campaign.driver import campaign as run_campaign

    return run_campaign(plan, address=address, workers=count, resume=resume, timeout=timeout)


@cli.command()
@_quietly_debug
def targets() -> None:
    """List the targets, their versions, and what in a run is not their own code.

    \b
    Any class with the methods of verify/target.py is a target too:
        shardproof run --target package.module:Target
    """
    from verify.runner.listing import print_targets

    print_targets()


@cli.command()
@_quietly_debug
def suites() -> None:
    """List the suites, and the properties in each.

    \b
    Run one or two of them:
        shardproof run --suite groups,linear
    """
    from verify.runner.listing import print_suites

    print_suites()


def _sizes(command: Callable[..., Any]) -> Callable[..., Any]:
    words = {
        "tp": "tensor", "cp": "context", "dp": "data (default: what the others leave)",
        "pp": "pipeline", "ep": "expert", "etp": "expert tensor (default: tp)",
        "vpp": "chunks of a pipeline stage", "optimizer_instances": "optimizer instances",
    }  # fmt: skip
    for name, meaning in reversed(words.items()):
        option = f"--{name.replace('_', '-')}"
        command = click.option(option, name, type=int, metavar="N", help=f"Size: {meaning}.")(
            command
        )
    return command


@cli.command()
@click.option("--world-size", type=int, metavar="N", help="Number of ranks.")
@_sizes
@click.option(
    "--hierarchical-cp", metavar="N,...", help="Levels of context parallelism, innermost first."
)
@click.option("--sequence-parallel", is_flag=True, default=None, help="Shard the sequence over tp.")
@click.option("--order", metavar="AXES", help="Leftmost varies fastest. Default: tp-cp-ep-dp-pp.")
@names_option("--kind", "kinds", "Only these kinds of groups: tp,dp_cp.")
@_quietly_debug
def layout(world_size: int | None, kinds: str | None, **given: Any) -> None:
    """Show who is where in a layout, and every process group with its ranks.

    \b
    Four ranks, where the tensor groups are [0,1] [2,3] and the context groups [0,2] [1,3]:
        shardproof layout --world-size 4 --tp 2 --cp 2
    Only the groups that reduce gradients, of a larger world with another order:
        shardproof layout --world-size 64 --tp 8 --pp 2 --order tp-pp-dp --kind dp,dp_cp
    """
    from verify.layout import Layout
    from verify.layout_picture import describe

    sizes = {name: value for name, value in given.items() if value is not None}
    if levels := sizes.get("hierarchical_cp"):
        sizes["hierarchical_cp"] = _numbers("--hierarchical-cp", levels)
    made = Layout(**sizes) if world_size is None else Layout.for_world(world_size, **sizes)
    chosen = None if kinds is None else [kind.strip() for kind in kinds.split(",")]
    click.echo(describe(made, kinds=chosen))


@cli.command()
@click.argument("report", type=click.Path(path_type=Path))
@click.option("--target", metavar="NAME", help="Another target than the report's.")
@click.option("--cluster", metavar="NAME", help="Another cluster than the report's.")
@click.option("--device", metavar="NAME", help="Another device than the report's: cpu or cuda.")
@_quietly_debug
def repro(report: Path, target: str | None, cluster: str | None, device: str | None) -> int:
    """Run the failing cases of REPORT again, each as it was written, in this process.

    REPORT is a report.json, or one file of its folder failures. Exits with 1 if a case fails again
    or nothing can be said, with 0 if all pass now, with 2 if there is nothing to run.

    \b
    All failures of a run, and one of them:
        shardproof repro shardproof-report/report.json
        shardproof repro shardproof-report/failures/linear.is_equivalent.json
    Is the fix right, and does the other implementation have the same defect?
        shardproof repro shardproof-report/report.json --target fork.adapter:Fixed
        shardproof repro shardproof-report/report.json --target megatron-core
    """
    from verify.replay import Replay
    from verify.replay_command import print_replay

    return print_replay(Replay.of(report, target=target, cluster=cluster, device=device))


cli.add_command(mutants)
cli.add_command(schedule)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise BadArgument(f"{option}: {text!r} is not a list of numbers like 2,4") from None


if __name__ == "__main__":
    main()
