"""Mutants of the feed-forward block: its activations, its gate and the packing of it."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_mutant = partial(Mutant, family="mlp", module="impl.mlp", caught_by=("tp_mlp",))

_HALVES = "gate, up = inner.chunk(2, dim=-1)"
_PRODUCT = "return self.activation(gate) * up"

MUTANTS = (
    _mutant(
        name="mlp-approximate-gelu",
        wrong="The gelu is approximated by a tanh.",
        snippet='{"gelu": gelu, "squared_relu"',
        replacement='{"gelu": lambda x: gelu(x, approximate="tanh"), "squared_relu"',
    ),
    _mutant(
        name="mlp-activation-in-bfloat16",
        wrong="The activation is computed in bfloat16.",
        snippet="return self.activation(inner)",
        replacement="return self.activation(inner.bfloat16()).to(inner.dtype)",
    ),
    _mutant(
        name="mlp-relu-not-squared",
        wrong="The squared relu is a relu.",
        snippet="return relu(x).square()",
        replacement="return relu(x)",
    ),
    _mutant(
        name="mlp-square-not-cut",
        wrong="The squared relu squares negative numbers too.",
        snippet="return relu(x).square()",
        replacement="return x.square()",
    ),
    _mutant(
        name="mlp-packed-cut-as-one",
        wrong="The packed weight of gate and up is cut into one slice a rank.",
        snippet="stride=blocks, **common)",
        replacement="**common)",
        seen="TPL-06",
    ),
    _mutant(
        name="mlp-halves-swapped",
        wrong="The first half of the packed weight is taken for up, the second for the gate.",
        snippet=_HALVES,
        replacement="up, gate = inner.chunk(2, dim=-1)",
    ),
    _mutant(
        name="mlp-activates-up",
        wrong="The activation is applied to up instead of the gate.",
        snippet=_PRODUCT,
        replacement="return self.activation(up) * gate",
    ),
    _mutant(
        name="mlp-activates-the-product",
        wrong="The activation is applied after gate and up are multiplied.",
        snippet=_PRODUCT,
        replacement="return self.activation(gate * up)",
    ),
    _mutant(
        name="mlp-halves-interleaved",
        wrong="Rows of gate and up are taken to alternate.",
        snippet=_HALVES,
        replacement="gate, up = inner[..., ::2], inner[..., 1::2]",
    ),
    _mutant(
        name="mlp-gate-without-gradient",
        wrong="The gate is a constant to backward.",
        snippet=_PRODUCT,
        replacement="return self.activation(gate).detach() * up",
    ),
    _mutant(
        name="mlp-geglu-is-swiglu",
        wrong="The gate of geglu is activated by silu.",
        snippet='"geglu": gelu}',
        replacement='"geglu": silu}',
    ),
    _mutant(
        name="mlp-other-layer-for-gate",
        wrong="Unpacked, fc1 is the gate and gate is up.",
        snippet="(gate, _), up = self.gate(x), inner",
        replacement="gate, (up, _) = inner, self.gate(x)",
    ),
    _mutant(
        name="mlp-keeps-more",
        wrong="Something is kept for backward beside what the layers and the activation need.",
        snippet="inner, _ = self.fc1(x)\n",
        replacement="inner, _ = self.fc1(x)\n        inner = inner * inner.new_ones(inner.shape)\n",
    ),
)
