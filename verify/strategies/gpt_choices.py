"""What is chosen of whole models and of how they are trained: the values of each option."""

from __future__ import annotations

from verify.case import DTYPES
from verify.oracle.gpt.model import FROZEN, POSITIONS
from verify.oracle.mlp import ACTIVATIONS
from verify.oracle.norm import KINDS
from verify.strategies.cases import Choices
from verify.strategies.context import ALGORITHMS, MASKS, SCORED
from verify.strategies.training import OPTIONS as _TRAINING

DOUBLE = DTYPES[:1]
PLACEMENTS = ("zigzag", "contiguous")
# Twice what alone has weight passes.
PIPELINES = ("default", "gpipe", "1f1b", "zb-h1", "zb-h1")
SCALINGS = (0.1, 0.5)
_FLAGS = (False, True)
_STEPS = _TRAINING["training_steps"]
# The default of an option comes first.
OPTIMIZING: Choices = {
    "optimizer": _STEPS["optimizer"],
    "momentum": _STEPS["momentum"],
    "weight_decay": (0.0, 0.5),
    "clip": (None, 2.0**-4, 2.0**-4, 2.0**10),
    "order": (2.0, 2.0, 1.0, "inf"),
    "groups": _STEPS["groups"],
    "loss_scale": _STEPS["loss_scale"],
    "frozen": FROZEN,
    "hysteresis": _STEPS["hysteresis"],
    "overflow": (0, 0, 1, 2),
    "bucket": (None, 1, 50, 400),
    "distributed": _FLAGS,
    "overlap": _FLAGS,
    "schedule": ("constant", "linear"),
    "warmup": (None, 1),
    "decay": (None, 3),
}

MODEL: Choices = {
    "algorithm": ALGORITHMS,
    "placement": PLACEMENTS,
    "positions": POSITIONS,
    "tied": (True, False),
    "hidden_dropout": (0.0,),
    "attention_dropout": (0.0,),
    "recompute": ("", "", "full", "selective", "full_distributed"),
    "evaluated": _FLAGS,
    "mask": MASKS,
    "packed": (0, 0, 0, 1, 2, 3),
    "norm": KINDS,
    "activation": ACTIVATIONS,
    "qk_norm": _FLAGS,
    "zero_centered": _FLAGS,
    "bias": (True, False),
    "interleaved": _FLAGS,
    "alibi": (False, *SCORED["alibi"]),
    "sink": (False, *SCORED["sink"]),
    "scale": (None, *SCORED["scale"]),
    "layer_scaling": (False, *_FLAGS),
    "every": (1, 2),
    "dispatcher": ("all_to_all", "all_gather"),
    "balance": ("none", "sequence", "batch", "global"),
    "coefficient": (1.0, 16.0),
    "z_loss": (0.0, 0.25),
    "multi_token": (0, 0, 0, 1, 2),
    "multi_token_scaling": SCALINGS,
    "multi_token_normalised": _FLAGS,
    "pipeline": PIPELINES,
}

# What most implementations have, whoever wrote them: of training, and of a model.
PLAIN_TRAINING: Choices = {
    "optimizer": OPTIMIZING["optimizer"],
    "weight_decay": (0.0, 0.5),
    "clip": OPTIMIZING["clip"],
    "bucket": OPTIMIZING["bucket"],
    "distributed": _FLAGS,
    "overlap": _FLAGS,
    "schedule": ("constant", "linear"),
    "warmup": (None, 1),
    "decay": (None, 3),
}
_COMMON = frozenset(
    [
        "positions",
        "tied",
        "evaluated",
        "mask",
        "norm",
        "qk_norm",
        "bias",
        "interleaved",
        "recompute",
    ]
)
PLAIN: Choices = {
    **{name: values if name in _COMMON else values[:1] for name, values in MODEL.items()},
    "activation": ("gelu", "swiglu", "geglu", "squared_relu"),
}

# Most have no biases beside experts.
PLAIN_EXPERTS: Choices = {
    **PLAIN,
    "bias": (False,),
    "every": MODEL["every"],
    "dispatcher": MODEL["dispatcher"],
}

# Whether attention is multi-latent: a case in six.
LATENT = (False, False, False, False, False, True)
ROUTED = ("every", "dispatcher", "balance", "coefficient", "z_loss")
