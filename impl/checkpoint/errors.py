"""What goes wrong with a checkpoint, in one line."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that is damaged, foreign, or of something else; or one that cannot be written.
    The message is one line for who named it."""
