"""What a rank notes of the forward pass beside tensors: dropout masks, what autograd keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd.grad_mode import set_multithreading_enabled
from torch.autograd.graph import saved_tensors_hooks

from verify.borrowed import Borrowed
from verify.checks.masks import applied_alike, recorded
from verify.oracle.contract import Contract


@dataclass
class Watch:
    """Notes what the contract promises something about, and nothing else.

    `masks` are the dropouts in order; `kept` counts the elements of every storage that autograd
    saved for backward, once each, but for those of `parameters`. `borrowed` is what the target has
    the reference compute.
    """

    contract: Contract
    parameters: Iterable[Tensor]
    borrowed: Borrowed
    masks: list[Tensor] = field(default_factory=list)
    _storages: dict[int, int] = field(default_factory=dict)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """While inside, forward runs."""
        with ExitStack() as stack:
            if self.contract.masks:
                self.masks = stack.enter_context(recorded())
            if self.contract.kept is not None:
                stack.enter_context(saved_tensors_hooks(self._keep, _unchanged))
            stack.enter_context(self.borrowed.watching())
            yield

    @contextmanager
    def backward(self) -> Iterator[None]:
        """While inside, backward runs, on this thread where dropouts are recorded."""
        with ExitStack() as stack:
            if self.contract.masks:
                stack.enter_context(applied_alike())
                stack.enter_context(set_multithreading_enabled(False))
            stack.enter_context(self.borrowed.watching())
            yield

    @property
    def kept(self) -> int:
        """The elements that autograd kept."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self.parameters}
        return sum(count for place, count in self._storages.items() if place not in own)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._storages[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        # A tensor that keeps itself through its own grad_fn would never be freed.
        return tensor.detach()


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
