"""What a concept promises: its tensors, how they lie on the ranks, and their computation on one.

A contract is the published semantics of, say, a column-parallel linear layer, independent of any
implementation. The harness generates the full tensors, gives every rank its part by `placements`,
compares what comes back by the same placements, and gets the expectation from `reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from verify.placement import Placements

Tensors = Mapping[str, Tensor]
# The target of a token without loss, torch's default `ignore_index`.
IGNORED = -100


@dataclass(frozen=True)
class TensorSpec:
    """A full tensor of `shape`, its placement on the ranks, and the placement of its gradient.

    For an input, `grad_placements` says how the gradient comes out; for an output, how the upstream
    gradient is given in. None: the tensor is not differentiable. `high` is set for integer tensors
    (tokens, targets), drawn from 0 to high-1; `values` for integer ones that are given as they are
    (cumulative lengths). `terms` is the least norm of the terms of which a row of an output, or of
    an input's gradient, is computed, where they cancel below what is measured.
    """

    shape: tuple[int, ...]
    placements: Placements = field(default_factory=dict)
    grad_placements: Placements | None = field(default_factory=dict)
    high: int | None = None
    values: tuple[int, ...] | None = None
    terms: float = 0.0


@dataclass(frozen=True)
class Mask:
    """A dropout of the forward pass: the full shape of what it is applied to, how that lies on the
    ranks (copies are dropped alike, parts independently), and its probability of dropping.

    Only the ranks at the coordinates `at` apply it. Parts that differ along axes of `alike` only
    may be dropped alike: replicas of a model draw the same numbers for other data.
    """

    shape: tuple[int, ...]
    placements: Placements
    p: float
    at: Mapping[str, int] = field(default_factory=dict)
    alike: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """A communication of one rank: an operation (all_gather, reduce_scatter, all_reduce,
    all_to_all, broadcast, send, recv), the kind of its group, and how many elements it sends."""

    operation: str
    kind: str
    elements: int


# What every rank communicates; or, where ranks differ, what the rank at these coordinates does.
Steps = tuple[Step, ...] | Callable[[Mapping[str, int]], tuple[Step, ...]]


@dataclass(frozen=True, kw_only=True)
class Contract:
    """The promise of one concept at one case.

    `reference(inputs, parameters)` computes the outputs on one device from full tensors, in the
    dtype of its arguments, by differentiable torch functions. `axes` names the layout axes over
    which the concept is split; along every other axis ranks are replicas, and each gets other data
    and other weights. `linear` says that outputs and gradients are sums of products of what is
    generated, so that the exact lens applies. Parameters in `frozen` do not require gradients.
    `divided` names the sizes that the ranks of the axes share out equally, besides those that the
    placements cut; of those named in `over` it is the ranks of these axes only.

    `settle`, where a result depends on decisions (which scores are the largest), is given the
    inputs and parameters as drawn, and returns inputs of which no rounding error can turn one:
    otherwise neither a candidate nor the reference's own error could be told from a wrong result.
    `terms` says of parameters what `TensorSpec.terms` says of inputs. `abrupt` says that rounding
    may change a result by much, and seldom does, as it is with Adam, which makes a whole step of a
    gradient that is zero but for rounding.

    `masks` are the dropouts of the forward pass, in the order in which each rank applies its own;
    `reference` gets what the candidate kept of each, a bool tensor, among its inputs by the mask's
    name. `forward` and `backward` are what every rank communicates, in any order, where that is
    promised (`finish` what completes gradients); `kept` is the most elements that autograd keeps on
    a rank from forward to backward, beside parameters. `message` is how many elements every message
    between stages of a pipeline has, where training promises it, and `bucket`, where gradients
    have no padding, how many a bucket is to have about: see `verify.checks.traffic`.
    """

    inputs: Mapping[str, TensorSpec]
    parameters: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, TensorSpec]
    reference: Callable[[Tensors, Tensors], Tensors]
    axes: tuple[str, ...] = ("tp",)
    linear: bool = False
    frozen: frozenset[str] = frozenset()
    divided: Mapping[str, int] = field(default_factory=dict)
    over: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    settle: Callable[[Tensors, Tensors], Tensors] | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
    abrupt: bool = False
    masks: Mapping[str, Mask] = field(default_factory=dict)
    forward: Steps | None = None
    backward: Steps | None = None
    finish: Steps | None = None
    kept: int | None = None
    message: int | None = None
    bucket: int | None = None
