"""The parameters of a whole model: what is alike in several layers is one tensor, a stack.

A stack's first dimension counts the layers that have it, in the order of the model, or is 1 for
what is there once. Over pp each stage holds those of its own layers: see `verify.placement.Listed`.
"""

from __future__ import annotations

from dataclasses import dataclass

from verify.oracle.gpt.model import Model, expert_case
from verify.oracle.moe.layer import moe_layer
from verify.placement import Listed, Placements, Shard

# The dimension that is cut over tp, where it is not the first one of weights and biases of a layer.
_INNER = {"attention.proj.weight": 1, "mlp.fc2.weight": 1, "mlp.shared.fc2.weight": 1}
_REPLICATED = ("norm", "_down.", "proj.bias", "fc2.bias", "router.weight", "positions.weight")
# The one that joins hidden states and embeddings in a module of multi-token prediction.
_JOIN = "multi_token.weight"


@dataclass(frozen=True)
class Stack:
    """A parameter of `shape` in each of `members`, the indices of layers, or in one place; `stages`
    has for each member the stages that hold it. `placements` are those of the stack."""

    name: str
    shape: tuple[int, ...]
    members: tuple[int, ...]
    stages: tuple[frozenset[int], ...]
    placements: Placements

    @property
    def full(self) -> tuple[int, ...]:
        """The shape of the whole stack."""
        return (len(self.members), *self.shape)


def stacks_of(model: Model) -> dict[str, Stack]:
    """All stacks by name, in the order of the model."""
    hidden, pp = model.case.shape["hidden"], model.case.layout.pp
    first, last = frozenset({0}), frozenset({pp - 1})
    copied = model.tied or model.depths
    once: dict[str, tuple[tuple[int, ...], frozenset[int]]] = {
        "embedding.tokens.weight": ((model.padded, hidden), first | last if copied else first)
    }
    if model.positions == "learned":
        once["embedding.positions.weight"] = ((model.max_sequence, hidden), first)
    found = {n: _stack(model, n, shape, (0,), (at,)) for n, (shape, at) in once.items()}
    by_name: dict[str, tuple[tuple[int, ...], list[int]]] = {}
    for layer in range(model.case.shape["layers"]):
        for name, shape in _of_layer(model, layer).items():
            by_name.setdefault(f"layers.{name}", (shape, []))[1].append(layer)
    for name, (shape, members) in by_name.items():
        stages = tuple(frozenset({model.stage_of(layer)}) for layer in members)
        found[name] = _stack(model, name, shape, tuple(members), stages)
    for name in _of_norm(model):
        full = f"final_norm.{name}"
        found[full] = _stack(model, full, (hidden,), (0,), (last,))
    if not model.tied:
        found["output.weight"] = _stack(
            model, "output.weight", (model.padded, hidden), (0,), (last,)
        )
    return found | _further(model)


def _of_norm(model: Model) -> tuple[str, ...]:
    return ("weight", "bias") if model.layer.norm == "layer" else ("weight",)


def _further(model: Model) -> dict[str, Stack]:
    """The stacks over the depths of multi-token prediction, `multi_token.NAME`, all on the last
    stage: three norms, `weight`, and those of a layer."""
    hidden = model.case.shape["hidden"]
    by_name: dict[str, tuple[tuple[int, ...], list[int]]] = {}
    for depth in range(model.depths):
        own: dict[str, tuple[int, ...]] = {
            f"{norm}_norm.{name}": (hidden,)
            for norm in ("hidden", "embedding", "final")
            for name in _of_norm(model)
        }
        layer = _of_layer(model, model.case.shape["layers"] + depth)
        own |= {"weight": (hidden, 2 * hidden), **{f"layer.{n}": s for n, s in layer.items()}}
        for name, shape in own.items():
            by_name.setdefault(f"multi_token.{name}", (shape, []))[1].append(depth)
    last = frozenset({model.case.layout.pp - 1})
    return {
        name: _stack(model, name, shape, tuple(members), (last,) * len(members))
        for name, (shape, members) in by_name.items()
    }


def _of_layer(model: Model, layer: int) -> dict[str, tuple[int, ...]]:
    """The shapes of one layer's parameters."""
    dense = model.layer.parameters
    if not model.has_experts(layer):
        return dense
    kept = {name: shape for name, shape in dense.items() if not name.startswith("mlp.")}
    experts = moe_layer(expert_case(model.case)).parameters
    return kept | {f"mlp.{name}": shape for name, shape in experts.items()}


def _stack(
    model: Model,
    name: str,
    shape: tuple[int, ...],
    members: tuple[int, ...],
    stages: tuple[frozenset[int], ...],
) -> Stack:
    held = tuple(
        tuple(index for index, at in enumerate(stages) if stage in at)
        for stage in range(model.case.layout.pp)
    )
    placements: Placements = {"pp": Listed(0, held), **_within(model, name)}
    return Stack(name, shape, members, stages, placements)


def _within(model: Model, name: str) -> Placements:
    """How each member lies on the ranks of a stage; the stack's own dimension comes first."""
    if name == _JOIN:
        return {}
    plain = name.removeprefix("layers.").removeprefix("multi_token.layer.")
    gated = model.layer.activation in ("swiglu", "geglu")
    if plain.startswith("mlp.experts."):
        row = plain.endswith("fc2.weight")
        return {"ep": Shard(1), "etp": Shard(3) if row else Shard(2, 2 if gated else 1)}
    if any(each in plain for each in _REPLICATED):
        return {}
    stride = 2 if gated and ".fc1." in plain else 1
    return {"tp": Shard(1 + _INNER.get(plain, 0), stride)}
