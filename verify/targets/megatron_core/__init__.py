"""The target `megatron-core`: PyPI's megatron-core, unmodified, on the CPU or on GPUs.

On the CPU the modules in `stand_ins` take the place of CUDA; in rank threads the state that
`rank_state` finds is kept apart for each rank. Both are listed in the report of every run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from verify.case import HARNESS_OPTIONS, Case
from verify.errors import BadArgument
from verify.layout import Layout
from verify.targets.megatron_core import stand_ins

if TYPE_CHECKING:
    from verify.checks.rerun import Checkpoint
    from verify.checks.stream_laws import Draw
    from verify.checks.stream_misuse import Tracker
    from verify.target import RankState, Subject
    from verify.targets.megatron_core.rank_state import Found, GlobalState

DISTRIBUTION, PACKAGE = "megatron-core", "megatron.core"
SEED = 1234

# What only runs with CUDA, so no rank on a CPU writes it; swapping it would cost every hand-over.
_NEEDS_CUDA = (
    "megatron.core.distributed.fsdp",
    "megatron.core.inference",
    "megatron.core.nccl_allocator",
    "megatron.core.transformer.cuda_graphs",
    "megatron.core.transformer.moe.fused_a2a",
)

# Each has BUILDERS and OPTIONS by concept, and `lacks`, why a case is not supported.
_ADAPTERS = (
    "subjects",
    "random",
    "experts",
    "attention",
    "training",
    "layer",
    "pipeline",
    "gpt",
    "multi_token",
)


class Session:
    """megatron-core on one rank, its groups made for one layout."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def groups(self) -> Mapping[str, tuple[int, ...]]:
        """This rank's members of each kind of group that `parallel_state` has."""
        from verify.targets.megatron_core.groups import members

        return members()

    def probe(self, kind: str) -> list[int]:
        """The global ranks that an all-gather over the real group of `kind` brings together.

        Raises BadArgument for a kind that this rank has no group of.
        """
        from verify.targets.megatron_core.groups import group_of

        group = group_of(kind)
        if group is None:
            raise BadArgument(
                f"kind: rank {dist.get_rank()} has no {kind!r} group in megatron-core"
            )
        mine = torch.tensor([dist.get_rank()], device=_device())
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, mine, group=group)
        return [int(rank) for rank in everyone]

    def build(self, case: Case) -> Subject:
        """The subject of a supported case; raises what megatron-core raises where it refuses."""
        builders = {name: b for each in _adapters() for name, b in each.BUILDERS.items()}
        return builders[case.concept](case)

    def tracker(self) -> Tracker:
        """This rank's random streams."""
        from verify.targets.megatron_core import random

        return random.Streams()

    def checkpoint(self) -> Checkpoint:
        """How Megatron computes a function again in backward."""
        from verify.targets.megatron_core import random

        return random.checkpoint

    def streams(self) -> Mapping[str, Draw]:
        """How to draw from this rank's random stream of every region that Megatron knows."""
        from verify.targets.megatron_core import random

        return random.streams()


class Target:
    """PyPI's megatron-core as an implementation under test."""

    name = DISTRIBUTION

    def __init__(self) -> None:
        if importlib.util.find_spec("megatron") is None:
            raise BadArgument(
                f"target: {DISTRIBUTION} is not installed; pip install {DISTRIBUTION}"
            )

    def version(self) -> str:
        """The installed version of the distribution."""
        return importlib.metadata.version(DISTRIBUTION)

    def stand_ins(self) -> tuple[str, ...]:
        """What takes the place of CUDA, one line each; empty where ranks run on CUDA."""
        return stand_ins.listed()

    def supports(self, case: Case) -> str | None:
        """None, or why megatron-core or this adapter cannot do the case."""
        concepts = {concept for each in _adapters() for concept in each.BUILDERS}
        concepts |= set() if "random" in _unfit() else {"random_streams", "recomputed_function"}
        if case.concept not in concepts:
            return "; ".join((f"no adapter for {case.concept}", *_unfit().values()))
        options = {c: names for each in _adapters() for c, names in each.OPTIONS.items()}
        known = options.get(case.concept, frozenset()).union(HARNESS_OPTIONS)
        if foreign := set(case.options) - known:
            # One of them, so that a run counts few reasons.
            return f"{case.concept} has no option {min(foreign)}"
        for reason in (each.lacks(case) for each in _adapters()):
            if reason is not None:
                return reason
        return None

    def rank_state(self) -> tuple[RankState, ...]:
        """One object for all of megatron-core; ask before the first rank runs."""
        return (_state(),)

    def rank_state_report(self) -> dict[str, tuple[str, ...]]:
        """Process-global state by what was done about it: `found` in the source of the imported
        modules, `swapped` at hand-overs so far, `shared` between the ranks."""
        state, found = _state(), _found()
        shared = [each for each in found if each.how == "shared" or _needs_cuda(each)]
        return {
            "found": tuple(map(str, found)),
            "swapped": state.swapped(),
            "shared": tuple(map(str, shared)),
        }

    @contextlib.contextmanager
    def session(self, layout: Layout) -> Iterator[Session]:
        """Collective: make Megatron's groups and its random states for `layout`; undo both."""
        from verify.targets.megatron_core import groups, random

        state, generator = _state(), torch.get_rng_state()
        with stand_ins.applied():
            try:
                groups.initialise(layout)
                random.seed(SEED)
                yield Session(layout)
                # Not after an error: the world may be broken, and its cluster replaces it then.
                groups.destroy()
            finally:
                # `save` notes what was written since, which `load` then puts back.
                state.save()
                state.load(state.fresh())
                torch.set_rng_state(generator)


def _device() -> torch.device:
    return torch.device("cpu") if stand_ins.needed() else torch.device("cuda")


def _needs_cuda(found: Found) -> bool:
    return stand_ins.needed() and found.owner.startswith(_NEEDS_CUDA)


def _adapters() -> tuple[ModuleType, ...]:
    """The modules of adapters, which import all of megatron-core that is in use."""
    return tuple(each for each in _imported().values() if isinstance(each, ModuleType))


def _unfit() -> Mapping[str, str]:
    """Of adapters that do not fit the installed version, why, by their names."""
    return {name: each for name, each in _imported().items() if isinstance(each, str)}


@cache
def _imported() -> Mapping[str, ModuleType | str]:
    """Every adapter, or what another version of megatron-core lacks for it. What is warned of
    meanwhile is that TransformerEngine and apex are missing, and neither runs on a CPU."""
    found: dict[str, ModuleType | str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _ADAPTERS:
            try:
                found[name] = importlib.import_module(f"{__name__}.{name}")
            except ImportError as error:
                if not (error.name or "").startswith(PACKAGE):
                    raise
                found[name] = f"this version does not fit the adapter {name}: {error.msg}"
    return found


@cache
def _found() -> tuple[Found, ...]:
    from verify.targets.megatron_core import rank_state

    _adapters()
    return tuple(rank_state.find(PACKAGE))


@cache
def _state() -> GlobalState:
    from verify.targets.megatron_core.rank_state import GlobalState

    return GlobalState(each for each in _found() if not _needs_cuda(each))
