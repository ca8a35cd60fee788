"""What stands in for CUDA, and what only runs there, while a rank of a CPU cluster runs
megatron-core. Nothing else does.

`applied()` is entered by each rank and left by it. Functions are replaced in the process when the
first rank enters and put back when the last one leaves, because ranks may be threads of one
process; device arguments are redirected in the calling thread only. On CUDA there are none.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Linear
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _Event:
    """A CUDA stream or event where everything has already happened when the call returns."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> _Event:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def nothing(self, *args: object, **kwargs: object) -> None:
        """Order is program order, so there is nothing to wait for or to record."""

    synchronize = wait_stream = wait_event = wait = record = nothing

    def record_event(self, event: _Event | None = None) -> _Event:
        return event if event is not None else _Event()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        return 0.0


class _Generators(tuple[torch.Generator, ...]):
    """`torch.cuda.default_generators` where every device is the CPU, whatever it is indexed by."""

    def __getitem__(self, index: Any) -> Any:
        return torch.default_generator


_STREAM = _Event()


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _run_now(callback: Callable[[], Any], **kwargs: object) -> None:
    callback()


def _get_rng_state(device: object = None) -> Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(state: Tensor, device: object = None) -> None:
    torch.default_generator.set_state(state)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _current_device() -> torch.device:
    return CPU


def _barrier_of(original: Callable[..., Any]) -> Callable[..., Any]:
    def barrier(group: Any = None, async_op: bool = False, device_ids: object = None) -> Any:
        return original(group=group, async_op=async_op)

    return barrier


