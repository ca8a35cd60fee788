"""Multi-latent attention split over tp by heads: section 2.1 and appendix C of arXiv:2405.04434."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from verify.case import Case
from verify.oracle.attention import (
    SCORING,
    Scoring,
    attend,
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
from verify.oracle.terms import known_options, sizes
from verify.placement import Placements, Replicate, Shard

_SIZES = ("sequence", "batch", "hidden", "heads", "kv_lora", "head_size", "rope_size", "value_size")
_LATENTS = {"query": "q_lora", "kv": "kv_lora"}


def latent_attention(case: Case) -> Contract:
    """y = proj(attention(q, k, v)) of x [sequence, batch, hidden].

    q = q_up(q_down(x)), or q(x) without the size q_lora; of kv_down(x) the last rope_size features
    are a part of every head's key, and kv_up of the others gives each head the rest of its key and
    its value. Weights, without biases: q_down [q_lora, hidden] and kv_down [kv_lora + rope_size,
    hidden] Replicate over tp; q_up or q [heads (head_size + rope_size), ...] and kv_up [heads
    (head_size + value_size), kv_lora] Shard(0); proj [hidden, heads value_size] Shard(1). core.sink
    [heads] Shard(0). x, y and both gradients Replicate, or Shard(0) with sequence parallelism.

    Sums over tp in backward: the gradients of the two latents (of x, where it has no latent of its
    own) and of the shared key; and of y in forward. With sequence parallelism gathers of the former
    and a reduce-scatter of y take their place in forward, the opposite in backward.

    Option `norm`: the latents are normalised, with weights of query_norm and kv_norm, Replicate.
    `rotary`: the last rope_size features of queries, and the shared part of keys, are turned by
    position; with `interleaved` in pairs of neighbours.
    """
    known_options(case, *IN_BLOCKS, *SCORING)
    given = scoring(case)
    sequence, batch, hidden, heads, *_ = sizes(case, *_SIZES, optional=("q_lora",))
    placed: Placements = {"tp": Shard(0) if case.layout.sequence_parallel else Replicate()}
    x = TensorSpec((sequence, batch, hidden), placed, placed)
    check_rotary(case, case.shape["rope_size"])
    ranks = {f"{n}_norm": case.shape[r] for n, r in _LATENTS.items() if r in case.shape}
    norms = norm_weights(case, ranks)
    forward, backward = latent_steps(case, sequence * batch)
    partial = _replicated(case) + sum(n for (n,) in norms.values())
    return Contract(
        inputs={"x": x, **padding_input(given, batch, sequence)},
        parameters={**latent_weights(case), **norms, **sink_of(given, heads)},
        outputs={"y": x},
        reference=lambda inputs, parameters: _reference(inputs, parameters, case, given),
        divided={"heads": heads},
        masks=dropout_of_shares(given, batch, heads, sequence, sequence),
        forward=forward,
        backward=backward,
        finish=(Step("all_reduce", "tp", partial),) if case.layout.sequence_parallel else (),
    )


def latent_weights(case: Case) -> dict[str, tuple[int, ...]]:
    """The full shapes of the weights, by their names without a prefix."""
    hidden, heads, latent = case.shape["hidden"], case.shape["heads"], case.shape["kv_lora"]
    size, rope, value = (case.shape[f"{part}_size"] for part in ("head", "rope", "value"))
    rows, inner = heads * (size + rope), case.shape.get("q_lora")
    queries = {"q.weight": (rows, hidden)}
    if inner is not None:
        queries = {"q_down.weight": (inner, hidden), "q_up.weight": (rows, inner)}
    return {
        **queries,
        "kv_down.weight": (latent + rope, hidden),
        "kv_up.weight": (heads * (size + value), latent),
        "proj.weight": (hidden, heads * value),
    }


def _reference(inputs: Tensors, parameters: Tensors, case: Case, given: Scoring) -> Tensors:
    q, k, v = latent_heads(
        inputs["x"],
        parameters,
        case,
        normal=lambda x, name: in_norm(case, x, parameters, name),
        turned=lambda x: positioned(case, x),
    )
    out = attend(
        q,
        k,
        v,
        given,
        padding=inputs.get("padding"),
        sink=parameters.get("core.sink"),
        kept=inputs.get("shares"),
    )
    return {"y": F.linear(out.flatten(2), parameters["proj.weight"])}


def latent_heads(
    x: Tensor,
    parameters: Tensors,
    case: Case,
    *,
    normal: Callable[[Tensor, str], Tensor],
    turned: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k [sequence, batch, heads, head_size + rope_size], v [sequence, batch, heads,
    value_size] of x. `normal` normalises the latent of the norm that it is given the name of,
    `turned` what has positions."""
    heads, rope, size = (case.shape[name] for name in ("heads", "rope_size", "head_size"))
    q = x
    if "q_lora" in case.shape:
        q = normal(F.linear(x, parameters["q_down.weight"]), "query_norm")
    q = F.linear(q, parameters["q_up.weight" if "q_lora" in case.shape else "q.weight"])
    q = q.unflatten(-1, (heads, -1))
    down = F.linear(x, parameters["kv_down.weight"])
    latent = normal(down[..., :-rope], "kv_norm")
    up = F.linear(latent, parameters["kv_up.weight"]).unflatten(-1, (heads, -1))
    shared = turned(down[..., None, -rope:]).repeat_interleave(heads, dim=2)
    q = torch.cat((q[..., :size], turned(q[..., size:])), -1)
    return q, torch.cat((up[..., :size], shared), -1), up[..., size:]


def _replicated(case: Case) -> int:
    """The elements of the weights that every rank has."""
    shape = case.shape
    return (shape.get("q_lora", 0) + shape["kv_lora"] + shape["rope_size"]) * shape["hidden"]


def latent_steps(case: Case, tokens: int) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """Forward and backward of so many tokens: what DeepSeek-V2's narrow latents cost instead of
    x."""
    shape, tp = case.shape, case.layout.tp
    whole, shared = tokens * shape["hidden"], tokens * shape["rope_size"]
    latents = [tokens * shape.get("q_lora", shape["hidden"]), tokens * shape["kv_lora"]]
    if not case.layout.sequence_parallel:
        summed = tuple(Step("all_reduce", "tp", size) for size in (*latents, shared))
        return (Step("all_reduce", "tp", whole),), summed
    gathered = [Step("all_gather", "tp", size // tp) for size in latents]
    scattered = [Step("reduce_scatter", "tp", size) for size in (*latents, shared)]
    last = Step("reduce_scatter", "tp", whole)
    first = Step("all_gather", "tp", shared // tp)
    return (*gathered, first, last), (Step("all_gather", "tp", whole // tp), *gathered, *scattered)
