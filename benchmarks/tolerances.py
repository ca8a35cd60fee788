"""How far right and wrong implementations lie from a bound: measured errors over what is allowed.

`impl` runs on several ranks, in three dtypes; its errors and the bounds of `verify.tolerance` are
printed, and drawn over size, number of ranks and depth. Then mutants, whose errors have to lie
beyond the bounds, beside `impl` on the same cases.

    python benchmarks/tolerances.py [--quick] [--seeds N] [--out docs/tolerances]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tolerance_plots import draw_margins, draw_sizes
from torch import Tensor

from verify.case import Case
from verify.cluster import Cluster, open_cluster
from verify.layout import Layout
from verify.lens import generate
from verify.oracle.contract import Contract
from verify.placement import Placements, shard
from verify.rank_program import Observation, contract_of, observe
from verify.reference import Reference, result_names
from verify.replica import RankMap
from verify.tolerance import Tolerance

DTYPES = ("float32", "bfloat16", "float16")
RANKS = 16
# As few as a candidate is tried with first; with more a bound is larger, if anything.
DISTURBED = 4


@dataclass(frozen=True)
class Operation:
    """A concept at growing sizes, and the result of it that is drawn."""

    name: str
    along: str
    result: str
    sizes: tuple[int, ...]
    case: Callable[[int], Case]


@dataclass(frozen=True)
class Wrong:
    """A mutant on a case of a precision that it gets wrong."""

    mutant: str
    what: str
    case: Case


@dataclass
class Error:
    """Of one result: the largest relative error of a rank and what is allowed there, and the
    largest error over what is allowed, of a tensor or of a row."""

    relative: float = 0.0
    allowed: float = 0.0
    ratio: float = 0.0

    def note(self, error: Tensor, expected: Tensor, rows: Tensor, whole: float) -> None:
        norm, size = float(error.norm()), float(expected.norm()) or 1.0
        if norm / size >= self.relative:
            self.relative, self.allowed = norm / size, whole / size
        by_row = error.reshape(len(rows), -1).norm(dim=1) / rows.clamp_min(1e-300)
        found = max(norm / whole if whole else 0.0, float(by_row.max()))
        self.ratio = max(self.ratio, found if found == found else torch.inf)


@dataclass
class Point:
    """An operation at one size in one dtype, by seed."""

    size: int
    errors: list[Error] = field(default_factory=list)
    worst: float = 0.0


def errors(case: Case, target: str, cluster: Cluster) -> dict[str, Error]:
    """Of every result of the first replica."""
    contract = contract_of(case)
    ranks = RankMap(case.layout, contract.axes)
    reference = Reference(case, contract, generate(case, contract, ranks, ""))
    tolerance = Tolerance(reference)
    seen = cluster.run(observe, target, case, world_size=case.layout.world_size)
    found = {}
    for name in result_names(contract):
        found[name] = Error()
        placements = _placements(name, contract, seen[0])
        for summands in ranks.summed(placements, ranks.replicas[""]):
            where = ranks.coordinates[summands[0]]

            def cut(full: Tensor, placed=placements, at=where) -> Tensor:
                return shard(full, placed, ranks.sizes, at)

            total = torch.stack([seen[rank].tensors[name].double() for rank in summands]).sum(0)
            expected = cut(reference.results[name]).double()
            rows, whole = tolerance.bounds(name, expected, cut, disturbed=DISTURBED)
            if total.numel():
                found[name].note(total - expected, expected, rows, whole)
    return found


def _placements(name: str, contract: Contract, seen: Observation) -> Placements:
    if name in contract.outputs:
        return contract.outputs[name].placements
    source = name.removeprefix("grad ")
    spec = contract.inputs.get(source)
    return seen.placements[source] if spec is None else spec.grad_placements or {}


def _case(concept: str, layout: Layout, *, dtype: str = "float32", **given: int | str) -> Case:
    """Whole numbers are sizes, all else options."""
    lens = "fp64" if dtype == "float64" else "native"
    shape = {name: value for name, value in given.items() if type(value) is int}
    options = {name: value for name, value in given.items() if name not in shape}
    return Case(
        concept=concept, layout=layout, shape=shape, options=options, lens=lens, dtype=dtype
    )


TOKENS = {"sequence": 4, "batch": 2}
_LOSS: Callable[[int], Case] = lambda n: _case(  # noqa: E731
    "vocab_cross_entropy", Layout(tp=4), **TOKENS, vocabulary=n
)
OPERATIONS = (
    Operation(
        "matmul (column-parallel)",
        "terms of a sum",
        "y",
        (4, 16, 64, 256, 1024),
        lambda n: _case("column_linear", Layout(tp=2), **TOKENS, in_features=n, out_features=16),
    ),
    Operation(
        "sum over ranks (row-parallel)",
        "ranks",
        "y",
        (1, 2, 4, 8, 16),
        lambda n: _case("row_linear", Layout(tp=n), **TOKENS, in_features=512, out_features=16),
    ),
    Operation("softmax (gradient of the loss)", "classes", "grad logits", (8, 32, 128, 512), _LOSS),
    Operation("cross-entropy", "classes", "loss", (8, 32, 128, 512), _LOSS),
    Operation(
        "layer norm",
        "features",
        "grad x",
        (4, 16, 64, 256, 1024),
        lambda n: _case("norm", Layout(tp=2, sequence_parallel=True), **TOKENS, hidden=n),
    ),
    Operation(
        "attention (ring)",
        "tokens",
        "grad q",
        (4, 16, 64, 256),
        lambda n: _case(
            "context_attention",
            Layout(cp=2),
            algorithm="ring",
            sequence=n,
            batch=1,
            heads=2,
            kv_heads=1,
            head_dim=16,
        ),
    ),
    Operation(
        "mlp",
        "features",
        "grad x",
        (4, 16, 64, 128),
        lambda n: _case("tp_mlp", Layout(tp=4), **TOKENS, hidden=n, ffn=4 * n),
    ),
    Operation(
        "stack of layers",
        "layers",
        "grad x",
        (2, 4, 8, 16, 32),
        lambda n: _case("pipeline", Layout(pp=2), **TOKENS, microbatches=2, hidden=16, layers=n),
    ),
)
_TRAINED = {"steps": 2, "rounds": 4, "sequence": 4, "batch": 2, "hidden": 4, "ffn": 4}
_HEADS = {"heads": 4, "groups": 2, "head_size": 8}
WRONG = (
    Wrong(
        "all-reduce-in-bfloat16",
        "float32 summed over ranks in bfloat16",
        _case("row_linear", Layout(tp=4), **TOKENS, in_features=64, out_features=16),
    ),
    Wrong(
        "mlp-activation-in-bfloat16",
        "float32 with its activation in bfloat16",
        _case("tp_mlp", Layout(tp=2), **TOKENS, hidden=16, ffn=64),
    ),
    Wrong(
        "loss-in-logits-precision",
        "loss of bfloat16 logits in bfloat16",
        _case("vocab_cross_entropy", Layout(tp=2), dtype="bfloat16", **TOKENS, vocabulary=128),
    ),
    Wrong(
        "buffer-in-low-precision",
        "main gradients added up in bfloat16",
        _case("training_steps", Layout(dp=2), dtype="bfloat16", **_TRAINED),
    ),
    Wrong(
        "loss-float64-in-float32",
        "loss of float64 logits in float32",
        _case("vocab_cross_entropy", Layout(tp=2), dtype="float64", **TOKENS, vocabulary=128),
    ),
    Wrong(
        "attention-softmax-in-float32",
        "softmax of float64 scores in float32",
        _case("core_attention", Layout(tp=2), dtype="float64", **TOKENS, **_HEADS),
    ),
    Wrong(
        "row-bias-before-sum",
        "a bias added by both ranks, in bfloat16",
        _case(
            "row_linear",
            Layout(tp=2),
            dtype="bfloat16",
            **TOKENS,
            in_features=64,
            out_features=16,
        ),
    ),
    Wrong(
        "norm-unbiased-variance",
        "a variance over 31 of 32 features, in bfloat16",
        _case("norm", Layout(), dtype="bfloat16", **TOKENS, hidden=32),
    ),
    Wrong(
        "norm-mean-a-constant",
        "a norm's mean without gradient, in bfloat16",
        _case("norm", Layout(), dtype="bfloat16", **TOKENS, hidden=32),
    ),
)


def _seeded(case: Case, seed: int, dtype: str | None = None) -> Case:
    return Case(**{**vars(case), "seed": seed, "dtype": dtype or case.dtype})


def measured(
    operation: Operation, dtype: str, seeds: int, cluster: Cluster, *, quick: bool
) -> Iterator[Point]:
    """The points of an operation in one dtype."""
    for size in operation.sizes[: 2 if quick else None]:
        point = Point(size)
        for seed in range(seeds):
            found = errors(_seeded(operation.case(size), seed, dtype), "impl", cluster)
            point.errors.append(found[operation.result])
            point.worst = max(point.worst, *(each.ratio for each in found.values()))
        yield point


def margins(wrong: Wrong, seeds: int, cluster: Cluster) -> tuple[list[float], list[float]]:
    """By seed, the largest error over what is allowed: of impl, and of the mutant."""
    found: tuple[list[float], list[float]] = ([], [])
    for seed in range(seeds):
        for target, ratios in zip(("impl", f"impl@{wrong.mutant}"), found, strict=True):
            results = errors(_seeded(wrong.case, seed), target, cluster)
            ratios.append(max(each.ratio for each in results.values()))
    return found


def _print_sizes(console: Console, points: dict[tuple[str, str], list[Point]]) -> None:
    table = Table("operation", "dtype", "sizes", "error / u", "allowed / u", "worst of all")
    for (name, dtype), line in points.items():
        u = torch.finfo(getattr(torch, dtype)).eps / 2
        off = [max(e.relative for e in point.errors) / u for point in line]
        allowed = [statistics.median(e.allowed for e in point.errors) / u for point in line]
        table.add_row(
            name,
            dtype,
            f"{line[0].size} to {line[-1].size}",
            f"{off[0]:.2g} to {off[-1]:.2g}",
            f"{allowed[0]:.2g} to {allowed[-1]:.2g}",
            f"{max(point.worst for point in line):.2f}",
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two sizes and one seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/tolerances"))
    given = parser.parse_args(arguments)
    seeds, console = 1 if given.quick else given.seeds, Console(width=100)
    given.out.mkdir(parents=True, exist_ok=True)
    with open_cluster("sim", world_size=RANKS) as cluster:
        points = {
            (operation.name, dtype): list(
                measured(operation, dtype, seeds, cluster, quick=given.quick)
            )
            for operation in OPERATIONS
            for dtype in DTYPES
        }
        beyond = {each.what: margins(each, seeds, cluster) for each in WRONG}
    _print_sizes(console, points)
    table = Table("case", "impl", "mutant")
    for what, (right, wrong) in beyond.items():
        table.add_row(what, f"{max(right):.2f}", f"{min(wrong):.3g} to {max(wrong):.3g}")
    console.print(table)
    labels = {each.name: (each.along, each.result) for each in OPERATIONS}
    draw_sizes(points, labels, given.out / "sizes.svg")
    draw_margins(beyond, given.out / "margins.svg")


if __name__ == "__main__":
    main()
