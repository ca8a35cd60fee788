"""Who shares a problem, and who holds the same, on one mesh and on both."""

import pytest
import torch

from verify.errors import HarnessError
from verify.layout import Layout
from verify.placement import Listed, Partial, Replicate, Shard, assemble, pieces, shard
from verify.replica import RankMap

STAGE = ("tp", "cp", "dp", "etp", "ep", "edp")
LAYOUT = Layout(tp=2, dp=2, pp=2, ep=2, etp=1)


def test_a_replica_of_a_concept_on_both_meshes_is_a_stage():
    ranks = RankMap(LAYOUT, STAGE)
    assert ranks.replicas == {"": (0, 1, 2, 3), "pp1": (4, 5, 6, 7)}
    assert ranks.sizes == {"tp": 2, "cp": 1, "dp": 2, "pp": 2, "etp": 1, "ep": 2, "edp": 2}
    for rank, found in enumerate(ranks.coordinates):
        assert found == LAYOUT.coordinates(rank) | LAYOUT.expert_coordinates(rank)


def test_a_concept_over_all_axes_has_one_replica():
    ranks = RankMap(LAYOUT, (*STAGE, "pp"))
    assert ranks.replicas == {"": tuple(range(8))}
    assert ranks.alike({"pp": Listed(0, ((0,), (1,))), "ep": Shard(1)}, range(8)) == [
        (0, 2),
        (1, 3),
        (4, 6),
        (5, 7),
    ]
    assert ranks.summed({"edp": Partial(), "pp": Listed(0, ((0,), ()))}, range(8)) == [
        (0, 2),
        (1, 3),
        (4, 6),
        (5, 7),
    ]


def test_parts_that_are_listed():
    """Some rank may have none, and others the same."""
    full, listed = torch.arange(6).view(3, 2), Listed(0, ((0, 2), (), (1, 2)))
    parts = {index: shard(full, {"pp": listed}, {"pp": 3}, {"pp": index}) for index in range(3)}
    assert [part[:, 0].tolist() for part in parts.values()] == [[0, 4], [], [2, 4]]
    coordinates = {index: {"pp": index} for index in range(3)}
    assert torch.equal(assemble((3, 2), parts, {"pp": listed}, {"pp": 3}, coordinates), full)


@pytest.mark.parametrize(
    ("length", "size", "indices"),
    [(3, 2, ((0,), (1,))), (2, 3, ((0,), (1,))), (2, 2, ((0,), (1, 2)))],
)
def test_lists_that_do_not_fit(length, size, indices):
    with pytest.raises(ValueError, match="does not list a dimension"):
        pieces(length, Listed(0, indices), size)


def test_tokens_are_placed_on_one_mesh_and_experts_on_the_other():
    ranks = RankMap(LAYOUT, STAGE)
    members = ranks.replicas["pp1"]
    assert ranks.alike({"ep": Shard(0), "etp": Shard(1)}, members) == [(4, 6), (5, 7)]
    assert ranks.alike({"dp": Shard(1), "tp": Replicate()}, members) == [(4, 5), (6, 7)]


def test_sums_are_over_axes_of_one_mesh():
    ranks = RankMap(LAYOUT, STAGE)
    assert ranks.summed({"tp": Partial()}, range(8)) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert ranks.summed({"edp": Partial()}, range(8)) == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert ranks.summed({"tp": Partial(), "dp": Partial()}, range(4)) == [(0, 1, 2, 3)]
    assert ranks.summed({}, range(3)) == [(0,), (1,), (2,)]
    assert RankMap(LAYOUT, ("ep",)).summed({}, range(3)) == [(0,), (1,), (2,)]
    with pytest.raises(HarnessError, match="axes of two meshes"):
        ranks.summed({"tp": Partial(), "ep": Partial()}, range(8))


def test_ranks_along_an_axis_differ_in_it_alone_on_its_own_mesh():
    ranks = RankMap(LAYOUT, STAGE)
    assert ranks.along("dp", range(4)) == [(0, 2), (1, 3)]
    assert ranks.along("ep", range(4)) == [(0, 1), (2, 3)]


@pytest.mark.parametrize("axes", [("tp", "ep"), ("tp", "cp", "dp", "ep", "edp"), ("nothing",)])
def test_other_mixtures_of_axes_are_no_contract(axes):
    with pytest.raises(HarnessError, match="neither of one mesh nor all of both"):
        assert RankMap(LAYOUT, axes).replicas
