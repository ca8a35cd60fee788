"""impl's output linear with its cross entropy as a subject."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch.nn import Module
from torch.nn.init import constant_

from impl.groups import Groups
from impl.linear_cross_entropy import linear_cross_entropy as operation
from impl.parameters import sharded_parameter
from verify.case import Case
from verify.oracle.linear_cross_entropy import OPTIONS as _OPTIONS
from verify.targets.impl.subject import Builder, ModuleSubject, Tensors

OPTIONS: Mapping[str, tuple[str, ...]] = {"linear_cross_entropy": _OPTIONS}


class _Output(Module):
    def __init__(self, case: Case, groups: Groups) -> None:
        super().__init__()
        self.weight = sharded_parameter(
            case.shape["vocabulary"],
            case.shape["hidden"],
            dim=0,
            name="vocabulary",
            group=groups.tp,
            init=partial(constant_, val=math.nan),
            dtype=getattr(torch, case.dtype),
        )


def linear_cross_entropy(case: Case, groups: Groups) -> ModuleSubject:
    """`linear_cross_entropy`."""
    module, options = _Output(case, groups), case.options
    chunk = options.get("chunk")

    def call(inputs: Tensors) -> Tensors:
        loss = operation(
            inputs["hidden"],
            weight=module.weight,
            targets=inputs["targets"],
            group=groups.tp,
            chunk=1 if chunk is None else int(chunk),
            loss_mask=inputs.get("loss_mask"),
            label_smoothing=float(options.get("label_smoothing") or 0.0),
            real_vocabulary=(
                case.shape.get("real_vocabulary") if options.get("mask_padding") else None
            ),
            z_loss=float(options.get("z_loss") or 0.0),
            sequence_parallel=case.layout.sequence_parallel,
        )
        return {"loss": loss}

    return ModuleSubject(module, groups, call)


BUILDERS: Mapping[str, Builder] = {"linear_cross_entropy": linear_cross_entropy}
