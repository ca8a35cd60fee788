"""What parameters are before training: a stack of perceptrons, or of experts.

Weights are normal with mean zero: fc1 with standard deviation 0.02, fc2, whose output is added to
the residual, with 0.02 / sqrt(2 layers) (GPT-2's rule, Megatron-LM's `init_method_normal` and
`scaled_init_method_normal`); or, with rule `kaiming`, uniform within 1 / sqrt(inputs) of the full
weight, torch's default for linear layers. Biases are zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from verify.case import Case
from verify.errors import BadArgument
from verify.oracle.terms import known_options, sizes
from verify.placement import Placements, Shard

WAYS = ("whole", "local")
RULES = ("transformer", "kaiming")
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
    from 0: of perceptrons over tp; with size `num_experts` weights only, of that many experts each,
    stacked along dimension 0, which is split over ep, and split over etp as perceptrons over tp.

    Options: `way`, whole (and then cut) or local; `rule`. Raises BadArgument for others, and sizes
    that do not divide.
    """
    known_options(case, "way", "rule")
    hidden, ffn, layers = sizes(case, "hidden", "ffn", "layers", optional=("num_experts",))
    for option, allowed in (("way", WAYS), ("rule", RULES)):
        value = case.options.get(option, allowed[0])
        if value not in allowed:
            raise BadArgument(
                f"case.options.{option}: {value!r} is not one of {', '.join(allowed)}"
            )
    experts, layout = case.shape.get("num_experts"), case.layout
    ways = layout.tp if experts is None else layout.expert_tp
    if ffn % ways or (experts or 0) % layout.ep:
        raise BadArgument(f"case.shape: {dict(case.shape)} does not divide on {layout}")
    spreads = {"fc1": STD, "fc2": STD / math.sqrt(2 * layers)}
    if case.options.get("rule") == "kaiming":
        spreads = {"fc1": 1 / math.sqrt(3 * hidden), "fc2": 1 / math.sqrt(3 * ffn)}
    found = {}
    for i in range(layers):
        for name, shape, dim in (("fc1", (ffn, hidden), 0), ("fc2", (hidden, ffn), 1)):
            if experts is not None:
                placed: Placements = {"ep": Shard(0), "etp": Shard(dim + 1)}
                found[f"{i}.{name}.weight"] = Drawn((experts, *shape), placed, spreads[name])
                continue
            found[f"{i}.{name}.weight"] = Drawn(shape, {"tp": Shard(dim)}, spreads[name])
            split: Placements = {"tp": Shard(0)} if name == "fc1" else {}
            found[f"{i}.{name}.bias"] = Drawn(shape[:1], split, 0.0)
    return found
