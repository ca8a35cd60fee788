"""`shardproof run`: pytest over the package of properties, with a display of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from verify.console import console_of_stdout
from verify.errors import BadArgument
from verify.runner.display import Display
from verify.runner.options import RunOptions
from verify.runner.pytest_run import check_device, check_names, known_findings
from verify.runner.suites import PACKAGE

PASSED, NOT_PASSED, BAD_USAGE = 0, 1, 2


def run(options: RunOptions, *, workers: str | None = None, debug: bool = False) -> int:
    """Run the suites and write the report: 0 if the gate opens, 1 if it does not.

    Raises BadArgument for options that do not fit what is there. In torchrun's world only rank 0
    returns, and the others end with the same code.
    """
    check(options, workers)
    if options.cluster != "torchrun":
        return _run(options, workers, debug)
    from verify.cluster.torchrun import join

    command, code = join(), NOT_PASSED
    try:
        code = _run(options, workers, debug)
    finally:
        code = command.leave(code)
    return code


def check(options: RunOptions, workers: str | None) -> None:
    """Raise BadArgument where a name is unknown or options exclude each other."""
    check_names(options, names_package=True)
    check_device(options)
    if workers is not None and workers != "auto" and not workers.isdigit():
        raise BadArgument(f"-n: {workers!r} is not a number of workers, nor auto")
    if options.cluster == "torchrun":
        if workers is not None:
            raise BadArgument("-n: the torchrun cluster is one world; leave -n out")
        from verify.cluster.place import Place

        Place.from_environment()
    known_findings(options, names_package=True)


def _run(options: RunOptions, workers: str | None, debug: bool) -> int:
    display = Display(console_of_stdout(), options, tracebacks=debug)
    # Neither the settings of the repository that is checked, nor a cache in it.
    given = ["--pyargs", PACKAGE, "-c", os.devnull, f"--rootdir={Path.cwd()}"]
    given += ["-p", "no:cacheprovider", "--noconftest"]
    given += ["-vv"] * debug
    given += ["-n", workers, "--dist", "worksteal"] if workers not in (None, "0") else []
    try:
        status = pytest.main([*given, *options.arguments()], plugins=[display])
    finally:
        display.stop()
    if status == pytest.ExitCode.USAGE_ERROR:
        return BAD_USAGE
    opens = display.document is not None and display.document["opens_gate"]
    return PASSED if status == pytest.ExitCode.OK and opens else NOT_PASSED
