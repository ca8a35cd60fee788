"""A model of impl as it is before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import Module, ModuleList, Parameter

from impl.groups import Groups
from impl.initialise import (
    Rule,
    initialise_local,
    initialise_whole,
    kaiming_uniform,
    transformer_rule,
)
from impl.mlp import MLP
from impl.moe.experts import Experts
from impl.parameters import defer
from verify.case import Case
from verify.oracle.initialise import ACTIVATIONS, LINEAR, STD, TRANSFORMER
from verify.targets.impl.dropout import tracker_of
from verify.targets.impl.subject import Builder, ModuleSubject

OPTIONS: Mapping[str, tuple[str, ...]] = {"initialisation": ("way", "rule", "activation")}


def initialisation(case: Case, groups: Groups) -> ModuleSubject:
    """Perceptrons or experts whose parameters are drawn as the case says."""
    layers = ModuleList(_layer(case, groups) for _ in range(case.shape["layers"]))
    rule = _rule(case)
    if case.options.get("way", "whole") == "whole":
        initialise_whole(layers, seed=case.seed, rule=rule, groups=groups)
    else:
        tracker = tracker_of(case.layout, seed=case.seed)
        initialise_local(layers, tracker=tracker, rule=rule, groups=groups)
    return ModuleSubject(layers, groups, lambda inputs: {})


def _layer(case: Case, groups: Groups) -> Module:
    common: dict[str, Any] = {"ffn": case.shape["ffn"], "init": defer}
    common |= {"dtype": getattr(torch, case.dtype)}
    common |= {"activation": str(case.options.get("activation", ACTIVATIONS[0]))}
    if "num_experts" not in case.shape:
        return MLP(case.shape["hidden"], group=groups.tp, **common)
    return Experts(
        case.shape["hidden"],
        num_experts=case.shape["num_experts"],
        ep_group=groups.ep,
        etp_group=groups.etp,
        bias=True,
        **common,
    )


def _rule(case: Case) -> Rule:
    chosen = case.options.get("rule", TRANSFORMER)
    if chosen == TRANSFORMER:
        return transformer_rule(STD, num_layers=case.shape["layers"])
    inputs = {"fc1": case.shape["hidden"], "fc2": case.shape["ffn"]}

    def rule(name: str, parameter: Parameter) -> Any:
        _, layer, kind = name.split(".")
        if kind == "weight":
            return kaiming_uniform()
        return kaiming_uniform(inputs[layer]) if chosen == LINEAR else None

    return rule


BUILDERS: Mapping[str, Builder] = {"initialisation": initialisation}
