"""What a checkpoint has of a GPT."""

from __future__ import annotations

from collections.abc import Mapping

from torch.nn import ModuleList

from impl.checkpoint.training import Training
from impl.groups import Groups
from impl.model import model_parameters
from impl.model_config import ModelConfig
from impl.optimizer.mixed import Optimizer
from impl.random import RandomTracker

_EMBEDDING = "embedding.tokens.weight"
_VOCABULARIES = (_EMBEDDING, "output.weight", "lookup.weight")


def training_of(
    chunks: ModuleList,
    config: ModelConfig,
    optimizer: Optimizer,
    tracker: RandomTracker,
    groups: Groups,
    *,
    order: Mapping[str, int | str],
) -> Training:
    """The chunks of this stage and what trains them: of embeddings and logits the rows that are
    tokens, and of an embedding's copy nothing of its own. `order` is what samples depend on."""
    parameters = model_parameters(chunks)
    return Training(
        parameters=parameters,
        optimizer=optimizer,
        tracker=tracker,
        groups=groups,
        rows=dict.fromkeys(_VOCABULARIES, config.vocabulary),
        copies={n: _EMBEDDING for n, p in parameters.items() if getattr(p, "shared", False)},
        order=order,
        model=_choices(config),
    )


def _choices(config: ModelConfig) -> dict[str, str]:
    """What a model of the same shapes may have otherwise, and no layout changes."""
    layer = config.layer
    of_layer = ("heads", "groups", "head_size", "norm", "zero_centered", "activation", "rotary")
    scores = ("mask", "scale", "alibi", "layer_scaling")
    found = {name: str(getattr(layer, name)) for name in (*of_layer, *scores)}
    found |= {"multi_token": "normalised"} if config.multi_token_normalised else {}
    return found | ({} if layer.experts is None else {"choice": str(layer.experts.choice)})
