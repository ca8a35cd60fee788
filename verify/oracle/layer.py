"""What a transformer layer is made of, and its parts on one device.

    h = x + dropout(attention(norm(x)));   y = h + dropout(mlp(norm(h)))

Attention is of grouped heads, as in `self_attention`, or multi-latent, as in `latent_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor
from torch.nn import functional as F

from verify.case import Case
from verify.errors import BadArgument
from verify.oracle.attention import check_groups
from verify.oracle.context import Sequences
from verify.oracle.context_shares import SHARED, Shares
from verify.oracle.contract import Tensors
from verify.oracle.dropout import probability
from verify.oracle.latent_attention import latent_heads, latent_weights
from verify.oracle.mlp import ACTIVATIONS, mlp_parameters
from verify.oracle.norm import KINDS, normalised
from verify.oracle.positions import BASE, positions_of, rotated
from verify.oracle.terms import (
    exclude,
    in_training,
    known_options,
    one_of,
    sizes,
    switches,
    whole_number,
)

RECOMPUTED = ("", "full", "full_distributed", "selective")
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
_LATENT = ("kv_lora", "rope_size", "value_size")
# The sizes that only a layer with latent attention has.
LATENT = (*_LATENT, "q_lora")
_SIZES = ("sequence", "batch", "hidden", "heads", "groups", "head_size", "ffn")
_SHARDED = ("qkv", "q.weight", "q_up", "kv_up", "proj.weight", "sink", "fc1", "fc2.weight")


@dataclass(frozen=True)
class Layer:
    """The options of a case, checked."""

    case: Case
    shares: Shares
    norm: str
    zero_centered: bool
    qk_norm: bool
    bias: bool
    activation: str
    rotary_dim: int | None
    interleaved: bool
    hidden_dropout: float
    recompute: str

    @staticmethod
    def of(case: Case) -> Layer:
        """Raises BadArgument for values that are not allowed, or not together."""
        known_options(case, *OPTIONS, "training", *SHARED)
        sizes(case, *_SIZES, optional=LATENT)
        check_groups(case)
        names = {"zero_centered": False, "qk_norm": False, "bias": True, "interleaved": False}
        drops = {n: probability(case, f"{n}_dropout", 0.0) for n in ("attention", "hidden")}
        if not in_training(case):
            drops = dict.fromkeys(drops, 0.0)
        found = Layer(
            case,
            Shares.of(case, dropout=drops["attention"]),
            one_of(case, "norm", KINDS),
            activation=one_of(case, "activation", ACTIVATIONS),
            rotary_dim=whole_number(case, "rotary_dim", least=2),
            hidden_dropout=drops["hidden"],
            recompute=one_of(case, "recompute", RECOMPUTED),
            **switches(case, names),
        )
        found._check_latent()
        dim = found.rotary_dim
        if dim is not None and (dim % 2 or dim > found.turned_size):
            exclude(case, "rotary_dim", dim, why="it is odd or exceeds what has positions")
        return found

    @property
    def attention_dropout(self) -> float:
        """The probability of dropping a share."""
        return self.shares.dropout

    @property
    def latent(self) -> bool:
        """Whether attention is multi-latent."""
        return "kv_lora" in self.case.shape

    @property
    def turned_size(self) -> int:
        """The features of a head that may be turned by position."""
        return self.case.shape["rope_size" if self.latent else "head_size"]

    @property
    def key_size(self) -> int:
        """The features of a head's query and key."""
        return self.case.shape["head_size"] + self.case.shape.get("rope_size", 0)

    @property
    def value_size(self) -> int:
        """The features of a head's value."""
        return self.case.shape.get("value_size", self.case.shape["head_size"])

    @property
    def rows(self) -> int:
        """The rows of qkv."""
        heads, groups, size = (self.case.shape[n] for n in ("heads", "groups", "head_size"))
        return (heads + 2 * groups) * size

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Full shapes by name."""
        hidden, ffn = self.case.shape["hidden"], self.case.shape["ffn"]
        given = {"hidden": hidden, "ffn": ffn, "activation": self.activation, "bias": self.bias}
        return {
            **self._norm("input_norm.", hidden),
            **{f"attention.{name}": shape for name, shape in self._of_attention().items()},
            **self._norm("mlp_norm.", hidden),
            **mlp_parameters("mlp.", **given),  # type: ignore[arg-type]
        }

    def summed(self, *, sequence_parallel: bool) -> tuple[int, int]:
        """The elements of parameters whose gradients are summed over tp: those of norms of heads,
        or of all that is replicated; and of all that a rank of tp has, summed over cp."""
        replicated = of_heads = mine = 0
        for name, shape in self.parameters.items():
            if any(each in name for each in _SHARDED):
                mine += prod(shape) // self.case.layout.tp
                continue
            mine += prod(shape)
            replicated += prod(shape)
            by_head = "attention.query_norm" in name or "attention.key_norm" in name
            of_heads += prod(shape) if by_head and not self.latent else 0
        return (replicated if sequence_parallel else of_heads), mine

    def normalised(self, x: Tensor, parameters: Tensors, prefix: str) -> Tensor:
        """`x` by one of the norms."""
        given = {"kind": self.norm, "zero_centered": self.zero_centered}
        return normalised(x, parameters, prefix, **given)  # type: ignore[arg-type]

    def _check_latent(self) -> None:
        shape = self.case.shape
        given = [name for name in LATENT if name in shape]
        if given and not set(_LATENT) <= set(given):
            raise BadArgument(f"case.shape: {', '.join(given)} of latent attention, not all of it")
        if self.latent and shape["groups"] != shape["heads"]:
            raise BadArgument(
                f"case.shape.groups: {shape['groups']} of {shape['heads']} heads, of which with"
                " latent attention each has its own keys"
            )

    def _of_attention(self) -> dict[str, tuple[int, ...]]:
        hidden, heads, size = (self.case.shape[n] for n in ("hidden", "heads", "head_size"))
        sink = {"core.sink": (heads,)} if self.shares.sink else {}
        if self.latent:
            found = {**latent_weights(self.case), **sink}
            norms = {
                "query_norm.": self.case.shape.get("q_lora"),
                "kv_norm.": found["kv_up.weight"][1],
            }
        else:
            found = {
                "qkv.weight": (self.rows, hidden),
                "proj.weight": (hidden, heads * size),
                **sink,
            }
            found |= {"qkv.bias": (self.rows,), "proj.bias": (hidden,)} if self.bias else {}
            norms = {"query_norm.": size, "key_norm.": size}
        for prefix, features in norms.items():
            if self.qk_norm and features is not None:
                found |= self._norm(prefix, features)
        return found

    def _norm(self, prefix: str, features: int) -> dict[str, tuple[int, ...]]:
        names = ("weight", "bias") if self.norm == "layer" else ("weight",)
        return {f"{prefix}{name}": (features,) for name in names}


def attention_of(
    x: Tensor,
    inputs: Tensors,
    parameters: Tensors,
    layer: Layer,
    sequences: Sequences,
    mask: tuple[str, int | None],
) -> Tensor:
    """Attention of normalised states."""
    own = {n.removeprefix("attention."): p for n, p in parameters.items() if "attention." in n}
    q, k, v = (_latent if layer.latent else _grouped)(x, own, layer, sequences)
    out = layer.shares.attention(
        q,
        k,
        v,
        inputs,
        allowed=sequences.allowed(*mask),
        positions=sequences.positions,
        sink=own.get("core.sink"),
    )
    return F.linear(out.flatten(2), own["proj.weight"], own.get("proj.bias"))


def _grouped(
    x: Tensor, own: Tensors, layer: Layer, sequences: Sequences
) -> tuple[Tensor, Tensor, Tensor]:
    groups, size = layer.case.shape["groups"], layer.case.shape["head_size"]
    qkv = F.linear(x, own["qkv.weight"], own.get("qkv.bias"))
    by_group = qkv.unflatten(-1, (groups, -1, size))
    q, k, v = by_group[..., :-2, :].flatten(2, 3), by_group[..., -2, :], by_group[..., -1, :]
    if layer.qk_norm:
        q = layer.normalised(q, own, "query_norm.")
        k = layer.normalised(k, own, "key_norm.")
    return _turned(q, layer, sequences), _turned(k, layer, sequences), v


def _latent(
    x: Tensor, own: Tensors, layer: Layer, sequences: Sequences
) -> tuple[Tensor, Tensor, Tensor]:
    def normal(latent: Tensor, name: str) -> Tensor:
        return layer.normalised(latent, own, f"{name}.") if layer.qk_norm else latent

    def turned(x: Tensor) -> Tensor:
        return _turned(x, layer, sequences)

    return latent_heads(x, own, layer.case, normal=normal, turned=turned)


def _turned(x: Tensor, layer: Layer, sequences: Sequences) -> Tensor:
    dim, where = layer.rotary_dim, positions_of(sequences)
    if dim is None:
        return x
    return rotated(x, where, dim=dim, base=BASE, interleaved=layer.interleaved)
