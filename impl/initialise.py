"""Values of the parameters of a module before training, made in either of two ways.

`initialise_whole` draws every parameter in full on the CPU, from the run's seed and its name, and
each rank keeps its part: the model is the same, bit for bit, on any layout, and every rank draws
all of what it has a part of. `initialise_local` draws this rank's part only, on its own device,
from the rank's streams of `impl.random`: nothing is larger than a part, and the model depends on
the layout. Neither communicates. Modules that are made with `init=impl.parameters.defer` never hold
a full parameter.

How a parameter lies on the ranks is read from the attributes that Megatron-LM gives it:
`tensor_model_parallel` with `partition_dim` and `partition_stride` for shards over tp, and
`allreduce` False for parameters of experts: these are stacked along dimension 0, which is split
over ep, and their shards are over etp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module, Parameter

from impl.groups import Groups
from impl.parameters import is_shard, of_expert
from impl.random import DEFAULT, EXPERT_PARALLEL, TENSOR_PARALLEL, RandomTracker, seed_of

# How many normal numbers torch draws at once.
_BLOCK = 16


class Distribution(Protocol):
    """Where the values of a parameter are drawn from."""

    def __call__(
        self, part: Tensor, *, shape: torch.Size, generator: Generator | None = None
    ) -> object:
        """Fill, in place, all or a part of a parameter whose full shape is `shape`.

        `generator` is one of the part's device, None the default one.
        """
        ...


Rule = Callable[[str, Parameter], Distribution | None]
"""The distribution of a parameter by its name and attributes; None to leave it as it is."""


def normal(std: float) -> Distribution:
    """Normal with mean zero: Megatron-LM's `init_method_normal`."""

    def fill(part: Tensor, *, shape: torch.Size, generator: Generator | None = None) -> object:
        return part.normal_(0.0, std, generator=generator)

    return fill


def scaled_normal(std: float, *, num_layers: int) -> Distribution:
    """Normal with std / sqrt(2 num_layers), for the two linear layers of a transformer layer whose
    output is added to the residual: GPT-2's rule, Megatron-LM's `scaled_init_method_normal`."""
    return normal(std / math.sqrt(2.0 * num_layers))


def kaiming_uniform(inputs: int | None = None) -> Distribution:
    """Uniform within 1 / sqrt(inputs): torch's default for linear layers. Without `inputs` they are
    those of the full weight [..., out, in]; a bias has to be given those of its weight."""

    def fill(part: Tensor, *, shape: torch.Size, generator: Generator | None = None) -> object:
        bound = 1.0 / math.sqrt(shape[-1] if inputs is None else inputs)
        return part.uniform_(-bound, bound, generator=generator)

    return fill


def transformer_rule(std: float, *, num_layers: int) -> Rule:
    """Megatron-LM's rule: row-parallel weights, which end in the residual, `scaled_normal`, other
    matrices `normal`; vectors (biases, norms) keep what their module gave them."""
    inside, output = normal(std), scaled_normal(std, num_layers=num_layers)

    def rule(name: str, parameter: Parameter) -> Distribution | None:
        if parameter.dim() - of_expert(parameter) < 2:
            return None
        if is_shard(parameter) and parameter.partition_dim == parameter.dim() - 1:  # type: ignore[attr-defined]
            return output
        return inside

    return rule


def initialise_whole(
    module: Module,
    *,
    seed: int,
    rule: Rule,
    groups: Groups,
    name_of: Callable[[str], str] = str,
) -> None:
    """Draw every parameter in full, in float32 on the CPU, and keep this rank's part, in its dtype.

    The values depend on `seed` and on the parameter's name in the model only: `name_of` makes it
    from the name in `module`, where a pipeline stage numbers its layers from zero.
    """
    for name, parameter in module.named_parameters():
        distribution = rule(name, parameter)
        if distribution is None:
            continue
        shape = _full_shape(parameter, groups)
        # torch draws whole blocks, and those at the end otherwise: with rows of padding, whose
        # number depends on tp, the last rows before them would be others.
        drawn = torch.empty(-(-shape.numel() // _BLOCK) * _BLOCK, dtype=torch.float32, device="cpu")
        own = Generator("cpu").manual_seed(seed_of(f"{seed}/{name_of(name)}"))
        distribution(drawn, shape=shape, generator=own)
        full = drawn[: shape.numel()].view(shape)
        for each in _splits(parameter, groups):
            full = each.part(full)
        with torch.no_grad():
            parameter.copy_(full)


def initialise_local(module: Module, *, tracker: RandomTracker, rule: Rule, groups: Groups) -> None:
    """Draw this rank's part of every parameter, in place on the tracker's device.

    Shards come from the tensor-parallel stream, parameters of experts from the expert-parallel one,
    and replicated parameters from the default one. All ranks of a data- or context-parallel group
    hold the same module and must call this with their streams alike. ValueError for a parameter of
    an expert that etp > 1 ranks hold copies of, as they have no stream in common.
    """
    for name, parameter in module.named_parameters():
        distribution = rule(name, parameter)
        if distribution is None:
            continue
        if of_expert(parameter) and not is_shard(parameter) and groups.size("etp") > 1:
            raise ValueError(
                f"rule: {name} of experts is replicated over etp={groups.size('etp')} and cannot be"
                " drawn locally; leave it as it is, or use initialise_whole"
            )
        with torch.no_grad(), tracker.fork(_stream(parameter)):
            distribution(parameter, shape=_full_shape(parameter, groups))


def _stream(parameter: Parameter) -> str:
    if of_expert(parameter):
        return EXPERT_PARALLEL
    return TENSOR_PARALLEL if is_shard(parameter) else DEFAULT


@dataclass(frozen=True)
class _Split:
    """A dimension of a parameter that is cut into `blocks`, each shared out over `group`."""

    dim: int
    blocks: int
    group: ProcessGroup

    def part(self, full: Tensor) -> Tensor:
        """What this rank has of every block."""
        parts = full.unflatten(self.dim, (self.blocks, dist.get_world_size(self.group), -1))
        mine = parts.select(self.dim + 1, dist.get_rank(self.group))
        return mine.flatten(self.dim, self.dim + 1)


def _splits(parameter: Parameter, groups: Groups) -> Iterator[_Split]:
    if of_expert(parameter):
        yield _Split(0, 1, groups.ep)
    if is_shard(parameter):
        dim, blocks = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
        yield _Split(dim, blocks, groups.etp if of_expert(parameter) else groups.tp)


def _full_shape(parameter: Parameter, groups: Groups) -> torch.Size:
    shape = list(parameter.shape)
    for each in _splits(parameter, groups):
        shape[each.dim] *= dist.get_world_size(each.group)
    return torch.Size(shape)
