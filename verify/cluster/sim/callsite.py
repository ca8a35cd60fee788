"""Where in the program under test a collective was issued."""

from __future__ import annotations

import contextlib
import os
from types import CodeType, FrameType

import torch
import typing_extensions

_BETWEEN = (
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
    os.path.dirname(os.path.abspath(torch.__file__)) + os.sep,
    os.path.abspath(typing_extensions.__file__),
    os.path.abspath(contextlib.__file__),
    "<frozen",
)
# A mode that sees every call of torch makes none itself.
_OF_MODES = ("__torch_function__", "__torch_dispatch__")
_between: dict[CodeType, bool] = {}

CallSite = tuple[CodeType, int]


def call_site(frame: FrameType | None) -> CallSite | None:
    """The innermost frame at or above `frame` that is not torch's, the cluster's, a wrapper's or a
    mode's."""
    while frame is not None:
        code = frame.f_code
        between = _between.get(code)
        if between is None:
            between = _between[code] = code.co_name in _OF_MODES or code.co_filename.startswith(
                _BETWEEN
            )
        if not between:
            return code, frame.f_lineno
        frame = frame.f_back
    return None


def describe(site: CallSite | None) -> str:
    """`path/file.py:12 in function`, the path relative to the working directory if it is inside."""
    if site is None:
        return "an unknown place"
    code, line = site
    path = os.path.relpath(code.co_filename)
    if path.startswith(".."):
        path = code.co_filename.rpartition("site-packages" + os.sep)[2]
    return f"{path}:{line} in {code.co_qualname}"
