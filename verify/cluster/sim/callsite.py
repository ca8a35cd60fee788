"""Where in the program under test a collective was issued."""

from __future__ import annotations

import os
import sys
from types import CodeType, FrameType

import torch

_OURS = (
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
    os.path.dirname(os.path.abspath(torch.__file__)) + os.sep,
)
_foreign: dict[CodeType, bool] = {}

CallSite = tuple[CodeType, int]


def call_site(frame: FrameType | None) -> CallSite | None:
    """The innermost frame at or above `frame` that is neither torch's nor the cluster's."""
    while frame is not None:
        code = frame.f_code
        foreign = _foreign.get(code)
        if foreign is None:
            foreign = _foreign[code] = not code.co_filename.startswith((*_OURS, "<frozen"))
        if foreign:
            return code, frame.f_lineno
        frame = frame.f_back
    return None


def here() -> CallSite | None:
    """The call site of whoever called into the cluster."""
    return call_site(sys._getframe(1))


def describe(site: CallSite | None) -> str:
    """`path/file.py:12 in function`, the path relative to the working directory if it is inside."""
    if site is None:
        return "an unknown place"
    code, line = site
    path = os.path.relpath(code.co_filename)
    if path.startswith(".."):
        path = code.co_filename.rpartition("site-packages" + os.sep)[2]
    return f"{path}:{line} in {code.co_qualname}"
