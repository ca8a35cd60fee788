"""A stack of perceptron layers of impl, recomputed as the case says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from torch import Tensor
from torch.nn import Module, ModuleList
from torch.nn.functional import gelu

from impl.dropout import bias_dropout_add, check_probability, dropout
from impl.groups import Groups
from impl.linear import ColumnParallelLinear, RowParallelLinear
from impl.random import TENSOR_PARALLEL, RandomTracker
from impl.recompute import Method, checkpoint, recompute_layers
from verify.case import Case
from verify.checks.rerun import Checkpoint
from verify.oracle.recompute import Plan, plan_of
from verify.targets.impl.dropout import hidden_stream, tracker_of
from verify.targets.impl.subject import Builder, ModuleSubject, Tensors, common

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "recomputed_block": ("dropout", "inner_dropout", "recompute")
}


class _Layer(Module):
    """x + dropout(fc2(inner_dropout(gelu(fc1(x)))) + fc2.bias)."""

    def __init__(self, case: Case, groups: Groups, tracker: RandomTracker) -> None:
        super().__init__()
        hidden, ffn, arguments = case.shape["hidden"], case.shape["ffn"], common(case, groups)
        self.fc1 = ColumnParallelLinear(hidden, out_features=ffn, **arguments)
        self.fc2 = RowParallelLinear(ffn, out_features=hidden, skip_bias_add=True, **arguments)
        self._tracker = tracker
        self._selective = case.options.get("recompute") == "selective"
        inner = float(case.options.get("inner_dropout", 0.0) or 0.0)
        check_probability(inner, name="inner_dropout")
        self._inner = partial(dropout, p=inner, stream=tracker.stream(TENSOR_PARALLEL))
        self._outer = partial(
            bias_dropout_add,
            p=float(case.options.get("dropout", 0.25) or 0.0),
            stream=tracker.stream(hidden_stream(case.layout)),
        )

    def forward(self, x: Tensor) -> Tensor:
        middle, _ = self.fc1(x)
        if self._selective:
            middle = checkpoint(self._activation, middle, tracker=self._tracker)
        else:
            middle = self._activation(middle)
        y, bias = self.fc2(middle)
        return self._outer(y, bias=bias, residual=x)

    def _activation(self, x: Tensor) -> Tensor:
        return self._inner(gelu(x))


class _Block(ModuleSubject):
    def __init__(
        self,
        layers: Module,
        groups: Groups,
        call: Callable[[Tensors], Tensors],
        tracker: RandomTracker,
    ) -> None:
        super().__init__(layers, groups, call)
        self._tracker = tracker

    def random_states(self) -> Mapping[str, Tensor]:
        """The state of every stream."""
        return self._tracker.states()


def recomputed_block(case: Case, groups: Groups) -> _Block:
    """Layers in a row, under the case's plan of recomputation."""
    tracker, plan = tracker_of(case.layout, seed=case.seed), plan_of(case)
    layers = ModuleList(_Layer(case, groups, tracker) for _ in range(case.shape["layers"]))

    def call(inputs: Tensors) -> Tensors:
        x = inputs["x"]
        if plan is None or plan.method == "selective":
            for layer in layers:
                x = layer(x)
        else:
            x = _recomputed(list(layers), x, plan, case, groups, tracker)
        return {"y": x}

    return _Block(layers, groups, call, tracker)


def _recomputed(
    layers: list[Any], x: Tensor, plan: Plan, case: Case, groups: Groups, tracker: RandomTracker
) -> Tensor:
    if plan.method == "nested":
        layers = [partial(checkpoint, layer, tracker=tracker) for layer in layers]
    return recompute_layers(
        layers,
        x,
        method=cast(Method, "uniform" if plan.method == "nested" else plan.method),
        num_layers=plan.layers,
        tracker=tracker,
        group=groups.tp if plan.distributed else None,
        sequence_parallel=case.layout.sequence_parallel,
    )


def checkpoint_of(groups: Groups) -> Checkpoint:
    """`checkpoint` with this rank's streams, over its group of tp where it distributes."""
    tracker = tracker_of(groups.layout)

    def run(
        function: Callable[..., Tensor], x: Tensor, mask: Tensor, *, distributed: bool
    ) -> Tensor:
        group = groups.tp if distributed else None
        found: Tensor = checkpoint(function, x, mask, tracker=tracker, group=group)
        return found

    return run


BUILDERS: Mapping[str, Builder] = {"recomputed_block": recomputed_block}
