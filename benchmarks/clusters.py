"""What does it cost to run the ranks of a program, one way or another?

All ways in one run, round by round in turn, so that whatever else the machine does meets them all;
in a round each is run a few times in a row, and the first of them, which finds the caches full of
the way before, does not count. Medians. `cpu` is the processor time of this process, which a busy
machine changes less than wall time. Goals are those of the project; a goal that is missed is
marked.

    python benchmarks/clusters.py [--quick] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import engines
import torch
import workloads
from rich.console import Console
from rich.table import Table

from verify.cluster import open_cluster

RANKS = 8
SIZES = (2, 4, 8, 16)
LARGE = (8, 64, 256)
REDUCED = 40
ROW = 4


@dataclass
class Timed:
    """The seconds of one way to do something, by round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def time(self, work: Callable[[], Any]) -> None:
        processor, begin = time.process_time(), time.perf_counter()
        work()
        self.wall.append(time.perf_counter() - begin)
        self.cpu.append(time.process_time() - processor)

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def processor(self) -> float:
        return statistics.median(self.cpu)


@dataclass
class Results:
    """Everything measured: by table, by row, by column."""

    mlp: dict[str, Timed] = field(default_factory=dict)
    layer: dict[str, Timed] = field(default_factory=dict)
    examples: dict[str, dict[int, float]] = field(default_factory=dict)
    all_reduce: dict[str, dict[int, float]] = field(default_factory=dict)
    hand_over: dict[int, float] = field(default_factory=dict)


Ways = dict[str, Callable[[], Any]]


def in_turn(ways: Ways, rounds: int, rare: dict[str, int]) -> dict[str, Timed]:
    """Time every way in every round, `ROW` times after one that does not count. `rare` ways have
    fewer rounds, of one time each."""
    found = {name: Timed() for name in ways}
    for number in range(rounds):
        for name, work in ways.items():
            if name not in rare:
                work()
                for _ in range(ROW):
                    found[name].time(work)
            elif number < rare[name]:
                found[name].time(work)
    return found


def check(ways: Ways) -> None:
    """All ways that return something return the same number for every rank."""
    expected = None
    for name, work in ways.items():
        for value in work() or ():
            expected = value if expected is None else expected
            if abs(value - expected) > abs(expected) * torch.finfo(torch.float32).eps * 64:
                raise SystemExit(f"{name} computes {value}, not {expected}")


