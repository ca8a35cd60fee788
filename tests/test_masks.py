"""Masks of dropouts: recorded without changing a thing, put together, and held against laws."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from verify.checks.masks import Masks, applied_alike, recorded
from verify.layout import Layout
from verify.oracle.contract import Contract, Mask
from verify.placement import Shard, ZigzagShard, shard
from verify.replica import RankMap

WAYS = {
    "F.dropout": lambda x, p: F.dropout(x, p),
    "F.dropout by name": lambda x, p: F.dropout(input=x, training=True, p=p),
    "F.dropout in place": lambda x, p: F.dropout(x, p, inplace=True),
    "torch.dropout": lambda x, p: torch.dropout(x, p, True),
    "nn.Dropout": lambda x, p: nn.Dropout(p)(x),
    "nn.Dropout in place": lambda x, p: nn.Dropout(p, inplace=True)(x),
}


def _run(way, p, dtype=torch.float32):
    """Output, gradient and the generator's state afterwards, from a fixed state."""
    torch.manual_seed(3)
    leaf = torch.linspace(-2, 2, 60, dtype=dtype).view(5, 4, 3).transpose(0, 1).requires_grad_()
    y = way(leaf * 1, p)
    y.backward(torch.arange(60, dtype=dtype).view(y.shape))
    return y.detach(), leaf.grad, torch.get_rng_state()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_recording_changes_no_bit_and_no_state(way, p, dtype):
    plain = _run(way, p, dtype)
    with recorded() as masks:
        watched = _run(way, p, dtype)
    with applied_alike():
        again = _run(way, p, dtype)
    for one, other, third in zip(plain, watched, again, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)
    assert len(masks) == (p > 0)
    if p:
        assert torch.equal(masks[0], watched[0] != 0)


def test_masks_come_in_the_order_of_the_calls():
    x = torch.ones(4, 3)
    with recorded() as masks:
        F.dropout(x, 0.5)
        nn.Dropout(0.5)(x[:2])
        x[:1].clone().mul_(2).add_(torch.dropout(x[:1], 0.5, True))
    assert [mask.shape[0] for mask in masks] == [4, 2, 1]
    assert all(mask.dtype is torch.bool for mask in masks)


def test_what_drops_nothing_is_not_recorded():
    x = torch.ones(4, 3)
    with recorded() as masks:
        F.dropout(x, 0.5, training=False)
        F.dropout(x, 0.0)
        nn.Dropout(0.5).eval()(x)
        torch.dropout(x, 0.5, False)
    F.dropout(x, 0.5)
    assert masks == []


SIZE = (16, 12)


def _masks(layout, placements, p=0.5, axes=("tp",), full=None, names=("drop",)):
    """Right masks of every rank."""
    contract = Contract(
        inputs={},
        parameters={},
        outputs={},
        reference=lambda inputs, parameters: {},
        axes=axes,
        masks={name: Mask(SIZE, placements, p) for name in names},
    )
    ranks = RankMap(layout, axes)
    drawn = torch.Generator().manual_seed(5)
    fulls = [torch.rand(SIZE, generator=drawn) >= p for _ in names] if full is None else [full]
    found = [
        [shard(each, placements, ranks.sizes, ranks.coordinates[rank]) for each in fulls]
        for rank in range(layout.world_size)
    ]
    return Masks(contract, ranks, found), fulls


@pytest.mark.parametrize(
    ("layout", "placements", "axes"),
    [
        (Layout(tp=2), {}, ("tp",)),
        (Layout(tp=3), {"tp": Shard(-1)}, ("tp",)),
        (Layout(tp=2, cp=2), {"cp": ZigzagShard(0), "tp": Shard(0)}, ("tp", "cp")),
        (Layout(tp=2, cp=2), {"cp": Shard(0)}, ("tp", "cp")),
    ],
)
def test_right_masks_pass_and_are_put_together(layout, placements, axes):
    masks, (full,) = _masks(layout, placements, axes=axes)
    assert masks.misshapen() is None
    assert masks.divergences() == []
    assert torch.equal(masks.full("")["drop"], full)


def test_each_replica_has_masks_of_its_own():
    masks, _ = _masks(Layout(tp=2, dp=2), {})
    for rank in (2, 3):
        masks.found[rank][0] = ~masks.found[rank][0]
    assert masks.divergences() == []
    assert torch.equal(masks.full("dp1")["drop"], ~masks.full("")["drop"])


def _said(masks):
    (found,) = masks.divergences()
    return found.rank, found.detail


