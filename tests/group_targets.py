"""impl as a target, with its groups wrong in one way each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch.distributed as dist

from impl.groups import build_groups
from verify.layout import Layout
from verify.targets import impl
from verify.targets.impl import Session


class Right(impl.Target):
    """impl; a subclass gives its groups another layout, or itself another session."""

    name = "groups"
    wrong = Session

    def layout(self, layout: Layout) -> Layout:
        return layout

    @contextlib.contextmanager
    def session(self, layout: Layout) -> Iterator[Session]:
        groups = build_groups(self.layout(layout))
        yield self.wrong(groups)
        groups.destroy()


class OtherOrder(Right):
    """tp and cp are laid out the other way round."""

    def layout(self, layout: Layout) -> Layout:
        return Layout(**{**layout.to_json(), "order": "cp-tp-ep-dp-pp"})


class LacksData(Right):
    """Creation of the dp group sits one loop too far out: only the last pipeline stage has one."""

    class wrong(Session):
        def groups(self) -> Mapping[str, tuple[int, ...]]:
            found = dict(super().groups())
            layout = self.bundle.layout
            if layout.coordinates(dist.get_rank())["pp"] != layout.pp - 1:
                del found["dp"]
            return found


class NoTensor(Right):
    """The adapter forgot the tensor-parallel group."""

    class wrong(Session):
        def groups(self) -> Mapping[str, tuple[int, ...]]:
            return {kind: ranks for kind, ranks in super().groups().items() if kind != "tp"}


class FirstReplica(Right):
    """Every rank believes that its context-parallel group is that of rank 0."""

    class wrong(Session):
        def groups(self) -> Mapping[str, tuple[int, ...]]:
            first = self.bundle.layout.group_of("cp", 0)
            assert first is not None
            return {**super().groups(), "cp": first}


class OtherCommunicator(Right):
    """Names the data-parallel group right, and communicates over the tensor-parallel one."""

    class wrong(Session):
        def probe(self, kind: str) -> list[int]:
            return super().probe("tp" if kind == "dp" else kind)


class Foreign(Right):
    """Has a group that no layout knows."""

    class wrong(Session):
        def groups(self) -> Mapping[str, tuple[int, ...]]:
            return {**super().groups(), "amax": (dist.get_rank(),)}


class Leaving(Right):
    """Destroys nothing of what it made."""

    @contextlib.contextmanager
    def session(self, layout: Layout) -> Iterator[Session]:
        yield Session(build_groups(layout))


class Granting(Right):
    """Gives a rank that is in no embedding group the world."""

    class wrong(Session):
        def probe(self, kind: str) -> list[int]:
            if kind == "embedding" and kind not in self.groups():
                return list(range(dist.get_world_size()))
            return super().probe(kind)
