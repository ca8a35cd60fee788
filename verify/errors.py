"""The tree of errors. Three kinds: a bad argument, a wrong target, a broken harness.

`BadArgument` is the caller's mistake: one line that names the argument, what was given and what is
allowed. `Mismatch` and the cluster failures are the target's mistake. `HarnessError` is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from verify.finding import Finding


class ShardproofError(Exception):
    """Base of everything Shardproof raises on purpose."""


class BadArgument(ShardproofError, ValueError):
    """A wrong argument, option, layout or file. The message is one line for who gave it."""


class Mismatch(ShardproofError, AssertionError):
    """The candidate computed something else than the reference. The message is the explanation;
    `finding` holds it in parts, where a check of `verify.property` raised it."""

    def __init__(self, message: str = "", finding: Finding | None = None) -> None:
        super().__init__(message)
        self.finding = finding


class HarnessError(ShardproofError, RuntimeError):
    """Shardproof itself could not do its work; the verdict is `unknown`, never `passed`."""


class BeyondRange(HarnessError):
    """The reference overflows in the dtype of a case, and nothing else is wrong: nothing can be
    said of a candidate that does or does not. In a run the example is counted as left out."""


class WorldLost(HarnessError):
    """A rank that torchrun or Slurm started is gone; nothing can run on this world any more."""


class NotSupported(ShardproofError):
    """The target does not declare the capability that a case needs."""
