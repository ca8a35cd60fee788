"""impl's random streams and dropout where the properties do not reach: nesting, misuse."""

import pytest
import torch
from fake_targets import target_of

from impl.dropout import bias_dropout_add, dropout
from impl.random import (
    DEFAULT,
    EXPERT_PARALLEL,
    TENSOR_PARALLEL,
    RandomTracker,
    stream_of,
    stream_seeds,
)
from verify.case import Case
from verify.cluster import open_cluster
from verify.errors import BadArgument
from verify.layout import Layout
from verify.verdict import Verdict, judge


@pytest.fixture(autouse=True)
def _own_state():
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.fixture
def tracker():
    made = RandomTracker(seed=1)
    made.add("a", seed=2)
    made.add("b", seed=3)
    return made


def _numbers(seed, count):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()


def _draw(count=1):
    return torch.rand(count).tolist()


def test_states_are_copies(tracker):
    for state in tracker.states().values():
        state.zero_()
    with tracker.fork("a"):
        assert _draw() == _numbers(2, 1)


def test_a_stream_is_one_sequence_however_it_is_forked(tracker):
    drawn = {DEFAULT: _draw(), "a": [], "b": []}
    with tracker.fork("a"):
        drawn["a"] += _draw()
        with tracker.fork("b"):
            drawn["b"] += _draw()
            with tracker.fork("a"), tracker.fork("a"):
                drawn["a"] += _draw()
            with tracker.fork(DEFAULT):
                drawn[DEFAULT] += _draw()
            drawn["b"] += _draw()
        drawn["a"] += _draw()
        assert tracker.current == "a"
    with tracker.fork("a"):
        drawn["a"] += _draw()
    drawn[DEFAULT] += _draw()
    for name, seed in ((DEFAULT, 1), ("a", 2), ("b", 3)):
        # Numbers drawn one at a time are those drawn at once.
        generator = torch.Generator().manual_seed(seed)
        wanted = [float(torch.rand(1, generator=generator)) for _ in drawn[name]]
        assert drawn[name] == wanted


def test_an_exception_leaves_every_stream_where_it_was_drawn_to(tracker):
    def draw_and_raise():
        with tracker.fork("a"):
            _draw()
            with tracker.fork("b"):
                _draw()
                raise OSError

    with pytest.raises(OSError):
        draw_and_raise()
    assert tracker.current == DEFAULT
    assert _draw() == _numbers(1, 1)
    other = RandomTracker(seed=1)
    other.add("a", seed=2)
    other.add("b", seed=3)
    for name in ("a", "b"):
        with other.fork(name):
            _draw()
        assert torch.equal(other.states()[name], tracker.states()[name])


def test_states_put_back_are_those_that_are_drawn_from(tracker):
    with tracker.fork("a"):
        states = tracker.states()
        first = _draw(3)
        tracker.set_states(states)
        assert _draw(3) == first
    with tracker.fork("b"):
        tracker.set_states(states)
    with tracker.fork("a"):
        assert _draw(3) == first
    tracker.states()["a"].zero_()
    with tracker.fork("a"):
        assert _draw() != first[:1]


def test_replaying_leaves_no_trace(tracker):
    with tracker.fork("a"):
        _draw()
        snapshot = tracker.snapshot()
        wanted = _draw(2)
    before = tracker.states()

    def draw_and_raise():
        with tracker.replaying(snapshot):
            assert tracker.current == "a"
            assert _draw(2) == wanted
            raise OSError

    with pytest.raises(OSError):
        draw_and_raise()
    assert tracker.current == DEFAULT
    assert all(torch.equal(state, before[name]) for name, state in tracker.states().items())


def test_a_snapshot_of_other_streams_is_refused_and_changes_nothing(tracker):
    with tracker.fork("a"):
        snapshot = tracker.snapshot()
    tracker.add("c", seed=4)
    before = tracker.states()
    with pytest.raises(ValueError, match="streams of this tracker are default, a, b, c"):
        tracker.replaying(snapshot).__enter__()
    assert tracker.current == DEFAULT
    assert all(torch.equal(state, before[name]) for name, state in tracker.states().items())


