"""The mixture-of-experts layer: router, dispatch, experts, and shared experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from impl.groups import Groups
from impl.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from impl.mlp import MLP
from impl.moe.dispatch import AllGatherDispatcher, AllToAllDispatcher, Dispatcher
from impl.moe.experts import Experts
from impl.moe.router import Choice, Losses, Routing, TopKRouter
from impl.parameters import Initialiser
from impl.partition import split

DISPATCHERS = ("all_to_all", "all_gather")


class MoELayer(Module):
    """y = sum over a token's experts of probability * expert(x), + shared experts(x).

    `x` and `y` [sequence, batch, hidden] are this rank's tokens: Shard over dp and cp, and over tp
    Shard(0) with `sequence_parallel`, else Replicate. Gradients of `x` likewise, complete. The
    experts lie on the expert mesh of `groups.layout`: Shard(0) over ep, their ffn over etp. Their
    gradients are complete but for edp; the router's and the shared experts' but for dp and cp, and
    over tp as the marks say. No rank may hold more tokens than another.

    Without sequence parallelism the ranks of a tp group hold copies of tokens; each dispatches a
    part of them, and the parts are gathered again.

    Forward and backward: the collectives of the router, of the dispatcher and, under tp, of the
    shared experts' layers. Raises ValueError for sizes that do not divide (experts by ep, ffn by
    etp, `shared_ffn` and, without sequence parallelism, tokens by tp), and see `Choice.check`.
    """

    def __init__(
        self,
        hidden: int,
        *,
        ffn: int,
        num_experts: int,
        choice: Choice,
        groups: Groups,
        init: Initialiser,
        losses: Losses | None = None,
        dispatcher: str = "all_to_all",
        activation: str = "gelu",
        bias: bool = False,
        shared_ffn: int | None = None,
        sequence_parallel: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        common: dict[str, Any] = {"init": init, "dtype": dtype, "device": device}
        self.groups = groups
        self.split_tokens = groups.size("tp") > 1 and not sequence_parallel
        self.router = TopKRouter(
            hidden,
            num_experts=num_experts,
            choice=choice,
            losses=losses,
            microbatch_group=groups.tp_cp if sequence_parallel else groups.cp,
            global_group=groups.tp_dp_cp if sequence_parallel else groups.dp_cp,
            sequence_parallel=sequence_parallel,
            **common,
        )
        self.dispatch = make_dispatcher(dispatcher, top_k=choice.top_k, groups=groups)
        self.experts = Experts(
            hidden,
            ffn=ffn,
            num_experts=num_experts,
            ep_group=groups.ep,
            etp_group=groups.etp,
            activation=activation,
            bias=bias,
            **common,
        )
        self.shared = (
            MLP(
                hidden,
                ffn=shared_ffn,
                group=groups.tp,
                activation=activation,
                bias=False,
                sequence_parallel=sequence_parallel,
                **common,
            )
            if shared_ffn is not None
            else None
        )

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`y`, and this rank's summands of the auxiliary losses, which are attached already."""
        routing: Routing = self.router(x)
        y = self._routed(x, routing)
        return (y if self.shared is None else y + self.shared(x)), routing.losses

    def _routed(self, x: Tensor, routing: Routing) -> Tensor:
        tokens, chosen = x.flatten(0, -2), routing.chosen
        probabilities = routing.probabilities
        if self.split_tokens:
            tokens = scatter_to_sequence_parallel_region(tokens, group=self.groups.tp)
            chosen = split(chosen, dim=0, group=self.groups.tp)
            probabilities = scatter_to_sequence_parallel_region(probabilities, group=self.groups.tp)
        dispatched = self.dispatch(tokens, chosen)
        outputs = self.experts(dispatched.tokens, dispatched.counts)
        y = dispatched.combine(outputs, probabilities).to(x.dtype)
        if self.split_tokens:
            y = gather_from_sequence_parallel_region(
                y, group=self.groups.tp, tensor_parallel_output_grad=False
            )
        return y.view(x.shape)


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Experts in the place of a transformer layer's perceptron: how many, the ffn features of each,
    how tokens choose and how they travel, and the auxiliary losses of their choice. ValueError for
    a bias of the choice, which has to be updated between steps."""

    number: int
    ffn: int
    choice: Choice
    dispatcher: str = "all_to_all"
    bias: bool = False
    shared_ffn: int | None = None
    losses: Losses | None = None

    def __post_init__(self) -> None:
        if self.choice.expert_bias:
            raise ValueError("expert_bias: True is not allowed here; nothing would update it")


class RoutedExperts(MoELayer):
    """`MoELayer` as a part of a transformer layer: auxiliary losses are attached, `y` returned."""

    def __init__(
        self, hidden: int, *, config: ExpertsConfig, groups: Groups, **arguments: Any
    ) -> None:
        super().__init__(
            hidden,
            ffn=config.ffn,
            num_experts=config.number,
            choice=config.choice,
            groups=groups,
            dispatcher=config.dispatcher,
            bias=config.bias,
            shared_ffn=config.shared_ffn,
            losses=config.losses,
            **arguments,
        )

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """`y` of `x`."""
        y, _ = super().forward(x)
        return y

    def scale_losses(self, scale: float) -> None:
        """From now on the gradients of auxiliary losses are multiplied by `scale`."""
        self.router.losses = replace(self.router.losses, scale=scale)


def make_dispatcher(name: str, *, top_k: int, groups: Groups) -> Dispatcher:
    """A dispatcher by name. Raises ValueError for one that does not exist."""
    if name == "all_gather":
        return AllGatherDispatcher(top_k=top_k, ep_group=groups.ep, block_group=groups.etp_ep)
    if name == "all_to_all":
        return AllToAllDispatcher(top_k=top_k, ep_group=groups.ep, etp_group=groups.etp)
    raise ValueError(f"dispatcher: {name!r} is not one of {', '.join(DISPATCHERS)}")
