"""The self-attention block split over tp by heads: q, k and v of one projection, attention, another
projection.

Section 3 of arXiv:1909.08053, with the packed weight of Megatron-LM; with sequence parallelism
section 4.2 of arXiv:2205.05198.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.nn import functional as F

from verify.case import Case
from verify.oracle.attention import (
    SCORING,
    Scoring,
    attend,
    check_groups,
    dropout_of_shares,
    padding_input,
    scoring,
    sink_of,
)
from verify.oracle.attention_block import (
    IN_BLOCKS,
    check_rotary,
    in_norm,
    norm_weights,
    positioned,
)
from verify.oracle.contract import Contract, Step, Tensors, TensorSpec
from verify.oracle.terms import known_options, sizes, switches
from verify.placement import Placements, Replicate, Shard


def self_attention(case: Case) -> Contract:
    """y = proj(attention(q, k, v)) of x [sequence, batch, hidden], with q, k, v = qkv(x).

    qkv.weight [(heads + 2 groups) head_size, hidden] and qkv.bias Shard(0) over tp: of each group
    its queries, its key, its value. proj.weight [hidden, heads head_size] Shard(1), proj.bias
    Replicate; core.sink [heads] Shard(0). x, y and both gradients Replicate, or Shard(0) with
    sequence parallelism. Communicates as a column and a row linear; with fewer groups than ranks
    the products of x with qkv are all-gathered besides, and their gradients reduce-scattered.

    Option `norm`: each head of q and of k is normalised first, with weights [head_size] of
    query_norm and key_norm, Replicate, whose gradients are sums over the ranks. `rotary`: both are
    turned by position then, with `interleaved` in pairs of neighbours.
    """
    known_options(case, "bias", *IN_BLOCKS, *SCORING)
    given, biased = scoring(case), switches(case, {"bias": True})["bias"]
    names = ("sequence", "batch", "hidden", "heads", "groups", "head_size")
    sequence, batch, hidden, heads, groups, size = sizes(case, *names)
    check_groups(case)
    placed: Placements = {"tp": Shard(0) if case.layout.sequence_parallel else Replicate()}
    x = TensorSpec((sequence, batch, hidden), placed, placed)
    rows = (heads + 2 * groups) * size
    weights = {"qkv.weight": (rows, hidden), "proj.weight": (hidden, heads * size)}
    biases = {"qkv.bias": (rows,), "proj.bias": (hidden,)} if biased else {}
    norms = norm_weights(case, {"query_norm": size, "key_norm": size})
    check_rotary(case, size)
    forward, backward = _communication(case)
    partial = sum(n for (n,) in norms.values())
    partial += hidden if biased and case.layout.sequence_parallel else 0
    return Contract(
        inputs={"x": x, **padding_input(given, batch, sequence)},
        parameters={**weights, **biases, **norms, **sink_of(given, heads)},
        outputs={"y": x},
        reference=lambda inputs, parameters: _reference(inputs, parameters, case, given),
        divided=_divided(case, rows),
        masks=dropout_of_shares(given, batch, heads, sequence, sequence),
        forward=forward,
        backward=backward,
        finish=(Step("all_reduce", "tp", partial),),
        kept=None if norms or case.options.get("rotary") else _kept(case, given),
    )


def _reference(inputs: Tensors, parameters: Tensors, case: Case, given: Scoring) -> Tensors:
    groups, size = case.shape["groups"], case.shape["head_size"]
    qkv = F.linear(inputs["x"], parameters["qkv.weight"], parameters.get("qkv.bias"))
    by_group = qkv.unflatten(-1, (groups, -1, size))
    q, k = by_group[..., :-2, :].flatten(2, 3), by_group[..., -2, :]
    q = positioned(case, in_norm(case, q, parameters, "query_norm"))
    k = positioned(case, in_norm(case, k, parameters, "key_norm"))
    out = attend(
        q,
        k,
        by_group[..., -1, :],
        given,
        padding=inputs.get("padding"),
        sink=parameters.get("core.sink"),
        kept=inputs.get("shares"),
    )
    return {"y": F.linear(out.flatten(2), parameters["proj.weight"], parameters.get("proj.bias"))}


def _divided(case: Case, rows: int) -> Mapping[str, int]:
    """What the ranks share out: heads; groups, unless every rank has part of one; rows of qkv."""
    heads, groups, tp = case.shape["heads"], case.shape["groups"], case.layout.tp
    whole = {} if tp % groups == 0 else {"groups": groups}
    return {"heads": heads, **whole, "(heads + 2 groups) head_size": rows}


def _communication(case: Case) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """Forward and backward: that of the two linear layers, and of groups that ranks share."""
    shape, tp = case.shape, case.layout.tp
    whole = shape["sequence"] * shape["batch"] * shape["hidden"]
    gather, scatter = Step("all_gather", "tp", whole // tp), Step("reduce_scatter", "tp", whole)
    forward = backward = [Step("all_reduce", "tp", whole)]
    if case.layout.sequence_parallel:
        # The input is gathered again for the gradient of the weight, so that it need not be kept.
        forward, backward = [gather, scatter], [gather, gather, scatter]
    if shape["groups"] < tp:
        rows = (shape["heads"] + 2 * shape["groups"]) * shape["head_size"]
        products = shape["sequence"] * shape["batch"] * rows
        forward = [*forward, Step("all_gather", "tp", products // tp)]
        backward = [*backward, Step("reduce_scatter", "tp", products)]
    return tuple(forward), tuple(backward)


def _kept(case: Case, given: Scoring) -> int:
    """The elements of equation 2 of arXiv:2205.05198 for this block: x, q, k, v, shares and what
    proj is given; over tp all of them but x, and x too under sequence parallelism. Shares are kept
    as the softmax gives them and as they are multiplied with v, and so is a dropout's mask; and of
    every query, whether it may attend to anything."""
    shape, tp = case.shape, case.layout.tp
    tokens = shape["sequence"] * shape["batch"]
    heads, groups = shape["heads"] // tp, max(shape["groups"] // tp, 1)
    x = tokens * shape["hidden"] // (tp if case.layout.sequence_parallel else 1)
    heads_kept = tokens * (2 * heads + 2 * groups) * shape["head_size"]
    copies = 3 if given.dropout else 1 + (case.dtype in ("bfloat16", "float16"))
    shares = tokens * heads * (copies * shape["sequence"] + given.sink)
    return x + heads_kept + shares + tokens
