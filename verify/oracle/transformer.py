"""A transformer layer under tensor, sequence and context parallelism.

    h = x + dropout(attention(norm(x)));   y = h + dropout(mlp(norm(h)))

Put together from the contracts of its parts. Figure 5 of arXiv:2205.05198 for what is split over tp
and how it is communicated; attention as in `context_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor
from torch.nn import functional as F

from verify.case import Case
from verify.oracle.attention import check_groups
from verify.oracle.context import (
    PLACEMENTS,
    Sequences,
    attention_costs,
    attention_mask,
    dropout_of_shares,
    plain_attention,
    sequences_of,
)
from verify.oracle.context_costs import Costs, Volume
from verify.oracle.contract import Contract, Mask, Step, Tensors, TensorSpec
from verify.oracle.dropout import dropped, probability
from verify.oracle.mlp import ACTIVATIONS, mlp_kept, mlp_of, mlp_parameters, mlp_steps
from verify.oracle.norm import KINDS, normalised
from verify.oracle.positions import BASE, positions_of, rotated
from verify.oracle.terms import exclude, known_options, one_of, sizes, switches, whole_number
from verify.placement import Placements, Replicate, Shard

RECOMPUTED = ("", "full", "selective")
OPTIONS = (
    "norm",
    "zero_centered",
    "qk_norm",
    "bias",
    "activation",
    "rotary_dim",
    "interleaved",
    "algorithm",
    "placement",
    "mask",
    "window",
    "packed",
    "hidden_dropout",
    "attention_dropout",
    "recompute",
)
_SIZES = ("sequence", "batch", "hidden", "heads", "groups", "head_size", "ffn")
_SHARDED = ("qkv", "proj.weight", "fc1", "fc2.weight")


@dataclass(frozen=True)
class Layer:
    """The options of a case, checked."""

    case: Case
    norm: str
    zero_centered: bool
    qk_norm: bool
    bias: bool
    activation: str
    rotary_dim: int | None
    interleaved: bool
    hidden_dropout: float
    attention_dropout: float
    recompute: str

    @staticmethod
    def of(case: Case) -> Layer:
        """Raises BadArgument for values that are not allowed, or not together."""
        known_options(case, *OPTIONS)
        sizes(case, *_SIZES)
        check_groups(case)
        names = {"zero_centered": False, "qk_norm": False, "bias": True, "interleaved": False}
        found = Layer(
            case,
            one_of(case, "norm", KINDS),
            activation=one_of(case, "activation", ACTIVATIONS),
            rotary_dim=whole_number(case, "rotary_dim", least=2),
            hidden_dropout=probability(case, "hidden_dropout", 0.0),
            attention_dropout=probability(case, "attention_dropout", 0.0),
            recompute=one_of(case, "recompute", RECOMPUTED),
            **switches(case, names),
        )
        dim = found.rotary_dim
        if dim is not None and (dim % 2 or dim > case.shape["head_size"]):
            exclude(case, "rotary_dim", dim, why="it is odd or exceeds head_size")
        return found

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Full shapes by name."""
        hidden, heads, groups, size = (self.case.shape[name] for name in _SIZES[2:6])
        rows = (heads + 2 * groups) * size
        found = self._norm("input_norm.", hidden)
        found |= {
            "attention.qkv.weight": (rows, hidden),
            "attention.proj.weight": (hidden, heads * size),
        }
        if self.bias:
            found |= {"attention.qkv.bias": (rows,), "attention.proj.bias": (hidden,)}
        if self.qk_norm:
            found |= self._norm("attention.query_norm.", size)
            found |= self._norm("attention.key_norm.", size)
        return {
            **found,
            **self._norm("mlp_norm.", hidden),
            **mlp_parameters(
                "mlp.",
                hidden=hidden,
                ffn=self.case.shape["ffn"],
                activation=self.activation,
                bias=self.bias,
            ),
        }

    def _norm(self, prefix: str, features: int) -> dict[str, tuple[int, ...]]:
        names = ("weight", "bias") if self.norm == "layer" else ("weight",)
        return {f"{prefix}{name}": (features,) for name in names}

    def normalised(self, x: Tensor, parameters: Tensors, prefix: str) -> Tensor:
        """`x` by one of the norms."""
        given = {"kind": self.norm, "zero_centered": self.zero_centered}
        return normalised(x, parameters, prefix, **given)  # type: ignore[arg-type]


