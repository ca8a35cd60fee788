"""What does backward in two passes cost, and what does a zero-bubble schedule gain by it?

Measures the works of one stage, transformer layers on one device: forward, backward, and backward
in two passes, as `impl.weight_pass` does them ("put off") and as two walks through autograd's graph
("two walks"), of which the second computes gradients of activations again. All ways round by round
in turn; the least of each counts, which a busy machine changes less than a median.

From these times follow those of an iteration of 1f1b and of zb-h1, where transfers take none. All
stages are alike, so the ratio is the best that stages allow; `balanced` is its limit for works that
take one unit each (arXiv:2401.10241, table 2).

    python benchmarks/zero_bubble.py [--rounds N] [--layers N] [--hidden N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import Module, Sequential

from impl.groups import build_groups
from impl.pipeline.schedules import build_schedule
from impl.random import parallel_tracker
from impl.transformer import LayerConfig, TransformerLayer
from impl.weight_pass import WeightPass
from verify.cluster import open_cluster
from verify.layout import Layout
from verify.schedules.table import DURATIONS, table_of
from verify.schedules.times import Times

PIPELINES = ((4, 4), (4, 8), (4, 16), (8, 8), (8, 16), (8, 32))
WARM_UP = 2


@dataclass(frozen=True)
class Measured:
    """Nanoseconds of each work on a microbatch."""

    forward: int
    backward: int
    input: int
    weight: int
    walked_input: int
    walked_weight: int


def measured(layers: int, hidden: int, rounds: int) -> Measured:
    """Rank program of a world of one."""
    torch.set_num_threads(1)
    layout = Layout()
    config = LayerConfig(hidden=hidden, heads=8, head_size=hidden // 8, ffn=4 * hidden)
    groups, tracker = build_groups(layout), parallel_tracker(0, layout=layout, rank=0)
    stage = Sequential(
        *(
            TransformerLayer(config, groups=groups, tracker=tracker, init=_fill)
            for _ in range(layers)
        )
    )
    x = torch.randn(128, 2, hidden, requires_grad=True)
    gradient = torch.randn(128, 2, hidden)
    ways = (_whole, _put_off, _walked)
    found = []
    for _ in range(WARM_UP + rounds):
        parts = [way(stage, x, gradient) for way in ways]
        found.append({name: each for part in parts for name, each in part.items()})
    found = found[WARM_UP:]
    return Measured(**{name: min(each[name] for each in found) for name in found[0]})


def _fill(tensor: Tensor) -> None:
    torch.nn.init.normal_(tensor, std=0.02)


def _timed(work: Callable[[], object]) -> int:
    began = time.perf_counter_ns()
    work()
    return time.perf_counter_ns() - began


def _whole(stage: Module, x: Tensor, gradient: Tensor) -> dict[str, int]:
    made: list[Tensor] = []
    forward = _timed(lambda: made.append(stage(x)))
    leaves = [x, *stage.parameters()]
    return {
        "forward": forward,
        "backward": _timed(lambda: torch.autograd.backward(made, [gradient], inputs=leaves)),
    }


def _put_off(stage: Module, x: Tensor, gradient: Tensor) -> dict[str, int]:
    late = WeightPass(list(stage.parameters()))
    edge = get_gradient_edge(stage(x))
    return {
        "input": _timed(lambda: late.back(edge, gradient=gradient, x=x)),
        "weight": _timed(late.run),
    }


def _walked(stage: Module, x: Tensor, gradient: Tensor) -> dict[str, int]:
    y, leaves = stage(x), list(stage.parameters())
    return {
        "walked_input": _timed(lambda: torch.autograd.grad(y, x, gradient, retain_graph=True)),
        "walked_weight": _timed(lambda: torch.autograd.backward(y, gradient, inputs=leaves)),
    }


def span(kind: str, pp: int, microbatches: int, durations: dict[str, int]) -> int:
    """How long an iteration takes."""
    table = build_schedule(kind, pp=pp, vpp=1, microbatches=microbatches).to_plain()
    return Times(table_of(table), 1, durations).span


def works(found: Measured) -> Table:
    """What a microbatch takes."""
    table = Table(title="one microbatch on one stage, ms", title_justify="left")
    for name in ("", "input", "weight", "together", "of backward"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("forward", "", "", f"{found.forward / 1e6:.2f}", "")
    table.add_row("backward", "", "", f"{found.backward / 1e6:.2f}", "1.00")
    for name, first, second in (
        ("two walks", found.walked_input, found.walked_weight),
        ("put off", found.input, found.weight),
    ):
        total = first + second
        row = (f"{each / 1e6:.2f}" for each in (first, second, total))
        table.add_row(name, *row, f"{total / found.backward:.2f}")
    return table


def iterations(found: Measured) -> Table:
    """What an iteration takes, and the part of it that 1f1b does."""
    table = Table(title="one iteration, ms (and of 1f1b)", title_justify="left")
    for name in ("pp", "microbatches", "1f1b", "zb-h1, two walks", "zb-h1, put off", "balanced"):
        table.add_column(name, justify="right")
    plain = {"forward": found.forward, "backward": found.backward}
    walked = {**plain, "input": found.walked_input, "weight": found.walked_weight}
    late = {**plain, "input": found.input, "weight": found.weight}
    for pp, count in PIPELINES:
        base = span("1f1b", pp, count, plain)
        cells = []
        for durations in (walked, late):
            taken = span("zb-h1", pp, count, durations)
            cells.append(f"{taken / 1e6:.1f} ({taken / base:.2f})")
        best = span("zb-h1", pp, count, DURATIONS) / span("1f1b", pp, count, DURATIONS)
        table.add_row(str(pp), str(count), f"{base / 1e6:.1f}", *cells, f"{best:.2f}")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    with open_cluster("sim", world_size=1) as sim:
        (found,) = sim.run(measured, given.layers, given.hidden, given.rounds, world_size=1)
    console = Console(width=100)
    console.print(f"{given.layers} layers of hidden size {given.hidden}, one thread, float32")
    console.print(works(found))
    console.print(iterations(found))
    if given.json is not None:
        given.json.write_text(json.dumps(asdict(found)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
