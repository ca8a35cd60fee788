"""What the properties cannot see of impl: what it keeps, what it sends, what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.init import constant_, zeros_

from impl import mappings
from impl.cross_entropy import vocab_parallel_cross_entropy
from impl.embedding import VocabParallelEmbedding
from impl.gradients import finish_sequence_parallel_gradients
from impl.linear import ColumnParallelLinear, RowParallelLinear
from impl.linear_cross_entropy import linear_cross_entropy
from impl.mlp import MLP
from impl.norm import LayerNorm, RMSNorm
from impl.parameters import defer, replicated_parameter, sharded_parameter
from verify.cluster import Cluster, RankFailures, open_cluster
from verify.cluster.history import History

S, B, H, F, V = 6, 2, 4, 8, 12


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with open_cluster("sim", world_size=3) as opened:
        yield opened


def world() -> dist.ProcessGroup:
    return dist.group.WORLD


def arange(parameter: Tensor) -> None:
    parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape))


def saved(compute: Callable[[], object]) -> list[tuple[str, list[int]]]:
    """Dtype and shape of what a computation keeps for backward, parameters left out."""
    kept: list[tuple[str, list[int]]] = []

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept.append((str(tensor.dtype).removeprefix("torch."), list(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return kept


def column(**options) -> ColumnParallelLinear:
    return ColumnParallelLinear(H, out_features=F, group=world(), init=zeros_, **options)


def _kept_by_column(sequence_parallel: bool, frozen: bool) -> object:
    layer = column(sequence_parallel=sequence_parallel)
    layer.weight.requires_grad_(not frozen)
    x = torch.ones(S // (2 if sequence_parallel else 1), B, H, requires_grad=True)
    return saved(lambda: layer(x))


@pytest.mark.parametrize(
    ("sequence_parallel", "frozen", "kept"),
    [
        (False, False, [("float32", [S, B, H])]),
        (True, False, [("float32", [S // 2, B, H])]),
        (False, True, []),
        (True, True, []),
    ],
)
def test_column_linear_keeps_its_own_part_of_the_input(cluster, sequence_parallel, frozen, kept):
    assert cluster.run(_kept_by_column, sequence_parallel, frozen, world_size=2) == [kept] * 2


def _kept_by_loss() -> object:
    logits = torch.ones(S, B, V // 2, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(S, B, dtype=torch.int64)
    return saved(lambda: vocab_parallel_cross_entropy(logits, targets=targets, group=world()))


def test_cross_entropy_keeps_the_logits_in_their_dtype_and_two_numbers_a_token(cluster):
    number = ("float32", [S, B])
    kept = [("bfloat16", [S, B, V // 2]), ("int64", [S, B]), number, number]
    assert cluster.run(_kept_by_loss, world_size=2) == [kept] * 2


def _mlp(sequence_parallel: bool) -> None:
    mlp = MLP(H, ffn=F, group=world(), init=zeros_, sequence_parallel=sequence_parallel)
    part = world().size() if sequence_parallel else 1
    x = torch.ones(S // part, B, H, requires_grad=True)
    mlp(x).sum().backward()
    finish_sequence_parallel_gradients(mlp.parameters(), group=world())


def _embedding(scatter: bool) -> None:
    layer = VocabParallelEmbedding(
        V,
        hidden=H,
        group=world(),
        init=zeros_,
        sequence_parallel=scatter,
        scatter_to_sequence=scatter,
    )
    layer(torch.zeros(B, S, dtype=torch.int64)).sum().backward()


def _loss(label_smoothing: float) -> None:
    logits = torch.ones(S, B, V // world().size(), requires_grad=True)
    targets = torch.zeros(S, B, dtype=torch.int64)
    vocab_parallel_cross_entropy(
        logits, targets=targets, group=world(), label_smoothing=label_smoothing
    ).sum().backward()


X, X_PART = f"float32 [{S}, {B}, {H}]", f"float32 [{S // 2}, {B}, {H}]"
ISSUED = [
    (_mlp, False, [("all_reduce", X)] * 2),
    (
        _mlp,
        True,
        [
            ("all_gather_into_tensor", X_PART),
            ("reduce_scatter_tensor", X),
            ("all_gather_into_tensor", X_PART),
            ("all_gather_into_tensor", X_PART),
            ("reduce_scatter_tensor", X),
            ("all_reduce", f"float32 [{H}]"),
        ],
    ),
    (_embedding, False, [("all_reduce", f"float32 [{B}, {S}, {H}]")]),
    (_embedding, True, [("reduce_scatter_tensor", X), ("all_gather_into_tensor", X_PART)]),
    (_loss, 0.0, [("all_reduce", f"float32 [{S}, {B}]"), ("all_reduce", f"float32 [2, {S}, {B}]")]),
    (_loss, 0.1, [("all_reduce", f"float32 [{S}, {B}]"), ("all_reduce", f"float32 [3, {S}, {B}]")]),
]


@pytest.mark.parametrize(("program", "option", "issued"), ISSUED)
def test_collectives(cluster, program, option, issued):
    history = History()
    cluster.run(program, option, world_size=2, history=history)
    for rank in range(2):
        assert [(r.operation, r.tensors[0]) for r in history.of(rank)] == issued
    alone = History()
    cluster.run(program, option, world_size=1, history=alone)
    assert not alone.records


def _written() -> list[bool]:
    """Whether anything that is given in is written to."""
    x = torch.ones(S, B, H, requires_grad=True)
    upstream = torch.ones(S, B, H)
    mappings.reduce_from_tensor_parallel_region(x, group=world())
    mappings.copy_to_tensor_parallel_region(x, group=world()).backward(upstream)
    logits = torch.ones(S, B, V // 2, requires_grad=True)
    targets = torch.full((S, B), -100)
    loss = vocab_parallel_cross_entropy(logits, targets=targets, group=world(), real_vocabulary=1)
    loss.sum().backward()
    return [bool((t != 1).any()) for t in (x, upstream, logits)] + [bool((targets != -100).any())]


def test_nothing_that_is_given_is_written_to(cluster):
    assert cluster.run(_written, world_size=2) == [[False] * 4] * 2


def _finish() -> list[list[float]]:
    one, other = (replicated_parameter(n, init=zeros_, sequence_parallel=True) for n in (2, 3))
    narrow = replicated_parameter(1, init=zeros_, sequence_parallel=True, dtype=torch.bfloat16)
    complete, unused = (
        replicated_parameter(1, init=zeros_, sequence_parallel=False) for _ in range(2)
    )
    parameters = [one, complete, unused, narrow, other]
    rank = dist.get_rank()
    for parameter in (one, complete, narrow, other):
        parameter.grad = torch.arange(parameter.numel(), dtype=parameter.dtype) + rank
    finish_sequence_parallel_gradients(parameters, group=world())
    return [p.grad.tolist() for p in (one, complete, narrow, other)] + [[unused.grad is None]]


def test_only_marked_gradients_are_summed(cluster):
    assert cluster.run(_finish, world_size=2) == [
        [[1, 3], [rank], [1], [1, 3, 5], [True]] for rank in range(2)
    ]


def _parameters() -> tuple[list[list[float]], list[object]]:
    weight = sharded_parameter(6, 2, dim=0, name="rows", group=world(), init=arange)
    names = ("tensor_model_parallel", "partition_dim", "partition_stride")
    return weight.tolist(), [getattr(weight, name) for name in names]


def test_initial_values_do_not_depend_on_the_number_of_ranks(cluster):
    ((whole, marks),) = cluster.run(_parameters, world_size=1)
    assert marks == [True, 0, 1]
    for size in (2, 3):
        parts = cluster.run(_parameters, world_size=size)
        assert [row for part, _ in parts for row in part] == whole


def _blocks(init) -> tuple[list[float], int]:
    weight = sharded_parameter(8, dim=0, name="rows", group=world(), init=init, stride=2)
    return weight.tolist(), weight.partition_stride


def test_a_parameter_of_blocks_is_a_part_of_each(cluster):
    assert cluster.run(_blocks, arange, world_size=2) == [([0, 1, 4, 5], 2), ([2, 3, 6, 7], 2)]
    deferred = cluster.run(_blocks, defer, world_size=2)
    assert [(len(part), stride) for part, stride in deferred] == [(4, 2)] * 2


def _outside() -> tuple[list[bool], bool]:
    logits = torch.zeros(3, V // world().size())
    targets = torch.tensor([0, 10, -1])
    loss = vocab_parallel_cross_entropy(logits, targets=targets, group=world(), real_vocabulary=10)
    layer = VocabParallelEmbedding(V, hidden=H, group=world(), init=lambda t: constant_(t, 1.0))
    return loss.isnan().tolist(), bool(layer(torch.tensor([[-1, V]])).any())


@pytest.mark.parametrize("size", [1, 2])
def test_what_is_no_class_has_a_loss_of_nan_and_an_embedding_of_zeros(cluster, size):
    assert cluster.run(_outside, world_size=size) == [([False, True, True], False)] * size


def _twice() -> None:
    x = torch.ones(S, B, H, requires_grad=True)
    y, _ = column(sequence_parallel=False)(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    gradient.sum().backward()


def test_a_second_derivative_is_refused_not_wrong(cluster):
    with pytest.raises(RankFailures, match="once_differentiable"):
        cluster.run(_twice, world_size=2)


def row(**options) -> RowParallelLinear:
    return RowParallelLinear(F, out_features=H, group=world(), init=zeros_, **options)


def loss(logits: Tensor, **options) -> Tensor:
    targets = options.pop("targets", torch.zeros(logits.shape[:-1], dtype=torch.int64))
    return vocab_parallel_cross_entropy(logits, targets=targets, group=world(), **options)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "features out": (
        lambda: ColumnParallelLinear(
            H, out_features=7, group=world(), init=zeros_, sequence_parallel=False
        ),
        "out_features: 7 does not divide by the 2 ranks of its group; give a positive multiple",
    ),
    "features in": (
        lambda: RowParallelLinear(
            7, out_features=H, group=world(), init=zeros_, sequence_parallel=False
        ),
        "in_features: 7 does not divide by the 2 ranks",
    ),
    "no features": (
        lambda: ColumnParallelLinear(
            H, out_features=0, group=world(), init=zeros_, sequence_parallel=False
        ),
        "out_features: 0 does not divide",
    ),
    "gather": (
        lambda: column(gather_output=True, sequence_parallel=True),
        "gather_output: True is not allowed with sequence_parallel=True",
    ),
    "input": (
        lambda: row(input_is_parallel=False, sequence_parallel=True),
        "input_is_parallel: False is not allowed with sequence_parallel=True",
    ),
    "blocks": (
        lambda: sharded_parameter(8, dim=0, name="rows", group=world(), init=zeros_, stride=3),
        "stride: rows 8 is not 3 equal blocks",
    ),
    "gathered blocks": (
        lambda: column(gather_output=True, stride=2, sequence_parallel=False),
        "gather_output: True is not allowed with 2 blocks",
    ),
    "sequence": (
        lambda: row(sequence_parallel=True)(torch.ones(5, B, F // 2)),
        "x, dimension 0: 5 does not divide",
    ),
    "dimension": (
        lambda: mappings.scatter_to_tensor_parallel_region(torch.ones(S, 3), group=world()),
        "x, dimension 1: 3 does not divide",
    ),
    "exchange": (
        lambda: mappings.all_to_all_sequence_to_hidden(torch.ones(S, B, 3), group=world()),
        "x, dimension 2: 3 does not divide",
    ),
    "tokens": (
        lambda: VocabParallelEmbedding(V, hidden=H, group=world(), init=zeros_)(torch.ones(3)),
        "tokens: [3] is not [batch, sequence]",
    ),
    "targets": (
        lambda: loss(torch.ones(S, B, V), targets=torch.zeros(B, S, dtype=torch.int64)),
        "targets: [2, 6] do not fit logits [6, 2, 12]; give [6, 2]",
    ),
    "targets of a fused loss": (
        lambda: linear_cross_entropy(
            torch.ones(S, B, H),
            weight=torch.ones(V, H),
            targets=torch.zeros(B, S, dtype=torch.int64),
            group=world(),
            chunk=1,
            label_smoothing=0.0,
            z_loss=0.0,
            sequence_parallel=False,
        ),
        "targets: [2, 6] is not [6, 2], the tokens of hidden on all ranks of the group",
    ),
    "vocabulary": (
        lambda: loss(torch.ones(S, B, V), real_vocabulary=25),
        "real_vocabulary: 25 is not within the vocabulary; give 1 to 24",
    ),
    "smoothing": (
        lambda: loss(torch.ones(S, B, V), label_smoothing=1.0),
        "label_smoothing: 1.0 is not in [0, 1)",
    ),
    "features": (
        lambda: LayerNorm(H)(torch.ones(S, B, H + 1)),
        f"x: {[S, B, H + 1]} is not [..., {H}], the features of this norm",
    ),
    "one class": (
        lambda: loss(torch.ones(S, B, V), label_smoothing=0.1, real_vocabulary=1),
        "label_smoothing: 0.1 needs a second class",
    ),
}


def _norms() -> list[list[float]]:
    norms = [LayerNorm(H), RMSNorm(H), LayerNorm(H, zero_centered=True)]
    tokens = torch.arange(float(2 * H)).view(2, H)
    # A norm may be given tokens without a batch.
    same = torch.equal(norms[0](tokens), norms[2](tokens[:, None])[:, 0])
    return [each.tolist() for norm in norms for each in norm.parameters()] + [[float(same)]]


def test_a_norm_begins_with_weights_that_change_nothing(cluster):
    ones, zeros = [1.0] * H, [0.0] * H
    wanted = [ones, zeros, ones, zeros, zeros, [1.0]]
    assert cluster.run(_norms, world_size=1) == [wanted]


def _refused(name: str) -> None:
    REFUSED[name][0]()


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_by_every_rank_before_any_collective(cluster, name):
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
