"""The checks `traffic` and `waiting`: other right choices pass, and what cannot be judged is said.

The variants are of `impl`, with one function in the place of another.
"""

from dataclasses import dataclass, replace

import pytest

import impl.data_parallel
from impl.buckets import Bucket, Span
from impl.collectives import start_all_reduce_in_place
from verify.case import Case
from verify.checks.traffic import traffic
from verify.cluster import open_cluster
from verify.cluster.history import History, Record
from verify.errors import BadArgument, Mismatch, NotSupported
from verify.layout import Layout
from verify.property import waiting
from verify.targets.impl import training

CASE = Case(
    concept="training_steps",
    layout=Layout(dp=2, cp=2),
    shape={"steps": 3, "rounds": 2, "sequence": 2, "batch": 2, "hidden": 3, "ffn": 2},
    options={"overlap": True, "bucket": 7},
)


@pytest.fixture(scope="module")
def cluster():
    with open_cluster("sim", world_size=4) as opened:
        yield opened


@dataclass
class _Levels:
    """A reduction over dp that is on its way, and one over cp that begins when it is there."""

    piece: object
    first: object
    then: object

    def wait(self):
        self.first.wait()
        return start_all_reduce_in_place(self.piece, group=self.then).wait()


def _in_levels(monkeypatch):
    make = impl.data_parallel.DataParallel.__init__

    def made(self, module, *, groups, **options):
        make(self, module, groups=groups, **options)
        for buffer in self.buffers:
            buffer.levels = groups.dp, groups.cp

    def start(self):
        bucket = self.buckets[len(self._pending)]
        piece, (first, then) = self.data[bucket.start : bucket.stop], self.levels
        begun = start_all_reduce_in_place(piece, group=first)
        self._pending.append(_Levels(piece, begun, then))

    monkeypatch.setattr(impl.data_parallel.DataParallel, "__init__", made)
    monkeypatch.setattr(impl.data_parallel.GradientBuffer, "_start", start)


def _laid_out(monkeypatch, ends):
    """Buckets that end before a tensor where `ends(number of the bucket, its elements, those of the
    tensor, size)`."""

    def lay_out(numels, *, bucket_size, parts):
        assert parts == 1
        found, spans, stop = [], [], 0
        for index in reversed(range(len(numels))):
            elements = sum(span.stop - span.start for span in spans)
            if spans and ends(len(found), elements, numels[index], bucket_size):
                found.append(Bucket(spans[0].start, stop, tuple(spans)))
                spans = []
            spans.append(Span(index, stop, stop := stop + numels[index]))
        return (*found, Bucket(spans[0].start, stop, tuple(spans)))

    monkeypatch.setattr(impl.data_parallel, "lay_out", lay_out)


VARIANTS = {
    "in levels": _in_levels,
    "closed before full": lambda patch: _laid_out(patch, lambda n, e, new, size: e + new > size),
    "small first": lambda patch: _laid_out(patch, lambda n, e, new, size: not n or e >= size),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_right_choices_pass(cluster, monkeypatch, variant):
    VARIANTS[variant](monkeypatch)
    for bucket in (7, 20):
        case = replace(CASE, options={**CASE.options, "bucket": bucket})
        assert traffic(case, target_name="impl", cluster=cluster) == 4
        assert waiting(case, target_name="impl", cluster=cluster) == 4


def test_a_level_that_is_never_begun_within_backward_is_told(cluster, monkeypatch):
    _in_levels(monkeypatch)
    monkeypatch.setattr(impl.data_parallel.GradientBuffer, "ready", lambda self, index: None)
    with pytest.raises(Mismatch, match="training communicates late") as caught:
        traffic(CASE, target_name="impl", cluster=cluster)
    said = " ".join(str(caught.value).split())
    assert "ranks 0, 1, 2, 3 began to reduce 0 elements" in said
    assert "within the backward passes of step 2" in said


def test_what_cannot_be_judged_is_refused(cluster, monkeypatch):
    spare = replace(CASE, options={**CASE.options, "spare": "never"})
    with pytest.raises(BadArgument, match="the last pass of a step may not reach"):
        traffic(spare, target_name="impl", cluster=cluster)
    monkeypatch.setattr(training, "mark_step", lambda step: None)
    with pytest.raises(NotSupported, match="does not say which step it is in"):
        traffic(CASE, target_name="impl", cluster=cluster)


def test_what_is_under_way_is_not_kept_with_a_history(tmp_path):
    record = Record(1, "send", (0, 1), ("float32 [2]",), "to 1", "here", 2, "step 0", True)
    history = History({0: [record]})
    history.begin(0, record)
    history.save(tmp_path / "run.json")
    assert History.load(tmp_path / "run.json") == history
    history.waited(0, 1)
    assert history.under_way == {}


def test_a_history_of_before_backward_was_noted_is_read(tmp_path):
    record = Record(1, "send", (0, 1), ("float32 [2]",), "to 1", "here", 2, "forward")
    path = tmp_path / "run.json"
    History({0: [record]}).save(path)
    path.write_text(path.read_text().replace(', "in_backward": false', ""))
    assert "in_backward" not in path.read_text()
    assert History.load(path) == History({0: [record]})
