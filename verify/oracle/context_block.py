"""A layer of self-attention under tensor, sequence and context parallelism together."""

from __future__ import annotations

from torch.nn import functional as F

from verify.case import Case
from verify.oracle.context import attention_costs, attention_mask, whole_sequence
from verify.oracle.context_costs import Costs, Volume
from verify.oracle.context_shares import plain_attention
from verify.oracle.contract import Contract, Step, Tensors, TensorSpec
from verify.oracle.terms import known_options, sizes, switches
from verify.placement import Placements, Replicate, Shard

OPTIONS = ("algorithm", "placement", "mask", "window", "bias")


def context_attention_block(case: Case) -> Contract:
    """y = proj(context_attention(qkv(x))), x and y [sequence, batch, hidden].

    They are ZigzagShard(0) or Shard(0) over cp and Replicate over tp; with sequence parallelism a
    rank's chunks are Shard(0) over tp. qkv.weight [(heads + 2 kv_heads) head_dim, hidden] Shard(0)
    has the rows of one kv head after the other: its queries, its key, its value. proj.weight
    [hidden, heads head_dim] Shard(1), proj.bias Replicate over tp. Gradients of parameters are
    complete after finish_gradients, over cp too.

    Communicates what the algorithm does over cp, and over tp, around each of the two layers, an
    all-reduce of the activations in one direction; with sequence parallelism an all-gather in one
    direction and a reduce-scatter in the other (arXiv:2205.05198, figure 5), and once more the
    all-gather of the input for the gradient of the weights.
    """
    known_options(case, *OPTIONS)
    names = ("sequence", "batch", "hidden", "heads", "kv_heads", "head_dim")
    sequence, batch, hidden, heads, kv_heads, dim = sizes(case, *names)
    bias = switches(case, {"bias": True})["bias"]
    cut, allowed = whole_sequence(case, sequence, attention_mask(case))
    costs = attention_costs(case, Volume(sequence, batch, heads, kv_heads, dim, dim))
    over_tp = Shard(0) if case.layout.sequence_parallel else Replicate()
    placed: Placements = {"cp": cut, "tp": over_tp}

    def reference(inputs: Tensors, parameters: Tensors) -> Tensors:
        qkv = F.linear(inputs["x"], parameters["qkv.weight"], parameters.get("qkv.bias"))
        parts = qkv.unflatten(-1, (kv_heads, heads // kv_heads + 2, dim))
        q, k, v = parts.split((heads // kv_heads, 1, 1), dim=3)
        q, k, v = (part.flatten(2, 3) for part in (q, k, v))
        out = plain_attention(q, k, v, allowed=allowed, factor=dim**-0.5).flatten(2)
        return {"y": F.linear(out, parameters["proj.weight"], parameters.get("proj.bias"))}

    rows = (heads + 2 * kv_heads) * dim
    weights = {"qkv.weight": (rows, hidden), "proj.weight": (hidden, heads * dim)}
    biases = {"qkv.bias": (rows,), "proj.bias": (hidden,)} if bias else {}
    shape = (sequence, batch, hidden)
    forward, backward, finish = _steps(case, costs, shape, rows, bias)
    return Contract(
        inputs={"x": TensorSpec(shape, placed, placed)},
        parameters={**weights, **biases},
        outputs={"y": TensorSpec(shape, placed, placed)},
        reference=reference,
        axes=("tp", "cp"),
        divided={"kv_heads": kv_heads},
        over={"kv_heads": ("tp",)},
        forward=forward,
        backward=backward,
        finish=finish,
        kept=_kept(case, costs, sequence * batch * hidden),
    )


def _steps(
    case: Case, costs: Costs, shape: tuple[int, int, int], rows: int, bias: bool
) -> tuple[tuple[Step, ...], ...]:
    """Forward, backward, and the sums of gradients: all over cp, and that of proj.bias over tp."""
    layout, (sequence, batch, hidden) = case.layout, shape
    whole = sequence * batch * hidden // layout.cp
    gather = Step("all_gather", "tp", whole // layout.tp)
    scatter, reduce = Step("reduce_scatter", "tp", whole), Step("all_reduce", "tp", whole)
    parameters = rows * (hidden + bias) + hidden * costs.volume.heads * costs.volume.dim
    finish = [Step("all_reduce", "cp", parameters // layout.tp + hidden * bias)]
    if not layout.sequence_parallel:
        return (*costs.forward, reduce), (*costs.backward, reduce), tuple(finish)
    finish += [Step("all_reduce", "tp", hidden)] if bias else []
    backward = (gather, *costs.backward, gather, scatter)
    return (gather, *costs.forward, scatter), backward, tuple(finish)


def _kept(case: Case, costs: Costs, elements: int) -> int:
    """Beside the attention's own, the input of qkv, and that of proj where it is another tensor
    than the attention's output, because heads were exchanged."""
    layout = case.layout
    shares = layout.cp * (layout.tp if layout.sequence_parallel else 1)
    return elements // shares + costs.kept + (costs.out if costs.together > 1 else 0)
