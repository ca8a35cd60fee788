"""The laws of random streams: who draws the same numbers, and who must not.

A region names the ranks' use of random numbers; its stream differs over some axes and is the same
along all others, as the ranks there hold copies, or replicas that start equal:

| region | differs over |
|---|---|
| `replicated` | pp |
| `tensor-parallel` | pp, tp |
| `context-parallel` | pp, cp |
| `tensor-context-parallel` | pp, tp, cp |
| `expert` | pp, ep, etp |

1. Ranks that agree on a region's axes draw the same numbers there.
2. Ranks that do not draw others.
3. Two regions draw different numbers, on one rank or on two.
4. What a region draws does not depend on what others draw in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from verify.case import Case
from verify.checks.blame import Bench
from verify.cluster.base import Cluster
from verify.errors import Mismatch, NotSupported
from verify.layout import Layout
from verify.rank_program import session_of, target_code
from verify.targets import load_target

Draw = Callable[[int], Tensor]
"""The next so many numbers of a stream, uniform in [0, 1), float64."""
Drawn = Mapping[str, tuple[float, ...]]

REGIONS: Mapping[str, tuple[str, ...]] = {
    "replicated": ("pp",),
    "tensor-parallel": ("pp", "tp"),
    "context-parallel": ("pp", "cp"),
    "tensor-context-parallel": ("pp", "tp", "cp"),
    "expert": ("pp", "ep", "etp"),
}
REQUIRED = ("replicated", "tensor-parallel")
_COUNT = 3
_MOST_DETAILS = 6


def streams(case: Case, *, target_name: str, cluster: Cluster) -> int:
    """The target's random streams on `case.layout` obey laws 1 to 4. A region that it does not have
    is not judged, but it must have those of `REQUIRED`."""
    bench = Bench("streams", case, target_name, cluster)
    bench.require_support(case)
    apart, mixed = (_drawn(bench, mixed=mixed) for mixed in (False, True))
    details = [*_shared(apart, case.layout), *_disturbed(apart, mixed)]
    if details:
        raise bench.mismatch("random state", details=tuple(details[:_MOST_DETAILS]))
    return len(apart)


def _drawn(bench: Bench, *, mixed: bool) -> list[Drawn]:
    """What every rank draws."""
    layout = bench.case.layout
    found = bench.run(_draws, bench.target_name, layout, mixed, world_size=layout.world_size)
    drawn = [each for each in found if each is not None]
    if len(drawn) < layout.world_size:
        raise NotSupported(f"{bench.target_name} does not tell its random streams")
    return drawn


def _draws(target_name: str, layout: Layout, mixed: bool) -> Drawn | None:
    """Rank program: six numbers of each region, at once, or in two rounds over all regions; None
    where the target does not tell its streams."""
    with session_of(load_target(target_name), layout) as session:
        tell = getattr(session, "streams", None)
        if tell is None:
            return None
        with target_code("drawing random numbers"):
            found: dict[str, Draw] = dict(tell())
            foreign = sorted(set(found) - set(REGIONS))
            lacking = sorted(set(REQUIRED) - set(found))
            if foreign or lacking:
                raise Mismatch(
                    f"streams: {', '.join(found)}; known are {', '.join(REGIONS)}, required"
                    f" {', '.join(REQUIRED)}"
                )
            drawn: dict[str, tuple[float, ...]] = dict.fromkeys(found, ())
            for _ in range(2 if mixed else 1):
                for region, draw in found.items():
                    drawn[region] += tuple(draw(_COUNT if mixed else 2 * _COUNT).tolist())
    return drawn


def _shared(drawn: Sequence[Drawn], layout: Layout) -> Iterator[str]:
    """How the ranks break laws 1 to 3."""
    first: dict[tuple[float, ...], tuple[str, int]] = {}
    of: dict[tuple[str, tuple[int, ...]], tuple[int, tuple[float, ...]]] = {}
    for rank, regions in enumerate(drawn):
        at = {**layout.expert_coordinates(rank), **layout.coordinates(rank)}
        for region, numbers in regions.items():
            place = region, tuple(at[axis] for axis in REGIONS[region])
            if place not in of:
                of[place] = rank, numbers
                known = first.setdefault(numbers, (region, rank))
                if known != (region, rank):
                    axes = ", ".join(REGIONS[region])
                    yield (
                        f"{region} on rank {rank} draws the numbers of {known[0]} on rank"
                        f" {known[1]}; it must differ over {axes}"
                    )
            elif of[place][1] != numbers:
                yield (
                    f"{region} on rank {rank} draws other numbers than on rank {of[place][0]};"
                    f" it must differ over {', '.join(REGIONS[region])} only, where they agree"
                )


def _disturbed(apart: Sequence[Drawn], mixed: Sequence[Drawn]) -> Iterator[str]:
    """How the ranks break law 4."""
    for rank, (one, other) in enumerate(zip(apart, mixed, strict=True)):
        for region, numbers in one.items():
            if other[region] != numbers:
                yield f"{region} on rank {rank} draws other numbers when others draw in between"
