"""Notices a target that has the reference compute for it, and so would be compared with itself.

While a target's code runs, every call on its thread is looked at: what hands back tensors and
belongs to `verify.oracle`, `verify.reference` or `verify.lens`, or is the contract's reference, is
no implementation of the target's. What these modules say in other than tensors, such as rules,
plans and sizes, is anybody's to ask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

from torch import Tensor

from verify.case import Case
from verify.errors import Mismatch
from verify.lens import Generated, Problem
from verify.oracle.contract import Contract

# Looking takes a third of a check: at one case of so many, the simplest among them, a few percent.
ONE_OF = 8
_OURS = ("verify.oracle", "verify.reference", "verify.lens")


def is_looked_at(case: Case) -> bool:
    """Whether calls are looked at in a case: all ranks', as one might compute for the
    others and hand it on."""
    return case.seed % ONE_OF == 0


class Borrowed:
    """The names of the reference's functions that a target has called while it was watched, which
    it is only if `looks`."""

    def __init__(self, contract: Contract, *, looks: bool) -> None:
        self.looks = looks
        self.calls: dict[str, None] = {}
        self._reference: CodeType | None = getattr(contract.reference, "__code__", None)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, the target's code runs. A profiler of the thread is told as before."""
        if not self.looks:
            yield
            return
        before = sys.getprofile()
        sys.setprofile(self._noticing(before))
        try:
            yield
        finally:
            sys.setprofile(before)

    def refuse(self) -> None:
        """Raise Mismatch, with the names, where there were such calls."""
        if self.calls:
            raise Mismatch(
                f"it has the reference compute: {', '.join(self.calls)}; what would be compared is"
                " the reference with itself"
            )

    def _noticing(self, before: Any) -> Callable[[FrameType, str, Any], None]:
        def notice(frame: FrameType, event: str, returned: Any) -> None:
            if event == "return" and self._is_ours(frame) and _has_tensors(returned):
                module = frame.f_globals.get("__name__", "")
                self.calls[f"{module}.{frame.f_code.co_qualname}"] = None
            if before is not None:
                before(frame, event, returned)

        return notice

    def _is_ours(self, frame: FrameType) -> bool:
        if frame.f_code is self._reference:
            return True
        module = frame.f_globals.get("__name__")
        return isinstance(module, str) and module.startswith(_OURS)


def _has_tensors(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_tensors, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return any(map(_has_tensors, value))
    return isinstance(value, Tensor | Generated | Problem)
