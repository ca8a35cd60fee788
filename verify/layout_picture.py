"""A layout for a reader: a picture of who is where, and every group with its ranks.

Text of at most 100 columns. What does not fit is left out, and the text says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from verify.layout import Layout, Ranks

WIDTH = 100
# The most that is shown: indices of an axis, pipeline stages, lines of the groups of a kind, and
# ranks of a world whose groups are shown in full.
AXIS_LIMIT = 8
STAGE_LIMIT = 4
LINE_LIMIT = 2
RANK_LIMIT = 64

GAP = None  # an index that stands for those left out
Shown = list[int | None]


def describe(layout: Layout, *, kinds: Iterable[str] | None = None) -> str:
    """The picture and the groups of `layout`; of some `kinds` only, where they are given.

    Boxes are pipeline stages (down) and data-parallel replicas (across); in a box tp runs across
    and cp down. Where the experts lie otherwise, a second picture shows them. Raises BadArgument
    for an unknown kind.
    """
    count = layout.world_size
    lines = [str(layout) if count == 1 else f"{layout}: {count} ranks"]
    lines += [f"order {layout.order}, leftmost fastest", ""]
    lines += _Picture(layout.coordinates, layout.sizes, count).lines()
    if layout.ep > 1 or layout.expert_tp != layout.tp:
        experts = _Picture(layout.expert_coordinates, layout.expert_sizes, count)
        lines += ["", "experts", *experts.lines()]
    short = f" (shortened: more than {RANK_LIMIT} ranks)" if count > RANK_LIMIT else ""
    lines += ["", f"groups{short}"]
    names = list(layout.kinds if kinds is None else kinds)
    margin = max((len(name) for name in names), default=0) + 2
    for name in names:
        lines += _groups_of(name, layout, margin)
    return "\n".join(lines)


def _groups_of(kind: str, layout: Layout, margin: int) -> list[str]:
    groups = layout.groups(kind)
    size = len(groups[0])
    head = f"  {kind:{margin}}{f'{len(groups)} of {size}':12}"
    if size == 1 and len(groups) == layout.world_size > 1:
        return [head + "each rank alone"]
    limit = None if layout.world_size <= RANK_LIMIT else LINE_LIMIT
    lines = _wrapped(groups, WIDTH - len(head), limit, short=limit is not None)
    return [(head if i == 0 else " " * len(head)) + line for i, line in enumerate(lines)]


def _wrapped(groups: Sequence[Ranks], width: int, limit: int | None, *, short: bool) -> list[str]:
    """Groups in lines of `width`, at most `limit` of them before a line that counts the rest."""
    lines, line = [], ""
    for done, group in enumerate(groups):
        for part in _parts(group, width, short=short):
            joined = f"{line} {part}" if line else part
            if len(joined) > width:
                lines.append(line)
                joined = part
            line = joined
        if limit is not None and len(lines) >= limit:
            return [*lines[:limit], f"... and more: {len(groups)} groups in all"]
        if done == len(groups) - 1:
            lines.append(line)
    return lines


def _parts(group: Ranks, width: int, *, short: bool) -> Iterator[str]:
    """A group as text, cut after commas where it is longer than a line."""
    numbers = [str(rank) for rank in group]
    if short and len(numbers) > AXIS_LIMIT:
        numbers = [*numbers[:3], "...", numbers[-1]]
    text = "["
    for i, number in enumerate(numbers):
        word = number + ("," if i < len(numbers) - 1 else "]")
        if len(text) + len(word) > width:
            yield text
            text = ""
        text += word
    yield text


class _Picture:
    """Boxes of ranks. `sizes` names the axes: across a box, down it, boxes across, boxes down."""

    def __init__(
        self, place: Callable[[int], Mapping[str, int]], sizes: Mapping[str, int], world_size: int
    ) -> None:
        self.sizes = sizes
        self.ranks = {tuple(place(r)[axis] for axis in sizes): r for r in range(world_size)}
        self.across, self.down, self.replica, self.stage = sizes
        self.cell = max(len(self._name(self.across)), len(str(world_size - 1)))
        self.label = max(3, len(self._name(self.down)))
        self.margin = len(self._name(self.stage)) + 2
        self.shown = {axis: _shown(size, AXIS_LIMIT) for axis, size in sizes.items()}
        self.shown[self.stage] = _shown(sizes[self.stage], STAGE_LIMIT)
        self.inner = len(self._row("", lambda column: ""))
        fit = (WIDTH - self.margin - len(" ...")) // (self.inner + len("││ "))
        self.shown[self.replica] = _shown(sizes[self.replica], min(fit, AXIS_LIMIT))

    def lines(self) -> list[str]:
        """The boxes under the names of their replicas, and what was left out."""
        found = [" " * self.margin + self._beside(self._title)]
        for stage in self.shown[self.stage]:
            if stage is GAP:
                found.append("...")
                continue
            boxes = {r: self._box(r, stage) for r in self.shown[self.replica] if r is not GAP}
            for height in range(len(next(iter(boxes.values())))):
                name = f"{self.stage}{stage}" if height == 1 else ""
                row = self._beside(lambda r, h=height, b=boxes: b[r][h])  # type: ignore[misc]
                found.append(f"{name:{self.margin}}{row}")
        return [line.rstrip() for line in found + self._left_out()]

    def _name(self, axis: str) -> str:
        return f"{axis}{self.sizes[axis] - 1}"

    def _title(self, replica: int) -> str:
        return f" {self.replica}{replica}".ljust(self.inner + 2)

    def _beside(self, text: Callable[[int], str]) -> str:
        return " ".join("..." if r is GAP else text(r) for r in self.shown[self.replica])

    def _row(self, head: str, text: Callable[[int], str]) -> str:
        cells = ["..." if c is GAP else f"{text(c):>{self.cell}}" for c in self.shown[self.across]]
        return f" {head:{self.label}} {' '.join(cells)} "

    def _box(self, replica: int, stage: int) -> list[str]:
        rows = [self._row("", lambda column: f"{self.across}{column}")]
        for row in self.shown[self.down]:
            if row is GAP:
                rows.append(" ...".ljust(self.inner))
            else:
                at = (row, replica, stage)
                text = self._row(f"{self.down}{row}", lambda c, at=at: str(self.ranks[c, *at]))  # type: ignore[misc]
                rows.append(text)
        edge = "─" * self.inner
        return [f"┌{edge}┐", *(f"│{row}│" for row in rows), f"└{edge}┘"]

    def _left_out(self) -> list[str]:
        words = []
        for axis, indices in self.shown.items():
            kept = len(indices) - indices.count(GAP)
            if kept < self.sizes[axis]:
                words.append(f"{self.sizes[axis] - kept} of {self.sizes[axis]} {axis}")
        return [f"left out of the picture: {', '.join(words)}"] if words else []


def _shown(size: int, limit: int) -> Shown:
    """All indices of an axis, or the first ones, a gap and the last."""
    if size <= limit:
        return list(range(size))
    return [0, GAP] if limit < 2 else [*range(limit - 1), GAP, size - 1]