def test_copies_that_drop_apart():
    masks, _ = _masks(Layout(tp=3), {})
    masks.found[2][0] = masks.found[2][0].clone()
    masks.found[2][0][0, 0] ^= True
    assert _said(masks) == (2, "drops other elements than on rank 0, which holds a copy")


def test_parts_that_drop_alike():
    masks, _ = _masks(Layout(tp=3), {"tp": Shard(1)})
    masks.found[2][0] = masks.found[1][0]
    assert _said(masks) == (2, "drops the same elements as on rank 1, which holds another part")


def test_parts_so_small_that_they_agree_by_chance_are_not_judged():
    masks, _ = _masks(Layout(tp=2), {"tp": Shard(0)}, p=0.01, full=torch.ones(SIZE).bool())
    assert masks.divergences() == []


@pytest.mark.parametrize("kept", [0.9, 0.1])
def test_a_wrong_rate(kept):
    full = torch.rand(SIZE, generator=torch.Generator().manual_seed(1)) < kept
    masks, _ = _masks(Layout(tp=2), {}, full=full)
    rank, text = _said(masks)
    assert rank == 0
    assert text == f"keeps {int(full.sum())} of {full.numel()} elements; dropout is 0.5"


def test_a_mask_that_is_repeated():
    masks, _ = _masks(Layout(tp=1), {}, names=("first", "second", "third"))
    assert masks.divergences() == []
    masks.found[0][2] = masks.found[0][0]
    assert _said(masks) == (0, "drops the same elements as the dropout first before it")


def test_masks_that_are_not_those_of_the_contract():
    masks, _ = _masks(Layout(tp=2), {"tp": Shard(-1)})
    masks.found[1].append(masks.found[1][0])
    assert masks.misshapen() == "rank 1 applies 2 dropouts; promised are drop"
    masks, (full,) = _masks(Layout(tp=2), {"tp": Shard(-1)})
    masks.found[1][0] = full
    text = "rank 1 applies the dropout drop to [16, 12]; its part is [16, 6]"
    assert masks.misshapen() == text


def _of_stages(dp=1, alike=("dp",)):
    """Masks of two stages, one each, and of copies along dp that drop alike."""
    layout = Layout(pp=2, dp=dp)
    placed = {"dp": Shard(1)}
    specs = {f"stage {at}": Mask(SIZE, placed, 0.5, {"pp": at}, alike) for at in range(2)}
    contract = Contract(
        inputs={}, parameters={}, outputs={}, reference=lambda inputs, parameters: {}, masks=specs
    )
    ranks = RankMap(layout, ("dp", "pp"))
    size = (SIZE[0], SIZE[1] // dp)
    drawn = [torch.rand(size) < 0.5 for _ in range(2)]
    return Masks(contract, ranks, [[drawn[at["pp"]].clone()] for at in ranks.coordinates]), drawn


def test_only_the_ranks_of_a_stage_apply_its_dropouts():
    masks, drawn = _of_stages()
    assert masks.misshapen() is None
    assert masks.divergences() == []
    for at, mask in enumerate(drawn):
        assert torch.equal(masks.full("")[f"stage {at}"], mask)
    masks.found[1].clear()
    assert masks.misshapen() == "rank 1 applies 0 dropouts; promised are stage 1"


def test_parts_that_may_be_dropped_alike():
    masks, drawn = _of_stages(dp=2)
    assert masks.divergences() == []
    assert torch.equal(masks.full("")["stage 1"], torch.cat([drawn[1]] * 2, 1))


def test_parts_that_are_alike_count_once_in_the_rate():
    """27 of 32 kept at one half may be; 162 of 192 of as many draws may not."""
    size = (SIZE[0], SIZE[1] // 6)
    part = (torch.arange(SIZE[0] * SIZE[1] // 6) < 27).view(size)
    for alike, found in ((("dp",), 0), ((), 1)):
        masks, _ = _of_stages(dp=6, alike=alike)
        for rank in range(12):
            masks.found[rank][0] = part.roll(0 if alike else rank, 0)
        texts = [each.detail for each in masks.divergences() if "keeps" in each.detail]
        assert bool(texts) == bool(found), texts


def test_what_is_computed_again_in_backward_is_not_recorded():
    x = torch.ones(4, 3, requires_grad=True)

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, given):
            return F.dropout(given, 0.5)

        @staticmethod
        def backward(ctx, gradient):
            return F.dropout(gradient, 0.5)

    with recorded() as masks:
        Again.apply(x).sum().backward()
    assert len(masks) == 1