def test_misuse_of_a_tracker_is_one_line(tracker):
    for call, words in (
        (lambda: tracker.add("a", seed=9), "'a' is there already"),
        (lambda: tracker.add(DEFAULT, seed=9), "'default' is there already"),
        (lambda: tracker.add("c", seed=2), "2 is the seed of the stream 'a'"),
        (lambda: tracker.add("c", seed=1), "1 is the seed of the stream 'default'"),
        (lambda: tracker.fork("c").__enter__(), "no stream 'c'; this tracker has default, a, b"),
        (lambda: tracker.stream("c")().__enter__(), "no stream 'c'"),
        (lambda: tracker.set_states({"a": torch.get_rng_state()}), "a are given; the streams"),
        (lambda: RandomTracker(device="meta"), "meta has no default generator"),
        (lambda: stream_of("dp"), "split over tp and cp only"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert tracker.names == (DEFAULT, "a", "b")


def test_an_unseeded_tracker_takes_the_default_generator_as_it_is():
    torch.manual_seed(7)
    tracker = RandomTracker()
    with tracker.fork(DEFAULT):
        assert _draw() == _numbers(7, 1)


def test_no_two_streams_of_a_large_run_share_a_seed():
    layout = Layout(tp=4, cp=2, dp=8, pp=4, ep=16, etp=1)
    seeds = [stream_seeds(5, layout=layout, rank=rank) for rank in range(layout.world_size)]
    counts = {DEFAULT: 4, TENSOR_PARALLEL: 16, EXPERT_PARALLEL: 64, stream_of("cp"): 8}
    counts[stream_of("cp", "tp")] = 32
    found = {name: {each[name] for each in seeds} for name in seeds[0]}
    assert {name: len(each) for name, each in found.items()} == counts
    assert len(set().union(*found.values())) == sum(counts.values())


def test_dropout_outside_of_training_draws_nothing(tracker):
    x, before = torch.ones(50), tracker.states()
    dropout(x, p=0.5, stream=tracker.stream("a"), training=False)
    dropout(x, p=0.0, stream=tracker.stream("a"))
    assert all(torch.equal(state, before[name]) for name, state in tracker.states().items())
    dropout(x, p=0.5, stream=tracker.stream("a"))
    assert not torch.equal(tracker.states()["a"], before["a"])
    assert torch.equal(tracker.states()["b"], before["b"])


def test_a_residual_has_the_shape_of_what_is_added_and_its_dtype():
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    assert bias_dropout_add(x, bias=None, residual=torch.ones(2, 3), p=0.5).dtype is x.dtype
    with pytest.raises(ValueError, match=r"\[1, 3\] is not the shape of x, \[2, 3\]"):
        bias_dropout_add(x, bias=None, residual=torch.ones(1, 3), p=0.5)


def _misused(target, how="name"):
    case = Case(concept="random_streams", layout=Layout(tp=2), options={"misuse": how})
    with open_cluster("sim", world_size=2) as cluster:
        return judge("misuse", case, target_name=target, cluster=cluster)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("vacuous_targets:Refuses", "using its random streams: ValueError: name: shardproof-one"),
        ("vacuous_targets:Spends", "rank 1 refused it, and has other states than before"),
        ("impl@random-name-taken", "did what it is to refuse: it added a stream by a name that"),
    ],
)
def test_misuse_that_is_not_refused_or_use_that_is(target, text):
    judged = _misused(target)
    assert judged.verdict is Verdict.FAILED
    assert text in " ".join(judged.reason.split())


def test_a_misuse_that_is_none():
    with pytest.raises(BadArgument, match="'rename' is not one of name, seed"):
        _misused("impl", "rename")


def test_a_target_that_does_not_tell_its_streams_is_not_supported():
    with open_cluster("sim", world_size=2) as cluster:
        case = Case(concept="random_streams", layout=Layout(tp=2), options={"misuse": "name"})
        for check in ("streams", "misuse"):
            found = judge(check, case, target_name=target_of(None), cluster=cluster)
            assert found.verdict is Verdict.NOT_SUPPORTED
            assert "does not tell its" in found.reason
