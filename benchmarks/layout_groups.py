"""How long does it take to know every group of a large world, and how does Megatron compare?

Times all groups of all kinds of one layout (tp8 cp2 ep4 pp16, two optimizer instances), best of
three, in one process and without communication. The peer is Megatron's
`parallel_state.RankGenerator`, which makes the kinds that are sub-meshes; for those, the table
times `Layout` alone too, and the groups of both are compared.

    python benchmarks/layout_groups.py
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

from verify.layout import Layout

WORLDS = (1024, 2048, 4096, 8192, 16384)
# Kinds that RankGenerator has, by its own token, on its dense and on its expert mesh.
DENSE = {
    "tp": "tp",
    "cp": "cp",
    "dp": "dp",
    "pp": "pp",
    "dp_cp": "dp-cp",
    "tp_cp": "tp-cp",
    "tp_dp": "tp-dp",
    "tp_dp_cp": "tp-dp-cp",
    "tp_pp": "tp-pp",
}
EXPERT = {"ep": "ep", "etp": "tp", "edp": "dp", "etp_ep": "tp-ep", "etp_ep_pp": "tp-ep-pp"}


def best(work: Callable[[], Any]) -> tuple[float, Any]:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        answer = work()
        times.append(time.perf_counter() - start)
    return min(times), answer


def of_megatron(layout: Layout) -> dict[str, list[list[int]]]:
    from megatron.core.parallel_state import RankGenerator

    order = layout.order
    dense = RankGenerator(tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order=order)
    expert = RankGenerator(
        tp=layout.expert_tp, ep=layout.ep, dp=layout.edp, pp=layout.pp, cp=1, order=order
    )
    found = {kind: dense.get_ranks(token) for kind, token in DENSE.items()}
    return found | {kind: expert.get_ranks(token) for kind, token in EXPERT.items()}


def main() -> None:
    peer = importlib.util.find_spec("megatron") is not None
    shared = [*DENSE, *EXPERT]
    print(f"{'ranks':>6} {'all kinds':>10} {'groups':>7}", end="")
    print(f" | {'14 kinds':>9} {'RankGenerator':>14} {'ratio':>6}" if peer else "")
    for world_size in WORLDS:
        layout = Layout.for_world(world_size, tp=8, cp=2, pp=16, ep=4, optimizer_instances=2)
        seconds, groups = best(lambda x=layout: {kind: x.groups(kind) for kind in x.kinds})
        count = sum(map(len, groups.values()))
        print(f"{world_size:>6} {seconds:>9.3f}s {count:>7}", end="")
        if peer:
            ours, mine = best(lambda x=layout: {kind: x.groups(kind) for kind in shared})
            theirs, found = best(lambda x=layout: of_megatron(x))
            for kind in shared:
                assert [list(group) for group in mine[kind]] == found[kind], kind
            print(f" | {ours:>8.3f}s {theirs:>13.3f}s {theirs / ours:>5.1f}x", end="")
        print()


if __name__ == "__main__":
    main()
