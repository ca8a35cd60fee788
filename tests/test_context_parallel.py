"""What the properties cannot see of context parallelism: counts, refusals, and what is not written
to; and what the harness has for packed sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from impl.context_parallel.attention import context_attention
from impl.context_parallel.dropout import ShareDropout
from impl.context_parallel.mask import AttentionMask
from impl.context_parallel.plan import ContextGroups
from impl.context_parallel.zigzag import PackedSequences, chunks_by_rank
from impl.gradients import sum_gradients
from verify.cluster import Cluster, RankFailures, open_cluster
from verify.cluster.history import History
from verify.placement import Shard, ZigzagShard, pieces

B, HEADS, D = 1, 4, 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with open_cluster("sim", world_size=4) as opened:
        yield opened


def attend(tokens: int = 4, *, heads: int = HEADS, kv_heads: int = HEADS, **options) -> Tensor:
    q = torch.ones(tokens, B, heads, D)
    k = v = torch.ones(tokens, B, kv_heads, D)
    given = {"algorithm": "ring", "groups": ContextGroups(cp=dist.group.WORLD), **options}
    return context_attention(q, k, v, **given)


def _counted(algorithm: str, placement: str) -> int:
    seen: list[object] = []
    attend(algorithm=algorithm, placement=placement, on_block=lambda q, k: seen.append((q, k)))
    return len(seen)


@pytest.mark.parametrize("algorithm", ["all_gather", "ring"])
def test_zigzag_gives_every_rank_the_same_number_of_blocks(cluster, algorithm):
    for size in (1, 2, 3, 4):
        counted = cluster.run(_counted, algorithm, "zigzag", world_size=size)
        assert counted == [2 * size + 1] * size
        contiguous = cluster.run(_counted, algorithm, "contiguous", world_size=size)
        assert contiguous == list(range(1, size + 1))


def _generator_moved(algorithm: str) -> tuple[bool, bool]:
    """Whether forward and backward with dropout of shares leave it elsewhere than before them."""
    torch.manual_seed(7 + dist.get_rank())
    start = torch.get_rng_state()
    q = torch.ones(4, B, HEADS, D, requires_grad=True)
    given = {"algorithm": algorithm, "groups": ContextGroups(cp=dist.group.WORLD)}
    out = context_attention(q, q, q, **given, dropout=ShareDropout(0.5))
    between = torch.get_rng_state()
    out.sum().backward()
    return not torch.equal(start, between), not torch.equal(between, torch.get_rng_state())


@pytest.mark.parametrize("algorithm", ["all_gather", "ring", "ulysses"])
def test_backward_draws_masks_again_and_leaves_the_generator_as_it_was(cluster, algorithm):
    found = cluster.run(_generator_moved, algorithm, world_size=2)
    assert found == [(True, False)] * 2


def _written() -> list[bool]:
    group = ContextGroups(cp=dist.group.WORLD)
    tensors = [torch.ones(4, B, HEADS, D, requires_grad=True) for _ in range(3)]
    upstream = torch.ones(4, B, HEADS, D)
    for algorithm in ("all_gather", "ring", "ulysses"):
        context_attention(*tensors, algorithm=algorithm, groups=group).backward(upstream)
    return [bool((t != 1).any()) for t in (*tensors, upstream)]


def test_nothing_that_is_given_is_written_to(cluster):
    assert cluster.run(_written, world_size=2) == [[False] * 4] * 2


def _summed() -> list[object]:
    one, other, unused = (Parameter(torch.zeros(n)) for n in (2, 3, 1))
    for parameter in (one, other):
        parameter.grad = torch.arange(parameter.numel()) + 1.0 * dist.get_rank()
    sum_gradients([one, unused, other], group=dist.group.WORLD)
    return [one.grad.tolist(), other.grad.tolist(), unused.grad]


def test_gradients_are_summed_in_one_all_reduce(cluster):
    history = History()
    found = cluster.run(_summed, world_size=2, history=history)
    assert found == [[[1, 3], [1, 3, 5], None]] * 2
    assert [record.operation for record in history.of(0)] == ["all_reduce"]


def lengths(cumulative: list[int], padded: list[int] | None = None) -> PackedSequences:
    given = None if padded is None else torch.tensor(padded)
    return PackedSequences.from_cumulative(torch.tensor(cumulative), given)


def _unlike(k: tuple[int, ...], v: tuple[int, ...]) -> Tensor:
    groups = ContextGroups(cp=dist.group.WORLD)
    tensors = [torch.ones(shape) for shape in ((4, B, HEADS, D), k, v)]
    return context_attention(*tensors, algorithm="ring", groups=groups)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "features": (
        lambda: _unlike((4, B, HEADS, D + 1), (4, B, HEADS, D)),
        "k [4, 1, 4, 3], v [4, 1, 4, 2]: give [sequence, batch, heads, d]",
    ),
    "tokens": (
        lambda: _unlike((4, B, HEADS, D), (3, B, HEADS, D)),
        "v [3, 1, 4, 2]: sequence, batch and kv heads",
    ),
    "heads": (lambda: attend(heads=3, kv_heads=2), "kv_heads: 2 do not divide the 3 heads"),
    "dropout": (lambda: ShareDropout(1.0), "dropout: 1.0 is not a probability"),
    "zigzag": (lambda: attend(3), "sequence: 6 does not divide into the 4 chunks of zigzag"),
    "algorithm": (lambda: attend(algorithm="star"), "'star' is not one of all_gather, ring"),
    "placement": (lambda: attend(placement="striped"), "'striped' is not one of contiguous"),
    "mask": (lambda: attend(mask=AttentionMask("none")), "'none' is not one of causal, full"),
    "window": (lambda: AttentionMask("full", 2), "window: 2 does not go with mask=full"),
    "no window": (lambda: AttentionMask("sliding_window"), "window: None does not go with"),
    "shared": (
        lambda: attend(algorithm="ulysses", heads=3, kv_heads=1),
        "algorithm: ulysses shares 3 heads out to 2 ranks",
    ),
    "levels": (
        lambda: attend(algorithm="hierarchical"),
        "algorithm: hierarchical needs two levels of cp=2, got 0",
    ),
    "total": (
        lambda: attend(packed=lengths([0, 4])),
        "cu_seqlens_padded: ends at 4, the sequence is 8 long on 2 ranks",
    ),
    "packed": (
        lambda: attend(packed=lengths([0, 3, 8])),
        "sequence: 3 does not divide into the 4 chunks",
    ),
    "padding": (lambda: lengths([0, 5], [0, 4]), "a sequence of 5 tokens in 4 places"),
    "marks": (
        lambda: attend(padding=torch.zeros(4, B, dtype=torch.bool)),
        "padding: [4, 1] torch.bool does not mark the tokens of q [4, 1, 4, 2]; give bool [1, 4]",
    ),
    "marks that are numbers": (
        lambda: attend(padding=torch.zeros(B, 4)),
        "padding: [1, 4] torch.float32 does not mark",
    ),
    "sink": (
        lambda: attend(sink=torch.zeros(2)),
        "sink: [2] are not one for each of the 4 heads of q",
    ),
    "slopes": (
        lambda: attend(slopes=torch.zeros(8)),
        "slopes: [8] are not one for each of the 4 heads of q",
    ),
    "layer": (lambda: attend(layer_number=0), "layer_number: 0 is below 1; layers count from 1"),
    "count": (lambda: lengths([0, 4], [0, 4, 8]), "cu_seqlens: 1 sequences"),
    "start": (lambda: lengths([1, 4]), "cu_seqlens: [1, 4] are not cumulative lengths"),
}


def _refused(name: str) -> None:
    REFUSED[name][0]()


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_by_every_rank_before_any_communication(cluster, name):
    history = History()
    with pytest.raises(RankFailures) as caught:
        cluster.run(_refused, name, world_size=2, history=history)
    assert [(f.rank, f.kind) for f in caught.value.failures] == [
        (0, "ValueError"),
        (1, "ValueError"),
    ]
    for failure in caught.value.failures:
        assert REFUSED[name][1] in failure.message
        assert "\n" not in failure.message
    assert not history.records


def _levels_of_others() -> None:
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    groups = ContextGroups(cp=dist.group.WORLD, levels=(alone, alone))
    q = torch.ones(4, B, HEADS, D)
    context_attention(q, q, q, algorithm="hierarchical", groups=groups)


def test_levels_of_another_group_are_refused_where_they_show(cluster):
    with pytest.raises(RankFailures, match="rank 1 of cp is rank 0 by its levels"):
        cluster.run(_levels_of_others, world_size=2)


@pytest.mark.parametrize(("placement", "cut"), [("zigzag", ZigzagShard), ("contiguous", Shard)])
def test_the_harness_and_impl_cut_packed_sequences_alike(placement, cut):
    packed = PackedSequences((3, 8, 1), (4, 8, 4))
    for size in (1, 2):
        found = pieces(16, cut(0, lengths=packed.padded_lengths), size)
        for chunks, slices in zip(
            chunks_by_rank(packed, size=size, placement=placement), found, strict=True
        ):
            starts = [(0, 4, 12)[c.sequence] + c.position for c in chunks]
            assert [(s.start, s.stop - s.start) for s in slices] == [
                (start, c.length) for start, c in zip(starts, chunks, strict=True)
            ]


def test_a_dimension_has_the_length_of_what_it_is_packed_with():
    with pytest.raises(ValueError, match="9 is not packed with sequences of \\[4, 4\\]"):
        pieces(9, Shard(0, lengths=(4, 4)), 2)
