"""The oracle of attention against torch's, the hooks of impl's blocks, and the drawn cases."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from torch import Tensor
from torch.nn import functional as F
from torch.nn.init import normal_

from impl.attention import CoreAttention, SelfAttention, attention
from impl.latent_attention import LatentAttention
from verify.case import Case
from verify.cluster import RankFailures, open_cluster
from verify.errors import BadArgument
from verify.layout import Layout
from verify.lens import check_fits
from verify.oracle.attention import attend, scoring, slopes
from verify.rank_program import contract_of
from verify.replica import RankMap
from verify.strategies.attention import BLOCKS, attention_cases, refusable_attention_cases

CONCEPTS = ("core_attention", *BLOCKS)


def _scoring(**options):
    return scoring(Case(concept="core_attention", layout=Layout(), options=options))


@pytest.mark.parametrize("causal", [True, False])
def test_the_oracle_is_torchs_attention(causal):
    q, k, v = (torch.randn(5, 2, heads, 3, dtype=torch.float64) for heads in (6, 2, 2))
    by_head = [x.permute(1, 2, 0, 3) for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*by_head, is_causal=causal, enable_gqa=True)
    found = attend(q, k, v, _scoring(causal=causal))
    torch.testing.assert_close(found, wanted.permute(2, 0, 1, 3))


def test_the_oracle_of_window_padding_and_sink_is_torchs_with_a_mask():
    q, k, v = (torch.randn(4, 1, 2, 3, dtype=torch.float64) for _ in range(3))
    padding = torch.tensor([[0, 1, 0, 0]])
    allowed = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]).bool()
    # A sink is a key of zeros whose score is added, and a value of zeros.
    sink = torch.tensor([0.5, -1.0], dtype=torch.float64)
    query = q.permute(1, 2, 0, 3)
    key, value = (F.pad(x.permute(1, 2, 0, 3), (0, 0, 1, 0)) for x in (k, v))
    added = F.pad(torch.zeros(2, 4, 4).double().masked_fill(~allowed, float("-inf")), (1, 0))
    added[:, :, 0] = sink[:, None]
    wanted = F.scaled_dot_product_attention(query, key, value, added)
    found = attend(q, k, v, _scoring(window=2, padding=True), padding=padding, sink=sink)
    torch.testing.assert_close(found, wanted.permute(2, 0, 1, 3))


def test_alibi_slopes_are_the_published_ones():
    assert slopes(8) == [2.0**-i for i in range(1, 9)]
    assert slopes(3) == [2.0**-4, 2.0**-8, 2.0**-2]


def _hooked() -> list[tuple[int, ...]]:
    """The shapes that a rotation and both norms are given on this rank."""
    seen: list[tuple[int, ...]] = []

    def noted(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x

    group = dist.group.WORLD
    common = {"group": group, "init": normal_, "sequence_parallel": True}
    core = CoreAttention(4, group=group)
    block = SelfAttention(
        6, heads=4, groups=2, head_size=3, core=core, query_norm=noted, key_norm=noted, **common
    )
    block(torch.randn(2, 1, 6), rotary=noted)
    latent = LatentAttention(
        6,
        heads=4,
        q_lora_rank=5,
        kv_lora_rank=7,
        head_size=3,
        rope_size=2,
        value_size=3,
        core=core,
        query_norm=noted,
        kv_norm=noted,
        **common,
    )
    latent(torch.randn(2, 1, 6), rotary=noted)
    return seen


def test_hooks_see_the_whole_sequence_of_local_heads_and_local_latents():
    with open_cluster("sim", world_size=2) as cluster:
        for seen in cluster.run(_hooked, world_size=2):
            heads = [(4, 1, 2, 3), (4, 1, 1, 3)] * 2
            latents = [(2, 1, 5), (2, 1, 7), (4, 1, 2, 2), (4, 1, 1, 2)]
            assert seen == heads + latents


def test_heads_that_groups_do_not_divide_are_refused():
    q, k = torch.randn(2, 1, 3, 2), torch.randn(2, 1, 2, 2)
    with pytest.raises(ValueError, match="2 heads do not divide the 3 heads"):
        attention(q, k, k, scale=1.0, layer_number=1, dropout=0.0)
    shape = {"sequence": 1, "batch": 1, "heads": 3, "groups": 2, "head_size": 1}
    with pytest.raises(BadArgument, match="2 do not divide 3 heads"):
        contract_of(Case(concept="core_attention", layout=Layout(), shape=shape))


def test_heads_of_other_ranks_are_refused():
    def other_heads() -> None:
        q = torch.randn(2, 1, 4, 2)
        CoreAttention(4, group=dist.group.WORLD)(q, q, q)

    refused = pytest.raises(RankFailures, match="q: 4 heads; this rank has 2")
    with open_cluster("sim", world_size=2) as cluster, refused as caught:
        cluster.run(other_heads, world_size=2)
    assert len(caught.value.failures) == 2


def _admit(case: Case) -> None:
    contract = contract_of(case)
    check_fits(case, contract, RankMap(case.layout, contract.axes))


@settings(max_examples=60, database=None, derandomize=True, deadline=None)
@given(case=attention_cases(*CONCEPTS, options={}))
def test_drawn_cases_are_valid(case):
    _admit(case)


@settings(max_examples=60, database=None, derandomize=True, deadline=None)
@given(case=refusable_attention_cases(*CONCEPTS))
def test_refusable_cases_are_not(case):
    with pytest.raises(BadArgument):
        _admit(case)
