"""A transformer layer under tensor, sequence and context parallelism.

Put together from the contracts of its parts: see `verify.oracle.layer`. Figure 5 of
arXiv:2205.05198 for what is split over tp and how it is communicated; attention as in
`context_attention`.
"""

from __future__ import annotations

from verify.case import Case
from verify.oracle.context import (
    PLACEMENTS,
    Sequences,
    attention_costs,
    attention_mask,
    dropout_of_shares,
    sequences_of,
)
from verify.oracle.context_costs import Costs, Volume
from verify.oracle.contract import Contract, Mask, Step, Tensors, TensorSpec
from verify.oracle.dropout import dropped
from verify.oracle.latent_attention import latent_steps
from verify.oracle.layer import Layer, attention_of
from verify.oracle.mlp import mlp_kept, mlp_of, mlp_steps
from verify.oracle.terms import exclude, one_of
from verify.placement import Placements, Replicate, Shard


def transformer_layer(case: Case) -> Contract:
    """x, y [sequence, batch, hidden] and gradients ZigzagShard(0) or Shard(0) over cp; over tp
    Replicate, or with sequence parallelism Shard(0) of a rank's chunks.

    Parameters `input_norm`, `mlp_norm`, `attention.query_norm` and `attention.key_norm` (qk_norm)
    as of `norm` and `qk_norm`; `attention.qkv` and `attention.proj` as of `self_attention`, or,
    with the sizes of latents, `attention` as of `latent_attention`; `attention.core.sink`; and
    `mlp.fc1` and `mlp.fc2` as of `tp_mlp`, a gate packed. Gradients are complete after
    finish_gradients.

    Options: norm (layer, rms) and zero_centered; rotary_dim, the features of a head that are turned
    (None: none), and interleaved; those of `context_attention`; hidden_dropout after attention and
    after the perceptron, attention_dropout of shares, and without training neither; recompute full,
    full_distributed (each rank of tp keeps its part of the input) or selective (core attention).

    Communicates and keeps what its parts do; in backward once more what is computed again.

    Raises BadArgument as the parts do.
    """
    layer = Layer.of(case)
    sequence, batch, hidden = shape = (
        case.shape["sequence"],
        case.shape["batch"],
        case.shape["hidden"],
    )
    heads, groups = case.shape["heads"], case.shape["groups"]
    placement = one_of(case, "placement", PLACEMENTS)
    sequences, tp = sequences_of(case, sequence, placement), case.layout.tp
    mask = attention_mask(case)
    # Where groups are shared by ranks, each has a copy of one.
    costs = attention_costs(case, _volume(layer, max(groups, tp)))
    over_tp = Shard(0) if case.layout.sequence_parallel else Replicate()
    placed: Placements = {"cp": sequences.cut(placement), "tp": over_tp}
    masks = {}
    if p := layer.attention_dropout:
        masks["shares"] = dropout_of_shares(case, heads, sequences.cut(placement), p)
    if p := layer.hidden_dropout:
        masks |= {name: Mask(shape, placed, p) for name in ("attended", "fed")}
    spec, divided = TensorSpec(shape, placed, placed), {"heads": heads, "ffn": case.shape["ffn"]}
    if not layer.latent:
        divided |= {"(heads + 2 groups) head_size": layer.rows}
        divided |= {} if tp % groups == 0 else {"groups": groups}
    _check_distributed(layer, sequence * batch * hidden // case.layout.cp)
    forward, backward = _steps(layer, costs)
    return Contract(
        axes=("tp", "cp"),
        inputs={"x": spec, **sequences.inputs, **layer.shares.inputs(sequences.cut(placement))},
        parameters=layer.parameters,
        outputs={"y": spec},
        reference=lambda inputs, given: _reference(inputs, given, layer, sequences, mask),
        divided=divided,
        over=dict.fromkeys(divided, ("tp",)),
        masks=masks,
        forward=forward,
        backward=backward,
        finish=_finish(layer),
        kept=_kept(layer, costs, sequence * batch * hidden),
    )


def _reference(
    inputs: Tensors,
    parameters: Tensors,
    layer: Layer,
    sequences: Sequences,
    mask: tuple[str, int | None],
) -> Tensors:
    x, p = inputs["x"], layer.hidden_dropout
    normal = layer.normalised(x, parameters, "input_norm.")
    out = attention_of(normal, inputs, parameters, layer, sequences, mask)
    h = x + dropped(out, inputs.get("attended"), p)
    fed = mlp_of(layer.normalised(h, parameters, "mlp_norm."), parameters, "mlp.", layer.activation)
    return {"y": h + dropped(fed, inputs.get("fed"), p)}


def _volume(layer: Layer, kv_heads: int) -> Volume:
    shape = layer.case.shape
    sizes = shape["sequence"], shape["batch"], shape["heads"]
    return Volume(*sizes, kv_heads, layer.key_size, layer.value_size)


def _check_distributed(layer: Layer, elements: int) -> None:
    """An input of so many elements on a rank of cp can be shared out, if that is asked for."""
    layout, wanted = layer.case.layout, layer.recompute
    if wanted != "full_distributed":
        return
    if layout.sequence_parallel:
        exclude(
            layer.case, "recompute", wanted, why="sequence parallelism splits the input already"
        )
    if elements % layout.tp:
        exclude(layer.case, "recompute", wanted, why=f"{elements} elements do not divide by tp")


def _steps(layer: Layer, costs: Costs) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """The pair of linears around attention, attention, and the pair of the perceptron."""
    layout, shape = layer.case.layout, layer.case.shape
    tokens = shape["sequence"] * shape["batch"] // layout.cp
    fed, back = mlp_steps(layer.case, tokens * shape["hidden"])
    around, back_around = latent_steps(layer.case, tokens) if layer.latent else (fed, back)
    core = costs.forward + layer.shares.forward
    forward = (*around, *core, *fed)
    backward = (*back_around, *costs.backward, *back)
    if shape["groups"] < layout.tp:
        forward += (Step("all_gather", "tp", tokens * layer.rows // layout.tp),)
        backward += (Step("reduce_scatter", "tp", tokens * layer.rows),)
    gather = Step("all_gather", "tp", tokens * shape["hidden"] // layout.tp)
    again = {"full": forward, "full_distributed": (*forward, gather), "selective": core}
    return forward, backward + again.get(layer.recompute, ())


def _finish(layer: Layer) -> tuple[Step, ...]:
    """Sums of gradients: over tp of norms of heads, with sequence parallelism of all that is
    replicated; over cp of all."""
    summed, mine = layer.summed(sequence_parallel=layer.case.layout.sequence_parallel)
    return Step("all_reduce", "tp", summed), Step("all_reduce", "cp", mine)


def _kept(layer: Layer, costs: Costs, elements: int) -> int | None:
    """With full recomputation the input and a rank's marks of padding. Else: the inputs of the
    norms with their statistics, those of qkv and of fc1, what attention keeps, all marks, the
    tables of the rotation, and the perceptron inside.

    With selective recomputation attention's inputs and output, of which v may lie in the packed
    product. Nothing is promised of masks, of latents, and of queries and keys that are normalised
    or gathered.
    """
    case, layout = layer.case, layer.case.layout
    part = elements // (layout.cp * (layout.tp if layout.sequence_parallel else 1))
    marks = layer.shares.marks
    if layer.recompute.startswith("full"):
        distributed = layer.recompute == "full_distributed"
        return part // (layout.tp if distributed else 1) + marks // layout.cp
    if layer.hidden_dropout or layer.qk_norm or layer.latent:
        return None
    if case.shape["groups"] < layout.tp:
        return None
    tokens = case.shape["sequence"] // layout.cp
    statistics = 2 * (2 if layer.norm == "layer" else 1) * part // case.shape["hidden"]
    heads = costs.kept + (costs.out if costs.together > 1 else 0)
    packed = costs.q + costs.k if layer.rotary_dim is not None else 0
    if layer.recompute == "selective":
        heads = costs.q + costs.k + costs.v + costs.out + packed
        marks //= layout.cp
    elif tokens * case.shape["batch"] == 1:
        # One token of v is no copy of its part of the product, which is kept with it.
        heads += packed
    tables = tokens * (layer.rotary_dim or 0)
    inside = tokens * case.shape["batch"] * mlp_kept(case)
    return 4 * part + statistics + heads + marks + tables + inside
