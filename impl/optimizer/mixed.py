"""One step from gradients to parameters, in mixed precision and over all ranks.

Parameters of bfloat16 or float16 are rounded copies of main parameters in float32, which are what
is updated: most updates are smaller than half a unit in the last place of what they are added to.
With a distributed optimizer, main parameters and states are of this rank's shares only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from impl.collectives import all_reduce
from impl.data_parallel import DataParallel, Share
from impl.groups import Groups
from impl.optimizer.clip import clip_gradients, gradient_norm
from impl.optimizer.loss_scale import LossScale
from impl.optimizer.schedule import Schedule


class Rule(Protocol):
    """How values follow a gradient: `AdamW`, `SGD`."""

    def state(self, values: Tensor) -> dict[str, Tensor]:
        """The state before the first update, by name."""
        ...

    def update(
        self,
        values: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        *,
        step: int,
        lr: float,
        weight_decay: float,
    ) -> None:
        """Update `values` and `state` in place."""
        ...


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters, of which there may be none, and factors of their learning rate and decay."""

    parameters: Sequence[Parameter]
    lr_multiplier: float = 1.0
    weight_decay_multiplier: float = 1.0


@dataclass(frozen=True)
class StepResult:
    """What a step did: `norm` of all gradients before clipping, 0 where `skipped`, and the learning
    rate of every group."""

    norm: Tensor
    skipped: bool
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Slot:
    """A share and what the optimizer keeps of it, to be saved and loaded with it: the `main`
    values, which are `share.values` where these are wide enough, and the rule's `state`."""

    share: Share
    main: Tensor
    group: ParameterGroup
    state: dict[str, Tensor]


class Optimizer:
    """Updates the parameters of `data_parallel` by `rule`, from finalised main gradients.

    Every trainable parameter is in one of `parameter_groups`; all ranks give the same groups in the
    same order. `max_norm` None does not clip; the norm of all gradients is of order `norm_order`.
    With a `loss_scale`, main gradients are multiplied by its value, and a step in which any is not
    finite, on any rank, is skipped on all: nothing changes but the scale. Skipped steps count
    neither for the schedule nor for Adam. ValueError for a parameter in no group or in two.
    """

    def __init__(
        self,
        data_parallel: DataParallel,
        *,
        groups: Groups,
        parameter_groups: Sequence[ParameterGroup],
        rule: Rule,
        schedule: Schedule,
        weight_decay: float,
        max_norm: float | None = None,
        norm_order: float,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.data_parallel, self.groups, self.rule = data_parallel, groups, rule
        self.parameter_groups, self.schedule = tuple(parameter_groups), schedule
        self.weight_decay, self.max_norm, self.norm_order = weight_decay, max_norm, norm_order
        self.loss_scale, self.updates = loss_scale, 0
        by_parameter = _by_parameter(data_parallel.parameters, self.parameter_groups)
        self.shares = data_parallel.shares()
        self.slots = [_begin(each, by_parameter[each.parameter], rule) for each in self.shares]

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to run backward from."""
        return loss if self.loss_scale is None else loss * self.loss_scale.value

    def rates(self) -> tuple[float, ...]:
        """The learning rate of every group at the next update."""
        rate = self.schedule.rate(self.updates)
        return tuple(rate * group.lr_multiplier for group in self.parameter_groups)

    def step(self) -> StepResult:
        """Update all parameters. Collective over the whole world; with a distributed optimizer,
        then an all-gather of the parameters of every bucket."""
        rates = self.rates()
        if self.loss_scale is not None:
            overflow = self._unscale(self.loss_scale.value)
            self.loss_scale.update(overflow=overflow)
            if overflow:
                return StepResult(self.data_parallel.zero, True, rates)
        norm = gradient_norm(
            self.shares,
            zero=self.data_parallel.zero,
            groups=self.groups,
            distributed=self.data_parallel.distributed,
            order=self.norm_order,
        )
        if self.max_norm is not None:
            gradients = [share.gradient for share in self.shares]
            clip_gradients(gradients, norm=norm, max_norm=self.max_norm)
        self.updates += 1
        by_group = dict(zip(map(id, self.parameter_groups), rates, strict=True))
        for each in self.slots:
            self._update(each, lr=by_group[id(each.group)])
        self.data_parallel.gather_parameters()
        return StepResult(norm, False, rates)

    def _update(self, each: Slot, *, lr: float) -> None:
        self.rule.update(
            each.main,
            each.share.gradient,
            each.state,
            step=self.updates,
            lr=lr,
            weight_decay=self.weight_decay * each.group.weight_decay_multiplier,
        )
        if each.main is not each.share.values:
            each.share.values.copy_(each.main)

    def _unscale(self, scale: float) -> bool:
        """Divide all gradients by the scale. Whether any, on any rank of the world, is not finite;
        a rank may have a shard of padding only, and must not be the one that goes on."""
        finite = True
        for share in self.shares:
            share.gradient.mul_(1.0 / scale)
            finite = finite and bool(share.gradient.isfinite().all())
        found = self.data_parallel.zero.new_tensor([not finite])
        for group in (self.groups.tp_dp_cp, self.groups.pp):
            found = all_reduce(found, op=dist.ReduceOp.MAX, group=group)
        return bool(found.item())


def _by_parameter(
    parameters: Sequence[Parameter], groups: Sequence[ParameterGroup]
) -> dict[Parameter, ParameterGroup]:
    found: dict[Parameter, ParameterGroup] = {}
    for group in groups:
        for parameter in group.parameters:
            if parameter in found:
                raise ValueError(
                    f"parameter_groups: a parameter {list(parameter.shape)} is in two of them;"
                    " give each once"
                )
            found[parameter] = group
    for parameter in parameters:
        if parameter not in found:
            raise ValueError(
                f"parameter_groups: a parameter {list(parameter.shape)} is in none of"
                f" {len(groups)}; give every one that requires gradients"
            )
    return found


def _begin(share: Share, group: ParameterGroup, rule: Rule) -> Slot:
    wide = share.values.dtype is share.gradient.dtype
    main = share.values if wide else share.values.to(share.gradient.dtype)
    return Slot(share, main, group, rule.state(main))
