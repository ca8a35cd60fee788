"""Named streams of random numbers, so that ranks draw alike where they must and apart elsewhere.

torch has one default generator a device. Copies of a tensor must be dropped alike, its parts
independently, so a rank needs several sequences of numbers and has the default generator draw from
one of them at a time. Which ranks share a stream's seed is Megatron-LM's rule, with two streams
added for context parallelism, where Megatron lets all ranks of a context-parallel group drop alike:

| stream | differs over | is for |
|---|---|---|
| `default` | pp | what is replicated over tp and cp |
| `tensor-parallel` | pp, tp | shards over tp: of parameters, of activations |
| `context-parallel` | pp, cp | activations split over cp |
| `tensor-context-parallel` | pp, tp, cp | activations split over both |
| `expert-parallel` | pp, ep, etp | parameters and activations of experts |

Ranks that differ along other axes only, data-parallel replicas first of all, share their streams:
so parameters drawn from them are equal without a broadcast. The seeds are this module's own. In
Megatron-LM's a stage adds 100 and so does a rank of ep, so that the experts of stage 1, rank 0 and
of stage 0, rank 1 have the same stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

import torch
from torch import Tensor

from verify.layout import Layout

DEFAULT = "default"
TENSOR_PARALLEL = "tensor-parallel"
CONTEXT_PARALLEL = "context-parallel"
TENSOR_CONTEXT_PARALLEL = "tensor-context-parallel"
EXPERT_PARALLEL = "expert-parallel"

Stream = Callable[[], AbstractContextManager[object]]
"""Makes a context in which torch's default generator draws from one stream."""

# Slowest first. A stream is alike on ranks that differ along other axes only.
_DIFFERS: Mapping[str, tuple[str, ...]] = {
    DEFAULT: ("pp",),
    TENSOR_PARALLEL: ("pp", "tp"),
    CONTEXT_PARALLEL: ("pp", "cp"),
    TENSOR_CONTEXT_PARALLEL: ("pp", "tp", "cp"),
    EXPERT_PARALLEL: ("pp", "ep", "etp"),
}
# torch's CPU generator looks at the lower 32 bits of a seed, which leaves 4,096 blocks of seeds.
_SEEDS_A_STREAM = 2**20


@dataclass(frozen=True)
class Snapshot:
    """The states of all streams of a tracker, and the one that was being drawn from."""

    states: Mapping[str, Tensor]
    current: str


