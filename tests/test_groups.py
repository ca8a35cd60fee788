"""impl's process groups, the laws of groups, and what the laws catch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from impl.groups import build_groups
from verify.case import Case
from verify.checks.group_laws import groups_check, judge
from verify.cluster import Cluster, RankFailures, open_cluster
from verify.errors import Mismatch
from verify.layout import Layout
from verify.oracle import groups as oracle

LAYOUTS = [
    Layout(),
    Layout(tp=2, cp=2),
    Layout(pp=4, tp=2, vpp=2),
    Layout(tp=3, pp=2, order="tp-pp-dp-cp-ep"),
    Layout(tp=2, cp=2, dp=2, ep=2, etp=1, optimizer_instances=2),
    Layout(tp=2, cp=4, hierarchical_cp=(2, 2), order="cp-tp-dp-pp-ep"),
    Layout(cp=3, dp=2, optimizer_instances=3),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with open_cluster("process", world_size=8) as cluster:
        yield cluster


def _check(cluster: Cluster, layout: Layout, target: str) -> tuple[str, ...]:
    case = Case(concept="groups", layout=layout)
    return groups_check(case, target_name=target, cluster=cluster)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_impl_has_every_group(cluster, layout) -> None:
    assert _check(cluster, layout, "group_targets:Right") == ()


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core")
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_megatron_core_obeys_the_laws(cluster, layout) -> None:
    if layout.optimizer_instances > 1 or layout.hierarchical_cp:
        pytest.importorskip("einops", reason="Megatron splits groups with einops")
    none = ("optimizer_inter",) if layout.optimizer_instances == 1 else ()
    assert _check(cluster, layout, "megatron-core") == none


@pytest.mark.parametrize(
    ("target", "layout", "texts"),
    [
        ("OtherOrder", Layout(tp=2, cp=2), ["tp group of rank 0", "[0, 1]", "[0, 2]", "law 3"]),
        ("LacksData", Layout(dp=2, pp=2), ["dp group of rank 0", "[0, 1]", "no group", "law 1"]),
        ("NoTensor", Layout(tp=2, dp=2), ["no tp group on any rank", "tp is 2"]),
        ("FirstReplica", Layout(cp=2, dp=2), ["cp group of rank 2", "[2, 3]", "[0, 1]", "law 7"]),
        ("OtherCommunicator", Layout(tp=2, dp=2), ["dp group of rank 0", "[0, 1]", "law 7"]),
        ("Granting", Layout(pp=3), ["embedding group of rank 1", "no group", "law 8"]),
        ("Leaving", Layout(tp=2), ["rank 0 of tp2 has", "process groups", "after its session"]),
        ("Foreign", Layout(), ["amax"]),
    ],
)
def test_wrong_groups_are_caught_and_explained(cluster, target, layout, texts) -> None:
    with pytest.raises(Mismatch) as caught:
        _check(cluster, layout, f"group_targets:{target}")
    for text in texts:
        assert text in str(caught.value)


def _table(layout: Layout) -> dict[str, list[tuple[int, ...]]]:
    return {kind: list(groups) for kind, groups in oracle.groups(layout).items()}


@pytest.mark.parametrize(
    ("law", "kind", "wrong"),
    [
        (1, "tp", [(0, 1), (2, 3), (4, 5)]),
        (1, "tp", [(0, 1), (2, 3), (4, 5), (5, 6, 7)]),
        (1, "tp", [(0, 1, 2), (3,), (4, 5), (6, 7)]),
        (1, "tp", [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]),
        (2, "tp", [(1, 0), (2, 3), (4, 5), (6, 7)]),
        (3, "position_embedding", [(0,), (1,), (2,)]),
        (6, "embedding", [(0, 4), (1, 5), (2, 6)]),
        (4, "cp", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        (5, "tp_cp", [(0, 1, 4, 5), (2, 3, 6, 7)]),
        (6, "dp_cp_intra", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        (6, "hcp_0", [(0, 1), (2, 3), (4, 5), (6, 7)]),
    ],
)
def test_each_law_can_fail(law, kind, wrong) -> None:
    layout = Layout(tp=2, cp=2, pp=2, hierarchical_cp=(2,))
    judge(_table(layout), layout, who="the oracle")
    with pytest.raises(Mismatch, match=rf"the {kind} group of rank \d+ [^$]*law {law}:"):
        judge(_table(layout) | {kind: wrong}, layout, who="a mutant")


def _two_bundles(one: Layout, other: Layout) -> tuple[float, int, int]:
    first, second = build_groups(one), build_groups(other)
    total = torch.ones(1)
    dist.all_reduce(total, group=second.tp_pp)
    made = len(first.made)
    for bundle in (second, first):
        bundle.destroy()
    return float(total), made, len(dist.distributed_c10d._world.pg_names)


def test_ranks_without_an_embedding_group_keep_step(cluster) -> None:
    """torch names a group by how many the process has, so uneven counts would hang the second."""
    seen = cluster.run(_two_bundles, Layout(pp=4, tp=2), Layout(pp=8), world_size=8)
    assert seen == [(8.0, seen[0][1], 1)] * 8


def _sharing(layout: Layout) -> tuple[bool, bool, bool, int]:
    groups = build_groups(layout)
    answer = (
        groups.dp is groups.dp_cp,
        groups.tp is groups.pp,
        groups.tp is groups.etp,
        len(groups.made),
    )
    groups.destroy()
    return answer


def test_equal_divisions_share_one_process_group(cluster) -> None:
    seen = cluster.run(_sharing, Layout(tp=2, pp=2), world_size=4)
    assert seen == [(True, False, True, 4)] * 4


def _queries(layout: Layout) -> tuple[object, ...]:
    groups = build_groups(layout)
    answers: list[object] = [groups.size("tp"), groups.rank("tp"), groups.ranks("tp")]
    for kind in ("embedding", "colour"):
        try:
            answers.append(groups.ranks(kind))
        except ValueError as error:
            answers.append(str(error))
    groups.destroy()
    return tuple(answers)


def test_a_bundle_answers_by_kind(cluster) -> None:
    seen = cluster.run(_queries, Layout(tp=2, pp=3), world_size=6)
    assert [answer[:3] for answer in seen[2:4]] == [(2, 0, (2, 3)), (2, 1, (2, 3))]
    assert [answer[3] for answer in seen] == [
        *((0, 4), (1, 5)),
        *(f"kind: rank {rank} is in no embedding group of tp2-pp3" for rank in (2, 3)),
        *((0, 4), (1, 5)),
    ]
    assert "'colour' is not one of tp, cp" in seen[0][4]


def test_a_layout_of_another_world_is_refused_on_every_rank(cluster) -> None:
    with pytest.raises(RankFailures) as caught:
        cluster.run(_sharing, Layout(tp=2), world_size=3)
    text = "layout: tp2 has 2 ranks, the world has 3; give a layout of 3 ranks"
    assert [(f.rank, f.kind, f.message) for f in caught.value.failures] == [
        (rank, "ValueError", text) for rank in range(3)
    ]
