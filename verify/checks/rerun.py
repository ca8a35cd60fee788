"""The checks `rerun` and `unrepeatable`: what is computed again in backward is what was computed in
forward, of a function of the harness (`verify.checks.rerun_function`), of x and a mask.

1. It runs once in forward and once in backward.
2. It is given the second time what it was given the first: values, shapes, dtypes, what requires
   gradients, and how that lies in memory, because views and the order of sums depend on it.
3. It runs under the autocast that it ran under, whatever backward runs under.
4. Output and gradients are, bit for bit, those of the function alone.
5. What it makes inside is freed when forward is done, and once more when backward is.
6. A function that saves other tensors for backward the second time is refused, on purpose: what is
   left of the first run does not fit it. Or it is seen not to matter: gradients are those of a
   function that does not change. By laws 1 to 5 one that does not is computed before.

Laws 1 to 5 are `rerun`, law 6 is `unrepeatable`. Options:

| option | says |
|---|---|
| `autocast`, `autocast_backward` | the dtype of autocast around forward, and around backward |
| `lies` | how x and the mask lie in memory, one of `LIES` |
| `distributed` | each rank of tp keeps its part of x only |
| `changed` | what is something else the second time, one of `CHANGES` |
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from verify.case import Case, Option
from verify.checks.blame import Bench
from verify.checks.refusal import is_deliberate
from verify.checks.rerun_function import CHANGES, Noted
from verify.cluster.base import Cluster
from verify.compare import same_bits
from verify.errors import BadArgument, HarnessError, NotSupported
from verify.finding import Kind
from verify.rank_program import session_of, target_code
from verify.targets import load_target

DTYPES: tuple[Option, ...] = (None, "bfloat16", "float16")


class Checkpoint(Protocol):
    """How a target has a function computed again in backward."""

    def __call__(
        self, function: Callable[..., Tensor], x: Tensor, mask: Tensor, *, distributed: bool
    ) -> Tensor:
        """`function(x, mask)`. With `distributed` x, alike on all ranks of tp, is kept in parts."""
        ...


def _transposed(full: Tensor) -> Tensor:
    return full.transpose(0, 1).contiguous().transpose(0, 1)


def _apart(full: Tensor) -> Tensor:
    wider = full.new_zeros(*full.shape[:-1], 2 * full.shape[-1])
    wider[..., ::2] = full
    return wider[..., ::2]


def _expanded(full: Tensor) -> Tensor:
    return full[:, :1].expand(full.shape)


LIES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "packed": lambda full: full,
    "transposed": _transposed,
    "apart": _apart,
    "expanded": _expanded,
}


def rerun(case: Case, *, target_name: str, cluster: Cluster) -> int:
    """A function that is computed again computes what it did, by laws 1 to 5."""
    return _judge(Bench("rerun", case, target_name, cluster))


def unrepeatable(case: Case, *, target_name: str, cluster: Cluster) -> int:
    """A function that does something else the second time is refused, by law 6."""
    return _judge(Bench("unrepeatable", case, target_name, cluster))


def _judge(bench: Bench) -> int:
    _admit(bench.case, changed=bench.check == "unrepeatable")
    bench.require_support(bench.case)
    found = bench.run(
        _complaints, bench.target_name, bench.case, world_size=bench.case.layout.world_size
    )
    if None in found:
        raise NotSupported(f"{bench.target_name} does not tell how it computes a function again")
    details = [f"rank {rank}: {text}" for rank, each in enumerate(found) for text in each or ()]
    if details:
        kind: Kind = "unrepeatable" if bench.check == "unrepeatable" else "rerun"
        raise bench.mismatch(kind, details=tuple(details))
    return len(found)


def _admit(case: Case, *, changed: bool) -> None:
    options, shape = case.options, case.shape
    for name, values in (
        ("autocast", DTYPES),
        ("autocast_backward", DTYPES),
        ("lies", (None, *LIES)),
        ("changed", tuple(CHANGES) if changed else (None,)),
    ):
        if options.get(name) not in values:
            told = ", ".join(map(str, values))
            raise BadArgument(f"case.options.{name}: {options.get(name)!r} is not one of {told}")
    if missing := {"sequence", "batch", "hidden"} - {*shape}:
        raise BadArgument(f"case.shape: {case} lacks {', '.join(sorted(missing))}")
    elements = shape["sequence"] * shape["batch"] * shape["hidden"]
    if options.get("distributed") and elements % case.layout.tp:
        raise BadArgument(f"case.shape: {elements} elements of x do not divide by tp")


def _complaints(target_name: str, case: Case) -> tuple[str, ...] | None:
    """Rank program: how the target breaks the laws; None where it does not tell its checkpoint."""
    with session_of(load_target(target_name), case.layout) as session:
        tell = getattr(session, "checkpoint", None)
        if tell is None:
            return None
        with target_code("telling how it computes a function again"):
            checkpoint: Checkpoint = tell()
        alone = _Pass(case, None)
        found = tuple(_Pass(case, checkpoint).judged(alone))
        if found or "changed" not in case.options:
            return found
        return tuple(_accepted(case, checkpoint, alone))


def _accepted(case: Case, checkpoint: Checkpoint, alone: _Pass) -> Iterator[str]:
    """How the target breaks law 6; `alone` is the pass of the function that does not change."""
    change = str(case.options["changed"])
    other = _Pass(case, checkpoint, change)
    other.forward()
    try:
        other.backward()
    except HarnessError:
        raise
    except Exception as error:
        if not is_deliberate(error) and not isinstance(error, CheckpointError):
            told = f"{type(error).__name__}: {' '.join(str(error).split())}"
            yield f"ran into an error in backward, it did not refuse: {told}"
        return
    if any(_differs(other.results[name], wanted) for name, wanted in alone.results.items()):
        yield f"computed gradients of a function that {CHANGES[change].__doc__} the second time"


class _Pass:
    """The function forward and backward, through a target's checkpoint or alone."""

    def __init__(
        self, case: Case, checkpoint: Checkpoint | None, change: str | None = None
    ) -> None:
        self._case, self._checkpoint = case, checkpoint
        at = case.layout.coordinates(dist.get_rank())
        # Alike on the ranks of tp, and on no others.
        places = "".join(str(at[axis]) for axis in sorted(at) if axis != "tp")
        self._generator = torch.Generator("cpu").manual_seed(int(f"{case.seed}{places}"))
        shape = [case.shape[name] for name in ("sequence", "batch", "hidden")]
        lay = LIES[str(case.options.get("lies", "packed"))]
        self._x = lay(self._draw(*shape)).requires_grad_()
        self._mask = lay(self._draw(*shape).round())
        self._upstream = self._draw(*shape)
        weights = {name: self._draw(shape[-1], shape[-1]).requires_grad_() for name in "ABC"}
        self._function = Noted(weights, change)
        self._held: list[int] = []
        self.results: dict[str, Tensor | None] = {}

    def _draw(self, *shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=self._generator, device="cpu", dtype=torch.float32)
        return drawn.to(torch.get_default_device())

    def judged(self, alone: _Pass) -> Iterator[str]:
        """Run, and tell how that breaks laws 1 to 5; `alone` is the same pass by the function."""
        for each in (alone, self):
            each.forward()
            each.backward()
        runs = len(self._function.runs)
        if runs != 2:
            yield f"the function ran {runs} times and should run twice, in forward and in backward"
            return
        first, again = self._function.runs
        yield from (f"computing the function again, {text}" for text in again.differs(first))
        for name, wanted in alone.results.items():
            if text := _differs(self.results[name], wanted):
                yield f"{name} {text} of the function alone"
        for when, count in zip(("forward", "backward"), self._held, strict=True):
            if count:
                yield f"after {when} {count} tensors that it made inside are still in memory"

    def forward(self) -> None:
        """Run forward."""
        call, arguments = self._function, (self._x, self._mask)
        with self._under("autocast"):
            if self._checkpoint is None:
                self._y = call(*arguments)
            else:
                with target_code("running forward"):
                    distributed = bool(self._case.options.get("distributed", False))
                    self._y = self._checkpoint(call, *arguments, distributed=distributed)
        self.results["y"] = self._y.detach().clone()
        self._hold()

    def backward(self) -> None:
        """Run backward."""
        upstream = self._upstream.to(self._y.dtype)
        with self._under("autocast_backward"), target_code("running backward"):
            self._y.backward(upstream)
        self._hold()
        self.results["the gradient of x"] = self._x.grad
        for name, weight in self._function.weights.items():
            self.results[f"the gradient of {name}"] = weight.grad

    def _hold(self) -> None:
        """Note how much of what the function made is in memory, of what can be reached."""
        if self._checkpoint is None:
            return
        if any(run.held for run in self._function.runs):
            gc.collect()
        self._held.append(sum(run.held for run in self._function.runs))

    def _under(self, option: str) -> AbstractContextManager[object]:
        name = self._case.options.get(option)
        if name is None:
            return nullcontext()
        return torch.autocast(self._x.device.type, dtype=getattr(torch, str(name)))


def _differs(found: Tensor | None, wanted: Tensor | None) -> str:
    """How a result is not the wanted one; empty where it is."""
    if found is None or wanted is None:
        return "" if found is wanted else "is there only one time, not that"
    if found.shape != wanted.shape or found.dtype is not wanted.dtype:
        return (
            f"is {list(found.shape)} {found.dtype}, not {list(wanted.shape)} {wanted.dtype}, that"
        )
    if same_bits(found, wanted):
        return ""
    worst = float((found.double() - wanted.double()).abs().max())
    return f"is not, by up to {worst:.3g}, that"