def measure(rounds: int, *, quick: bool) -> Results:
    results = Results()
    with contextlib.ExitStack() as stack:
        sim = stack.enter_context(open_cluster("sim", world_size=max(LARGE)))
        gloo = stack.enter_context(open_cluster("process", world_size=max(SIZES), timeout=300.0))
        threads = {size: engines.Threaded(size, persistent=True) for size in SIZES}
        for each in threads.values():
            stack.callback(each.close)
        anew = engines.Threaded(RANKS, persistent=False)
        local = engines.Local(RANKS)

        def ways(name: str) -> Ways:
            return {
                "sim": lambda: sim.run(workloads.train, name, world_size=RANKS),
                "no ranks": lambda: workloads.bare(name, RANKS),
                "no ranks, no functions": lambda: workloads.bare(name, RANKS, functions=False),
                "threaded group, kept threads": lambda: threads[RANKS].run(workloads.train, name),
                "threaded group, new threads": lambda: anew.run(workloads.train, name),
                "LocalTensorMode": lambda: local.train(name),
                "process (gloo, kept)": lambda: gloo.run(workloads.train, name, world_size=RANKS),
            }

        check(ways("mlp"))
        spawned = {
            "new processes (spawn, gloo)": lambda: engines.spawn(workloads.train, ("mlp",), RANKS)
        }
        results.mlp = in_turn(
            ways("mlp") | spawned, rounds, dict.fromkeys(spawned, 1 + (not quick))
        )
        layer = ways("layer")
        check(dict(list(layer.items())[:3]))
        few = {name: 1 for name in layer if name not in list(layer)[:3]}
        results.layer = in_turn(layer, max(3, rounds // 4), few)
        for size in SIZES:
            _by_size(results, size, rounds, sim, gloo, threads[size])
        _hand_overs(results, sim, rounds)
    return results


def _by_size(
    results: Results, size: int, rounds: int, sim: Any, gloo: Any, threads: engines.Threaded
) -> None:
    """Examples a second and all-reduce time of one world size."""
    runs: dict[str, Callable[..., list[Any]]] = {
        "sim": lambda program, *args: sim.run(program, *args, world_size=size),
        "process": lambda program, *args: gloo.run(program, *args, world_size=size),
        "threaded, kept": threads.run,
    }
    examples = in_turn(
        {name: lambda run=run: run(workloads.train, "mlp") for name, run in runs.items()},
        rounds,
        {},
    )
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(max(run(workloads.all_reduces, REDUCED)))
    for name in runs:
        results.examples.setdefault(name, {})[size] = 1 / examples[name].median
        results.all_reduce.setdefault(name, {})[size] = statistics.median(seconds[name])


def _hand_overs(results: Results, sim: Any, rounds: int) -> None:
    """Seconds of a barrier for each rank, at several world sizes in turn."""
    seconds: dict[int, list[float]] = {size: [] for size in LARGE}
    for _ in range(rounds):
        for size in LARGE:
            count = max(5, 800 // size)
            begin = time.process_time()
            sim.run(workloads.barriers, 1, world_size=size)
            middle = time.process_time()
            sim.run(workloads.barriers, count + 1, world_size=size)
            spent = time.process_time() - middle - (middle - begin)
            seconds[size].append(spent / count / size)
    results.hand_over = {size: statistics.median(values) for size, values in seconds.items()}


def goals(results: Results) -> list[tuple[str, float, str, bool]]:
    """Each goal: what, how much, the bound, whether it is met."""
    mlp, layer = results.mlp, results.layer
    bare, sim = "no ranks", mlp["sim"].median
    grown = results.hand_over[LARGE[-1]] / results.hand_over[LARGE[0]]
    least = {
        "threaded group, new threads": 3,
        "threaded group, kept threads": 3,
        "process (gloo, kept)": 5,
        "new processes (spawn, gloo)": 500,
    }
    found = [
        ("MLP: sim over no ranks", sim / mlp[bare].median, 1.5, False),
        ("layer: sim over no ranks", layer["sim"].median / layer[bare].median, 1.15, False),
        ("hand-over at 256 ranks over 8", grown, 1.5, False),
        *(
            (f"MLP: {name} over sim", mlp[name].median / sim, bound, True)
            for name, bound in least.items()
        ),
    ]
    return [
        (what, value, f"{'at least' if more else 'at most'} {bound:g}", (value >= bound) == more)
        for what, value, bound, more in found
    ]


def show(results: Results, console: Console) -> None:
    for title, timed in (
        (f"TP MLP, {RANKS} ranks, hidden 64, forward and backward", results.mlp),
        (f"transformer layer, {RANKS} ranks, hidden 512, sequence 256", results.layer),
    ):
        table = Table("way", "wall ms", "over sim", "cpu ms", title=title, title_justify="left")
        for name, each in timed.items():
            ratio = f"{each.median / timed['sim'].median:.2f}x"
            own = f"{each.processor * 1e3:.2f}" if "gloo" not in name else "-"
            table.add_row(name, f"{each.median * 1e3:.2f}", ratio, own)
        console.print(table)
    for title, rows, form in (
        ("examples a second (TP MLP)", results.examples, lambda value: f"{value:.1f}"),
        ("all-reduce of 1 KiB, us", results.all_reduce, lambda value: f"{value * 1e6:.0f}"),
    ):
        table = Table(
            "way", *(f"{size} ranks" for size in SIZES), title=title, title_justify="left"
        )
        for name, values in rows.items():
            table.add_row(name, *(form(values[size]) for size in SIZES))
        console.print(table)
    table = Table(
        "ranks", "cpu us a rank", title="hand-over in sim (barrier)", title_justify="left"
    )
    for size, value in results.hand_over.items():
        table.add_row(str(size), f"{value * 1e6:.1f}")
    console.print(table)
    table = Table("goal", "measured", "bound", "met", title="goals", title_justify="left")
    for what, value, bound, met in goals(results):
        table.add_row(what, f"{value:.2f}x", bound, "yes" if met else "NO")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="5 rounds and one spawn")
    parser.add_argument("--rounds", type=int, help="rounds of each measurement (default 21)")
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    options = parser.parse_args()
    rounds = options.rounds or (5 if options.quick else 21)
    if rounds < 1:
        parser.error(f"--rounds: {rounds} is below 1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    hook = sys.excepthook
    results = measure(rounds, quick=options.quick)
    sys.excepthook = hook
    load = os.getloadavg()[0]
    show(results, Console(width=100))
    print(f"{rounds} rounds, torch {torch.__version__}, {os.cpu_count()} cores, load {load:.1f}")
    if options.json:
        whole = {**asdict(results), "rounds": rounds, "torch": torch.__version__, "load": load}
        whole["goals"] = [
            dict(zip(("goal", "value", "bound", "met"), g, strict=True)) for g in goals(results)
        ]
        options.json.write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