def transformer_layer(case: Case) -> Contract:
    """x, y [sequence, batch, hidden] and gradients ZigzagShard(0) or Shard(0) over cp; over tp
    Replicate, or with sequence parallelism Shard(0) of a rank's chunks.

    Parameters `input_norm`, `mlp_norm`, `attention.query_norm` and `attention.key_norm` (qk_norm)
    as of `norm` and `qk_norm`; `attention.qkv` and `attention.proj` as of `self_attention`; and
    `mlp.fc1` and `mlp.fc2` as of `tp_mlp`, a gate packed. Gradients are complete after
    finish_gradients.

    Options: norm (layer, rms) and zero_centered; rotary_dim, the features of a head that are turned
    (None: none), and interleaved; those of attention; hidden_dropout after attention and after the
    perceptron, attention_dropout of shares; recompute full or selective (core attention).

    Communicates and keeps what its parts do; in backward once more what is computed again.

    Raises BadArgument as the parts do.
    """
    layer = Layer.of(case)
    sequence, batch, hidden = shape = (
        case.shape["sequence"],
        case.shape["batch"],
        case.shape["hidden"],
    )
    heads, groups, size = (case.shape[name] for name in ("heads", "groups", "head_size"))
    placement = one_of(case, "placement", PLACEMENTS)
    sequences, tp = sequences_of(case, sequence, placement), case.layout.tp
    mask = attention_mask(case)
    # Where groups are shared by ranks, each has a copy of one.
    costs = attention_costs(case, Volume(sequence, batch, heads, max(groups, tp), size, size))
    over_tp = Shard(0) if case.layout.sequence_parallel else Replicate()
    placed: Placements = {"cp": sequences.cut(placement), "tp": over_tp}
    masks = {}
    if p := layer.attention_dropout:
        masks["shares"] = dropout_of_shares(case, heads, sequences.cut(placement), p)
    if p := layer.hidden_dropout:
        masks |= {name: Mask(shape, placed, p) for name in ("attended", "fed")}
    spec, rows = TensorSpec(shape, placed, placed), (heads + 2 * groups) * size
    divided = {"heads": heads, "ffn": case.shape["ffn"], "(heads + 2 groups) head_size": rows}
    divided |= {} if tp % groups == 0 else {"groups": groups}
    forward, backward = _steps(layer, costs, rows)
    return Contract(
        axes=("tp", "cp"),
        inputs={"x": spec, **sequences.inputs},
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


def attention_of(
    x: Tensor,
    inputs: Tensors,
    parameters: Tensors,
    layer: Layer,
    sequences: Sequences,
    mask: tuple[str, int | None],
) -> Tensor:
    """Self-attention of normalised states."""
    groups, size = layer.case.shape["groups"], layer.case.shape["head_size"]
    weight, bias = parameters["attention.qkv.weight"], parameters.get("attention.qkv.bias")
    by_group = F.linear(x, weight, bias).unflatten(-1, (groups, -1, size))
    q, k, v = by_group[..., :-2, :].flatten(2, 3), by_group[..., -2, :], by_group[..., -1, :]
    if layer.qk_norm:
        q = layer.normalised(q, parameters, "attention.query_norm.")
        k = layer.normalised(k, parameters, "attention.key_norm.")
    if layer.rotary_dim is not None:
        dim, where = layer.rotary_dim, positions_of(sequences)
        q, k = (
            rotated(each, where, dim=dim, base=BASE, interleaved=layer.interleaved)
            for each in (q, k)
        )
    allowed, p = sequences.allowed(*mask), layer.attention_dropout
    out = plain_attention(
        q, k, v, allowed=allowed, scale=None, kept=inputs.get("shares"), dropout=p
    )
    weight, bias = parameters["attention.proj.weight"], parameters.get("attention.proj.bias")
    return F.linear(out.flatten(2), weight, bias)


def _steps(layer: Layer, costs: Costs, rows: int) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """The pair of linears around attention, attention, and the pair of the perceptron."""
    layout, shape = layer.case.layout, layer.case.shape
    tokens = shape["sequence"] * shape["batch"] // layout.cp
    around, back = mlp_steps(layer.case, tokens * shape["hidden"])
    forward = (*around, *costs.forward, *around)
    backward = (*back, *costs.backward, *back)
    if shape["groups"] < layout.tp:
        forward += (Step("all_gather", "tp", tokens * rows // layout.tp),)
        backward += (Step("reduce_scatter", "tp", tokens * rows),)
    again = {"full": forward, "selective": costs.forward}.get(layer.recompute, ())
    return forward, backward + again


def _finish(layer: Layer) -> tuple[Step, ...]:
    """Sums of gradients: over tp of norms of heads, with sequence parallelism of all that is
    replicated; over cp of all."""
    layout = layer.case.layout
    replicated = of_heads = mine = 0
    for name, shape in layer.parameters.items():
        if any(each in name for each in _SHARDED):
            mine += prod(shape) // layout.tp
            continue
        mine += prod(shape)
        replicated += prod(shape)
        of_heads += prod(shape) if "query_norm" in name or "key_norm" in name else 0
    summed = replicated if layout.sequence_parallel else of_heads
    return Step("all_reduce", "tp", summed), Step("all_reduce", "cp", mine)


def _kept(layer: Layer, costs: Costs, elements: int) -> int | None:
    """With full recomputation the input. Else: the inputs of the norms with their statistics, those
    of qkv and of fc1, what attention keeps, the tables of the rotation, and the perceptron inside.

    With selective recomputation attention's inputs and output, of which v may lie in the packed
    product. Nothing is promised of masks, and of queries and keys that are normalised or gathered.
    """
    case, layout = layer.case, layer.case.layout
    part = elements // (layout.cp * (layout.tp if layout.sequence_parallel else 1))
    if layer.recompute == "full":
        return part
    if layer.hidden_dropout or layer.qk_norm:
        return None
    if case.shape["groups"] < layout.tp:
        return None
    tokens = case.shape["sequence"] // layout.cp
    statistics = 2 * (2 if layer.norm == "layer" else 1) * part // case.shape["hidden"]
    heads = costs.kept + (costs.out if costs.together > 1 else 0)
    packed = costs.q + costs.k if layer.rotary_dim is not None else 0
    if layer.recompute == "selective":
        heads = costs.q + costs.k + costs.v + costs.out + packed
    elif tokens * case.shape["batch"] == 1:
        # One token of v is no copy of its part of the product, which is kept with it.
        heads += packed
    tables = tokens * (layer.rotary_dim or 0)
    inside = tokens * case.shape["batch"] * mlp_kept(case)
    return 4 * part + statistics + heads + tables + inside