def _all_to_all_single_of(original: Callable[..., Any]) -> Callable[..., Any]:
    def as_list(sizes: Any) -> Any:
        return sizes.tolist() if isinstance(sizes, Tensor) else sizes

    def all_to_all_single(
        output: Tensor,
        input: Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        outgoing, incoming = as_list(input_split_sizes), as_list(output_split_sizes)
        return original(output, input, incoming, outgoing, group, async_op)

    return all_to_all_single


def _on_cpu(value: Any) -> Any:
    """The CPU where `value` names a CUDA device, else `value`."""
    if isinstance(value, str):
        return CPU if value.startswith("cuda") else value
    if isinstance(value, torch.device):
        return CPU if value.type == "cuda" else value
    return value


class _CudaMeansCpu(TorchFunctionMode):
    """In this thread: a device argument that names CUDA means the CPU, memory is never pinned."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is Tensor.cuda:
            return args[0]
        if function is Tensor.pin_memory:
            return args[0]
        if function is Tensor.type and len(args) == 1 and not kwargs:
            return str(function(*args)).replace("torch.", "torch.cuda.", 1)
        if function is Tensor.to:
            args = (args[0], *(_on_cpu(value) for value in args[1:]))
        if not kwargs:
            return function(*args)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _on_cpu(kwargs["device"])}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return function(*args, **kwargs)


class _NotAboutTheSharedGenerator(logging.Filter):
    """Drops the one warning that follows from CUDA and CPU sharing a generator here."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.getMessage() != "CPU RNG state changed within GPU RNG context"


class DuplicatedLinear(Linear):
    """x weight^T, of which every rank of tp has the weight, as `TELinear` in its parallel mode
    `duplicated`: with sequence parallelism its gradient is of this rank's tokens. What initialises
    the weight has no effect, as the harness writes it."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str,
        config: Any,
        init_method: object,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        skip_weight_param_allocation: bool,
        tp_comm_buffer_name: str,
        tp_group: object = None,
    ) -> None:
        if parallel_mode != "duplicated" or tp_group is not None:
            raise ValueError(f"parallel_mode: {parallel_mode!r} has no stand-in; give 'duplicated'")
        if bias or skip_bias_add or is_expert or skip_weight_param_allocation:
            raise ValueError(f"{tp_comm_buffer_name}: only a weight of no expert has a stand-in")
        super().__init__(input_size, output_size, bias=False, dtype=config.params_dtype)
        for name, value in {
            "allreduce": True,
            "sequence_parallel": config.sequence_parallel,
        }.items():
            setattr(self.weight, name, value)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """The product, and no bias to add."""
        return super().forward(x), None


_UNDEFINED = object()
_SHARED_GENERATOR = _NotAboutTheSharedGenerator()
_RNG_MODULE = "megatron.core.tensor_parallel.random"

# (what the report says, ((object path, attribute, replacement or factory from the original), ...))
_Replacement = tuple[str, str, Any]
_LIST: tuple[tuple[str, tuple[_Replacement, ...]], ...] = (
    (
        "torch.cuda.current_device answers the CPU: Megatron uses it as the device of new tensors",
        (("torch.cuda", "current_device", _current_device),),
    ),
    (
        "the CUDA random generator is the rank's default CPU generator: its state is got, set and "
        "seeded, at once and not when CUDA starts; the warning that CPU state changed is dropped",
        (
            ("torch.cuda", "default_generators", _Generators((torch.default_generator,))),
            ("torch.cuda", "get_rng_state", _get_rng_state),
            ("torch.cuda", "set_rng_state", _set_rng_state),
            ("torch.cuda.random", "get_rng_state", _get_rng_state),
            ("torch.cuda.random", "set_rng_state", _set_rng_state),
            ("torch.cuda", "manual_seed", _seed),
            ("torch.cuda", "manual_seed_all", _seed),
            (_RNG_MODULE, "_lazy_call", _run_now),
            (_RNG_MODULE, "_lazy_init", _always(None)),
        ),
    ),
    (
        "CUDA streams, events and synchronize are without effect: the CPU works in program order",
        (
            ("torch.cuda", "Stream", _Event),
            ("torch.cuda", "Event", _Event),
            ("torch.cuda", "stream", _always(_STREAM)),
            ("torch.cuda", "current_stream", _always(_STREAM)),
            ("torch.cuda", "default_stream", _always(_STREAM)),
            ("torch.cuda", "synchronize", _always(None)),
        ),
    ),
    (
        "CUDA memory counters answer 0 and empty_cache has no effect; nvtx ranges are not recorded",
        (
            ("torch.cuda", "memory_allocated", _always(0)),
            ("torch.cuda", "max_memory_allocated", _always(0)),
            ("torch.cuda", "memory_reserved", _always(0)),
            ("torch.cuda", "reset_peak_memory_stats", _always(None)),
            ("torch.cuda", "empty_cache", _always(None)),
            ("torch.cuda.nvtx", "range_push", _always(0)),
            ("torch.cuda.nvtx", "range_pop", _always(0)),
        ),
    ),
    (
        "te_general_gemm is None in moe_utils: without TransformerEngine 0.16.1 does not define it "
        "and every router raises a NameError",
        (("megatron.core.transformer.moe.moe_utils", "te_general_gemm", None),),
    ),
    (
        "TELinear is torch's linear in multi_latent_attention, with the attributes of one that all "
        "ranks have: without TransformerEngine it is a mock, of which isinstance cannot be asked",
        (("megatron.core.transformer.multi_latent_attention", "TELinear", DuplicatedLinear),),
    ),
)
_WRAPPED: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    (
        "torch.distributed.barrier is called without device_ids, which only NCCL takes",
        "barrier",
        _barrier_of,
    ),
    (
        "torch.distributed.all_to_all_single gets lists where split sizes are given as tensors, "
        "which only NCCL takes",
        "all_to_all_single",
        _all_to_all_single_of,
    ),
)
_REDIRECTED = (
    "a device argument that names CUDA, Tensor.cuda and Tensor.to('cuda') mean the CPU, and pinned "
    "memory is ordinary memory; Tensor.type names the type of a tensor on CUDA"
)


def listed() -> tuple[str, ...]:
    """One line for each stand-in, for the report; empty where this process would run on CUDA."""
    if not needed():
        return ()
    return (*(line for line, _ in _LIST), _REDIRECTED, *(line for line, _, _ in _WRAPPED))


def needed() -> bool:
    """Whether ranks of this process compute on the CPU: there is no CUDA device, or the default
    device, which a cluster on CUDA sets in each rank, is not one."""
    return not torch.cuda.is_available() or torch.get_default_device().type != "cuda"


class _Patches:
    """The process-wide replacements, in place while at least one rank is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ranks = 0
        self._originals: list[tuple[object, str, Any]] = []

    def enter(self) -> None:
        with self._lock:
            self._ranks += 1
            if self._ranks == 1:
                self._replace()

    def leave(self) -> None:
        with self._lock:
            self._ranks -= 1
            if self._ranks == 0:
                self._restore()

    def _replace(self) -> None:
        from importlib import import_module

        for _, replacements in _LIST:
            for path, name, value in replacements:
                self._set(import_module(path), name, value)
        for _, name, wrap in _WRAPPED:
            self._set(dist, name, wrap(getattr(dist, name)))
        logging.getLogger(_RNG_MODULE).addFilter(_SHARED_GENERATOR)

    def _set(self, module: object, name: str, value: Any) -> None:
        self._originals.append((module, name, getattr(module, name, _UNDEFINED)))
        setattr(module, name, value)

    def _restore(self) -> None:
        logging.getLogger(_RNG_MODULE).removeFilter(_SHARED_GENERATOR)
        while self._originals:
            module, name, value = self._originals.pop()
            if value is _UNDEFINED:
                delattr(module, name)
            else:
                setattr(module, name, value)


_PATCHES = _Patches()


@contextlib.contextmanager
def applied() -> Iterator[None]:
    """While inside, this rank finds the stand-ins instead of CUDA. Undone at the end."""
    if not needed():
        yield
        return
    _PATCHES.enter()
    try:
        with _CudaMeansCpu():
            yield
    finally:
        _PATCHES.leave()
