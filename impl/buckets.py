"""How tensors lie in a flat buffer that is communicated in buckets. Arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Where tensor `index` lies: elements `start` to `stop` of the buffer."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class Bucket:
    """Elements `start` to `stop` of the buffer: whole tensors one after the other, and padding."""

    start: int
    stop: int
    spans: tuple[Span, ...]

    def shard(self, part: int, *, parts: int) -> range:
        """The elements of the buffer that are part number `part` of equally many."""
        length = (self.stop - self.start) // parts
        return range(self.start + part * length, self.start + (part + 1) * length)


def lay_out(numels: Sequence[int], *, bucket_size: int | None, parts: int) -> tuple[Bucket, ...]:
    """The buckets of tensors of so many elements, in the order of the buffer.

    The tensors come last to first, because backward makes the gradients of a model about in that
    order, so that the first bucket is complete soon. A bucket ends with the tensor by which it has
    `bucket_size` elements or more, or never for None, and is padded to divide into equal `parts`.
    ValueError for a bucket size below 1.
    """
    if bucket_size is not None and bucket_size < 1:
        raise ValueError(f"bucket_size: {bucket_size} is less than one element; give 1 or more")
    buckets: list[Bucket] = []
    spans: list[Span] = []
    start = end = 0
    for index in reversed(range(len(numels))):
        spans.append(Span(index, end, end + numels[index]))
        end += numels[index]
        if index == 0 or (bucket_size is not None and end - start >= bucket_size):
            end += -(end - start) % parts
            buckets.append(Bucket(start, end, tuple(spans)))
            spans, start = [], end
    return tuple(buckets)
