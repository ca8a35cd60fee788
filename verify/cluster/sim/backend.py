"""The torch.distributed backend of the ranks of a simulated world.

`SimGroup` is one rank's process group: it turns what torch.distributed asks of a group into calls
of the exchange. Arguments are refused that gloo or NCCL refuses: so tensors have to be contiguous,
which gloo asks of those that are sent and received, and NCCL of all others.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Work
from torch.distributed import distributed_c10d
from torch.futures import Future

from verify.cluster.sim.callsite import call_site
from verify.cluster.sim.collectives import Reduction
from verify.cluster.sim.defects import meet
from verify.cluster.sim.exchange import Call, Exchange
from verify.cluster.sim.scheduler import HERE
from verify.errors import HarnessError

BACKEND = "sim"
_SUM = Reduction("sum")


# Their stubs overload every method; subclasses override the one that Python code calls.
_Group: Any = dist.ProcessGroup
_Work: Any = Work
_c10d: Any = torch._C._distributed_c10d


class SimWork(_Work):
    """A call on its way. `wait` lets other ranks run until it is done."""

    def __init__(self, exchange: Exchange, call: Call) -> None:
        super().__init__()
        self._exchange, self._call = exchange, call

    def wait(self, timeout: object = None) -> bool:
        """Block until the outputs are there. A wait that cannot end is known without a timeout."""
        self._exchange.wait(self._call)
        return True

    def is_completed(self) -> bool:
        """Whether `wait` would return at once. A program may poll, so others get their turn."""
        if not self._call.done:
            self._exchange.run.give_way()
        if self._call.done:
            self._exchange.wait(self._call)
        return self._call.done

    def is_success(self) -> bool:
        """Whether it is completed; a simulated operation does not fail in between."""
        return self.is_completed()

    def synchronize(self) -> None:
        """The same as `wait`."""
        self.wait()

    def block_current_stream(self) -> None:
        """The same as `wait`: there are no streams."""
        self.wait()

    def exception(self) -> None:
        """None: failures end the run."""

    def result(self) -> list[Tensor]:
        """The outputs."""
        self.wait()
        return list(self._call.outputs)

    def source_rank(self) -> int:
        """The group rank whose message a receive got."""
        if self._call.source is None:
            raise RuntimeError(f"source_rank of {self._call.text()}, which has received nothing")
        return self._call.source

    _source_rank = source_rank

    def get_future(self) -> Future:
        """A completed future of the outputs; waits for them, because nobody else could."""
        future: Future = Future()
        future.set_result(self.result())
        return future

    getFuture = get_future


class SimGroup(_Group):
    """One rank's process group; `ranks` are global, by group rank."""

    def __init__(self, exchange: Exchange, name: str, ranks: tuple[int, ...], member: int) -> None:
        super().__init__(member, len(ranks))
        self._exchange, self._name, self._member = exchange, name, member
        self._size, self._ranks = len(ranks), ranks
        self._channel = exchange.channel(name, ranks, ranks[member])

    @property
    def group_name(self) -> str:
        """The name under which the members meet."""
        return self._name

    def rank(self) -> int:
        """This rank's index in the group."""
        return self._member

    def size(self) -> int:
        """Number of members."""
        return self._size

    def getBackendName(self) -> str:
        """The backend's name."""
        return BACKEND

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> SimWork:
        _check_contiguous(tensors)
        return self._call("all_reduce", tensors, tensors, _reduction(opts), opts)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: list[Tensor], opts: Any) -> SimWork:
        _check_contiguous(tensors)
        settings = (*_reduction(opts), opts.rootRank)
        outputs = tensors if opts.rootRank == self._member else ()
        return self._call("reduce", tensors, outputs, settings, opts)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> SimWork:
        _check_contiguous(tensors)
        outputs = () if opts.rootRank == self._member else tensors
        return self._call("broadcast", tensors, outputs, (opts.rootRank,), opts)

    def allgather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> SimWork:
        _check_contiguous(inputs)
        _check_count("tensor_list", outputs[0], self._size)
        return self._call("all_gather", inputs[:1], outputs[0], (), opts)

    def allgather_coalesced(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> SimWork:
        """`outputs` has a list of all inputs for every member."""
        _check_count("output_tensor_lists", outputs, self._size)
        works = [
            self._call("all_gather", [tensor], [per[i] for per in outputs], (), opts)
            for i, tensor in enumerate(inputs)
        ]
        return self._all(works)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> SimWork:
        return self.all_gather_single_coalesced([output], [input], opts)

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> SimWork:
        _check_contiguous([*outputs, *inputs])
        for output, given in zip(outputs, inputs, strict=True):
            _check_ratio("output", output, "input", given, self._size)
        return self._call("all_gather_into_tensor", inputs, outputs, (), opts)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None
    ) -> SimWork:
        _check_contiguous([*outputs, *inputs[0]])
        _check_count("input_list", inputs[0], self._size)
        return self._call("reduce_scatter", inputs[0], outputs[:1], _reduction(opts), opts)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> SimWork:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> SimWork:
        _check_contiguous([*outputs, *inputs])
        for output, given in zip(outputs, inputs, strict=True):
            _check_ratio("input", given, "output", output, self._size)
        return self._call("reduce_scatter_tensor", inputs, outputs, _reduction(opts), opts)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> SimWork:
        _check_contiguous(inputs)
        mine: Sequence[Tensor] = ()
        if opts.rootRank == self._member:
            mine = outputs[0]
            _check_count("gather_list", mine, self._size)
        return self._call("gather", inputs[:1], mine, (opts.rootRank,), opts)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> SimWork:
        mine: Sequence[Tensor] = ()
        if opts.rootRank == self._member:
            mine = inputs[0]
            _check_count("scatter_list", mine, self._size)
        return self._call("scatter", mine, outputs[:1], (opts.rootRank,), opts)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> SimWork:
        _check_contiguous([*outputs, *inputs])
        _check_count("output_tensor_list", outputs, self._size)
        _check_count("input_tensor_list", inputs, self._size)
        return self._call("all_to_all", inputs, outputs, (), opts)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        opts: Any = None,
    ) -> SimWork:
        _check_contiguous([output, input])
        _check_splits("output", output, output_split_sizes, self._size)
        _check_splits("input", input, input_split_sizes, self._size)
        own = (input_split_sizes or None, output_split_sizes or None)
        return self._call("all_to_all_single", [input], [output], (), opts, own)

    alltoall_base = all_to_all_single

    def barrier(self, opts: Any = None) -> SimWork:
        return self._call("barrier", (), (), (), opts)

    def send(self, tensors: list[Tensor], target: int, tag: int = 0) -> SimWork:
        _check_contiguous(tensors)
        call = self._new("send", tensors, (), (), True)
        self._exchange.send(self._channel, call, self._member, target, tag)
        return SimWork(self._exchange, call)

    def recv(self, tensors: list[Tensor], source: int, tag: int = 0) -> SimWork:
        return self._receive(tensors, source, tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> SimWork:
        return self._receive(tensors, None, tag)

    def _start_coalescing(self, device: object) -> None:
        """Calls are carried out one by one."""

    def _end_coalescing(self, device: object) -> SimWork:
        return self._all([])

    def shutdown(self) -> None:
        """Nothing is held."""

    abort = shutdown

    def set_timeout(self, timeout: object) -> None:
        """Has no effect: what cannot end is known at once."""

    def _set_sequence_number_for_group(self) -> None:
        """The exchange counts."""

    def _receive(self, tensors: list[Tensor], source: int | None, tag: int) -> SimWork:
        _check_contiguous(tensors)
        call = self._new("recv", (), tensors, (), True)
        self._exchange.receive(self._channel, call, source, self._member, tag)
        return SimWork(self._exchange, call)

    def _call(
        self,
        kind: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        settings: tuple[Any, ...],
        opts: Any,
        own: tuple[Any, ...] = (),
    ) -> SimWork:
        call = self._new(kind, inputs, outputs, settings, getattr(opts, "asyncOp", True), own)
        self._exchange.join(self._channel, self._member, call)
        return SimWork(self._exchange, call)

    def _new(
        self,
        kind: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        settings: tuple[Any, ...],
        asynchronous: bool,
        own: tuple[Any, ...] = (),
    ) -> Call:
        frame = sys._getframe(2)
        rank, site = self._ranks[self._member], call_site(frame)
        call = Call(kind, rank, inputs, outputs, settings, site, own, asynchronous)
        meet(call, frame)
        return call

    def _all(self, works: Sequence[SimWork]) -> SimWork:
        """The work of several calls together."""
        call = Call("calls", self._ranks[self._member], (), (), (), None, done=True)
        work = SimWork(self._exchange, call)

        def deliver() -> None:
            for each in works:
                each.wait()

        call.deliver = deliver
        return work


def _reduction(opts: Any) -> tuple[Reduction]:
    return (_SUM if opts is None else Reduction.of(opts.reduceOp),)


def _check_contiguous(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(
                f"Tensors must be contiguous, got {list(tensor.shape)} with strides"
                f" {list(tensor.stride())}"
            )


def _check_count(name: str, tensors: Sequence[object], size: int) -> None:
    if len(tensors) != size:
        raise ValueError(f"{name}: {len(tensors)} entries for a group of {size}; give {size}")


def _check_ratio(large: str, whole: Tensor, small: str, part: Tensor, size: int) -> None:
    if whole.numel() != size * part.numel():
        raise ValueError(
            f"{large} tensor size must be equal to world_size times {small} tensor size: got"
            f" {list(whole.shape)} and {list(part.shape)} in a group of {size}"
        )
    if whole.dtype is not part.dtype:
        raise TypeError(f"{large} is {whole.dtype} and {small} is {part.dtype}; they must agree")


def _check_splits(name: str, tensor: Tensor, sizes: Sequence[int] | None, size: int) -> None:
    length = tensor.shape[0] if tensor.dim() else 0
    if sizes:
        _check_count(f"{name}_split_sizes", sizes, size)
        if sum(sizes) != length:
            raise ValueError(
                f"{name}_split_sizes: {list(sizes)} sum to {sum(sizes)}, dimension 0 of the {name}"
                f" is {length}"
            )
    elif length % size:
        raise ValueError(
            f"{name}: dimension 0 of {list(tensor.shape)} does not divide by the group size {size}"
        )


def _create(options: Any, _: object) -> SimGroup:
    """Called by torch.distributed to make a rank's group."""
    run = HERE.run
    if run is None:
        raise HarnessError(f"the backend {BACKEND!r} exists only inside ranks of the sim cluster")
    ranks = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
    return SimGroup(run.exchange, options.group_id, ranks, options.group_rank)


def register() -> None:
    """Make the backend known to torch.distributed, once a process."""
    if not hasattr(dist.Backend, BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu", "cuda"])


@contextmanager
def every_backend_is_simulated() -> Iterator[None]:
    """While inside, rank threads get a simulated group whatever backend they ask for by name: a
    real one among threads of one process would wait for ever, where no scheduler sees it."""
    original = distributed_c10d._new_process_group_helper

    def helper(size: Any, rank: Any, ranks: Any, backend: Any, *rest: Any, **named: Any) -> Any:
        if HERE.run is not None:
            backend = dist.Backend(BACKEND)
            named["backend_options"] = None
        return original(size, rank, ranks, backend, *rest, **named)

    distributed_c10d._new_process_group_helper = helper  # type: ignore[assignment]
    _c10d._set_thread_isolation_mode(True)
    try:
        yield
    finally:
        _c10d._set_thread_isolation_mode(False)
        distributed_c10d._new_process_group_helper = original
