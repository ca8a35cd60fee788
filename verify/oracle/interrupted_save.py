"""The contract of saves that are interrupted: training goes on from a whole checkpoint, and ends
where it would have ended.

A run is that of `checkpoint`, whose options it has, and saves into a folder that is not there, or
by the seed of the case one that was just made. A step adds one to all that it has (parameters,
states of Adam, counts) and draws one number of every stream. The run is saved and, at any moment of
that, stopped. Then the other run, the layouts `saved` and that of the case by turns, loads what is
left in the folder: the checkpoint before or the new one, and the new one if it had been saved. It
goes on for a step and is saved, and so on. Where there was none before and the new one had not been
saved, there may be none to load, which is refused, and the other run begins anew. After `STOPS`
stops and as many steps it is saved once more and loaded.

No save leaves a file open, as far as the process of the first rank can tell. Option `stopped` is
what stops: the `run`, whose processes are killed; or the `machine`, which loses what it did not
flush. `verify.disk` says what counts as flushed. Adapters have the loop in common
(`verify.targets.interrupted_saves`).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch import Tensor

from verify.case import Case
from verify.oracle.checkpoint import DRAWN_BEFORE, ROUND_TRIP_OPTIONS, STREAMS, draws, round_trip
from verify.oracle.contract import Contract, Tensors
from verify.oracle.terms import known_options, one_of

STOPPED = ("run", "machine")
# The last of the runs that go on is at the layout of the case.
STOPS: Literal[1, 3, 5] = 3
INTERRUPTED_OPTIONS = (
    *(name for name in ROUND_TRIP_OPTIONS if name not in ("another", "unlike", "checkpoint")),
    "stopped",
)


def interrupted_save(case: Case) -> Contract:
    """What `round_trip` has, `STOPS` steps later. Outputs are those of the last run."""
    known_options(case, *INTERRUPTED_OPTIONS)
    one_of(case, "stopped", STOPPED)
    options = {name: value for name, value in case.options.items() if name != "stopped"}
    base = round_trip(dataclasses.replace(case, concept="checkpoint", options=options))

    def reference(inputs: Tensors, parameters: Tensors) -> Tensors:
        counted = {n: x if n.startswith("seed ") else x + STOPS for n, x in inputs.items()}
        found: dict[str, Tensor] = dict(base.reference(counted, parameters))
        for name in STREAMS:
            if f"seed {name}" in inputs:
                seeds = inputs[f"seed {name}"]
                found[f"draws {name}"] = draws(seeds, before=DRAWN_BEFORE + STOPS)
        return found

    return dataclasses.replace(base, reference=reference)


__all__ = ["interrupted_save"]
