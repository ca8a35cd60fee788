"""What parameters are before training: a stack of perceptrons, or of experts.

Weights are normal with mean zero: fc1 with standard deviation 0.02, fc2, whose output is added to
the residual, with 0.02 / sqrt(2 layers) (GPT-2's rule, Megatron-LM's `init_method_normal` and
`scaled_init_method_normal`); or, with rule `kaiming`, uniform within 1 / sqrt(inputs) of the full
weight. Biases are zero but with rule `linear`, torch's default for linear layers: they are then
drawn as their weight is with `kaiming`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from verify.case import Case
from verify.errors import BadArgument
from verify.oracle.terms import known_options, one_of, sizes
from verify.placement import Placements, Shard

WAYS = ("whole", "local")
ACTIVATIONS = ("gelu", "swiglu")
TRANSFORMER, LINEAR = "transformer", "linear"
RULES = (TRANSFORMER, "kaiming", LINEAR)
STD = 0.02


@dataclass(frozen=True)
class Drawn:
    """A parameter's full shape, its placement, and the standard deviation it is drawn with, 0 for
    one that is zero."""

    shape: tuple[int, ...]
    placements: Placements
    spread: float


def initialisation(case: Case) -> Mapping[str, Drawn]:
    """By name, parameters `I.fc1.weight`, `I.fc1.bias`, `I.fc2.weight`, `I.fc2.bias` of layer I
    from 0: of perceptrons over tp; with size `num_experts` of that many experts each, stacked along
    dimension 0, which is split over ep, and split over etp as perceptrons over tp. With a gate fc1
    is [gate | up].

    Options: `way`, whole (and then cut) or local; `rule`; `activation`, gelu or swiglu. Raises
    BadArgument for others, sizes that do not divide, and what cannot be drawn locally: biases that
    etp > 1 ranks have copies of, as ranks of experts have no stream in common.
    """
    known_options(case, "way", "rule", "activation")
    hidden, ffn, layers = sizes(case, "hidden", "ffn", "layers", optional=("num_experts",))
    way, rule = one_of(case, "way", WAYS), one_of(case, "rule", RULES)
    gates = 1 + (one_of(case, "activation", ACTIVATIONS) == "swiglu")
    experts, layout = case.shape.get("num_experts"), case.layout
    ways = layout.tp if experts is None else layout.expert_tp
    if ffn % ways or (experts or 0) % layout.ep:
        raise BadArgument(f"case.shape: {dict(case.shape)} does not divide on {layout}")
    if experts and rule == LINEAR and way == "local" and ways > 1:
        raise BadArgument(f"case.options.way: local, of biases with copies on etp={ways} ranks")
    spreads = {"fc1": STD, "fc2": STD / math.sqrt(2 * layers)}
    if rule != TRANSFORMER:
        spreads = {"fc1": 1 / math.sqrt(3 * hidden), "fc2": 1 / math.sqrt(3 * ffn)}
    of_experts, first = ((), 0) if experts is None else ((experts,), 1)
    over = "tp" if experts is None else "etp"
    shared_out: Placements = {} if experts is None else {"ep": Shard(0)}
    found = {}
    for i in range(layers):
        for name, shape, dim in (("fc1", (gates * ffn, hidden), 0), ("fc2", (hidden, ffn), 1)):
            stride = gates if name == "fc1" else 1
            placed = {**shared_out, over: Shard(first + dim, stride=stride)}
            found[f"{i}.{name}.weight"] = Drawn((*of_experts, *shape), placed, spreads[name])
            drawn = Drawn(
                (*of_experts, shape[0]),
                placed if name == "fc1" else shared_out,
                spreads[name] if rule == LINEAR else 0.0,
            )
            found[f"{i}.{name}.bias"] = drawn
    return found