class RandomTracker:
    """The streams of one rank and device. Not shared between threads that draw at once.

    `default` is the stream of torch's default generator of `device` as found, or as seeded by
    `seed`; `add` makes others. Everything that draws from the default generator inside `fork(name)`
    takes the next numbers of that stream, in whatever order forks are nested and repeated. Outside
    of forks it draws from `default`.
    """

    def __init__(
        self, *, seed: int | None = None, device: torch.device | str | None = None
    ) -> None:
        self.device = torch.device("cpu" if device is None else device)
        self._generator = default_generator(self.device)
        self._seeds: dict[str, int] = {}
        self._states: dict[str, Tensor] = {}
        self._current = DEFAULT
        if seed is not None:
            self._generator.manual_seed(seed)
            self._seeds[DEFAULT] = seed
        self._states[DEFAULT] = self._generator.get_state()

    @property
    def names(self) -> tuple[str, ...]:
        """The streams, `default` first."""
        return tuple(self._states)

    @property
    def current(self) -> str:
        """The stream that the default generator draws from now."""
        return self._current

    def add(self, name: str, *, seed: int) -> None:
        """Add a stream. ValueError for a name that is taken, or a seed that another stream has."""
        if name in self._states:
            raise ValueError(f"name: the stream {name!r} is there already; give another name")
        for other, taken in self._seeds.items():
            if taken == seed:
                raise ValueError(
                    f"seed: {seed} is the seed of the stream {other!r}; two streams of one seed"
                    " would draw the same numbers"
                )
        self._seeds[name] = seed
        self._states[name] = torch.Generator(self.device).manual_seed(seed).get_state()

    @contextmanager
    def fork(self, name: str) -> Iterator[None]:
        """Draw from a stream inside, and from the one before again afterwards, also where an
        exception ends it. Forking one that is in use goes on with it. ValueError if unknown."""
        self._require(name)
        before = self._current
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def stream(self, name: str) -> Stream:
        """`fork(name)` as a function without arguments, for modules. Entering it raises ValueError
        if the name is unknown."""
        return partial(self.fork, name)

    def states(self) -> dict[str, Tensor]:
        """Copies of the states of all streams, in which the numbers to come are determined."""
        self._states[self._current] = self._generator.get_state()
        return {name: state.clone() for name, state in self._states.items()}

    def set_states(self, states: Mapping[str, Tensor]) -> None:
        """Put back what `states` gave: each stream goes on from there, the current one at once.
        ValueError unless they are those of exactly this tracker's streams."""
        self._restore(Snapshot(states, self._current))

    def snapshot(self) -> Snapshot:
        """All that decides what is drawn next."""
        return Snapshot(self.states(), self._current)

    @contextmanager
    def replaying(self, snapshot: Snapshot) -> Iterator[None]:
        """Draw inside what was drawn after `snapshot` was taken. Afterwards every stream, and the
        choice among them, is as if nothing had happened, also where an exception ends it."""
        before = self.snapshot()
        self._restore(snapshot)
        try:
            yield
        finally:
            self._restore(before)

    def _restore(self, snapshot: Snapshot) -> None:
        self._require_all(snapshot.states)
        self._current = snapshot.current
        self._states = {name: snapshot.states[name].clone() for name in self._states}
        self._generator.set_state(self._states[self._current])

    def _switch(self, name: str) -> None:
        self._states[self._current] = self._generator.get_state()
        self._generator.set_state(self._states[name])
        self._current = name

    def _require_all(self, names: Iterable[str]) -> None:
        if set(names) != set(self._states):
            raise ValueError(
                f"states: {', '.join(names) or 'none'} are given; the streams of this tracker are"
                f" {', '.join(self._states)}"
            )

    def _require(self, name: str) -> None:
        if name not in self._states:
            raise ValueError(
                f"name: there is no stream {name!r}; this tracker has {', '.join(self._states)}"
            )


def parallel_tracker(
    seed: int, *, layout: Layout, rank: int, device: torch.device | str | None = None
) -> RandomTracker:
    """The streams of a rank of a layout, by the table above; `seed` is that of the whole run.

    Seeds torch's default generator of the device.
    """
    seeds = stream_seeds(seed, layout=layout, rank=rank)
    tracker = RandomTracker(seed=seeds.pop(DEFAULT), device=device)
    for name, own in seeds.items():
        tracker.add(name, seed=own)
    return tracker


def stream_seeds(seed: int, *, layout: Layout, rank: int) -> dict[str, int]:
    """The seed of every stream on a rank: no two streams of a run share one, unless they are one
    stream by the table above. Runs whose `seed` is less than a million apart may share some."""
    sizes = {**layout.expert_sizes, **layout.sizes}
    coordinates = {**layout.expert_coordinates(rank), **layout.coordinates(rank)}
    found = {}
    for block, (name, axes) in enumerate(_DIFFERS.items()):
        index = 0
        for axis in axes:
            index = index * sizes[axis] + coordinates[axis]
        found[name] = seed + block * _SEEDS_A_STREAM + index
    return found


def seed_of(text: str) -> int:
    """A seed that depends on all of the text."""
    return int.from_bytes(sha256(text.encode()).digest()[:7])


def axes_of(stream: str) -> tuple[str, ...]:
    """The axes that a stream differs over, pp among them. KeyError for a name that is none."""
    return _DIFFERS[stream]


def stream_of(*axes: str) -> str:
    """The name of the stream for an activation that is split over these axes, of tp and cp.

    ValueError for another axis.
    """
    for name in (DEFAULT, TENSOR_PARALLEL, CONTEXT_PARALLEL, TENSOR_CONTEXT_PARALLEL):
        if set(_DIFFERS[name]) == {"pp", *axes}:
            return name
    raise ValueError(f"axes: {', '.join(axes)}: activations are split over tp and cp only")


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that torch's functions draw from on a device."""
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    raise ValueError(f"device: {device} has no default generator here; give a cpu or cuda device")
