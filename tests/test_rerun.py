"""The checks of what is computed again: torch's own recomputation passes, what does less fails."""

from contextlib import contextmanager
from functools import partial

import pytest
from fake_targets import target_of
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from verify.case import Case
from verify.cluster import open_cluster
from verify.errors import BadArgument
from verify.layout import Layout
from verify.targets.impl import Target as Right
from verify.verdict import Verdict, judge

_EVERYTHING = []
SHAPE = {"sequence": 2, "batch": 3, "hidden": 4}


@pytest.fixture(scope="module")
def cluster():
    with open_cluster("sim", world_size=2) as opened:
        yield opened


def _by_torch(function, x, mask, *, distributed, **given):
    return checkpoint(function, x, mask, **{"use_reentrant": False, **given})


def _not_at_all(function, x, mask, *, distributed):
    return function(x, mask)


def _of_a_clone(function, x, mask, *, distributed):
    return checkpoint(_Packs(function), x, mask, use_reentrant=False)


class _Packs:
    """Has the function see other memory the second time."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, x, mask):
        self.calls += 1
        return self.function(x if self.calls < 2 else x.contiguous(), mask)


def _for_good(function, x, mask, *, distributed):
    def held(*given):
        with _Holding():
            return function(*given)

    return checkpoint(held, x, mask, use_reentrant=False)


class _Holding(TorchFunctionMode):
    """Keeps whatever is computed."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        _EVERYTHING.append(found)
        return found


class _Target(Right):
    run = staticmethod(_by_torch)

    @contextmanager
    def session(self, layout):
        with super().session(layout) as session:
            session.checkpoint = lambda: self.run
            yield session


class Torchs(_Target):
    pass


class Reentrant(_Target):
    run = staticmethod(partial(_by_torch, use_reentrant=True))


class Patient(_Target):
    """torch's that runs the function to its end, and so sees if it saves more."""

    run = staticmethod(partial(_by_torch, early_stop=False))


class Keeps(_Target):
    run = staticmethod(_not_at_all)


class Packs(_Target):
    run = staticmethod(_of_a_clone)


class Leaks(_Target):
    run = staticmethod(_for_good)


def _judged(cluster, check, target, **options):
    case = Case(
        concept="recomputed_function",
        layout=Layout(tp=2),
        shape=SHAPE,
        options=options,
        lens="native",
        dtype="float32",
    )
    return judge(check, case, target_name=target, cluster=cluster)


@pytest.mark.parametrize("target", ["impl", "test_rerun:Torchs", "test_rerun:Reentrant"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"autocast": "bfloat16", "lies": "transposed"},
        {"autocast": "float16", "autocast_backward": "bfloat16", "lies": "expanded"},
        {"autocast_backward": "bfloat16", "lies": "apart"},
    ],
)
def test_what_recomputes_faithfully_passes(cluster, target, options):
    judged = _judged(cluster, "rerun", target, **options)
    assert judged.verdict is Verdict.PASSED, judged.reason


@pytest.mark.parametrize(
    ("target", "options", "text"),
    [
        ("test_rerun:Keeps", {}, "the function ran 1 times and should run twice"),
        ("test_rerun:Packs", {"lies": "transposed"}, "x has strides (12, 4, 1) in memory, and had"),
        ("test_rerun:Leaks", {}, "tensors that it made inside are still in memory"),
        ("impl@recompute-without-autocast", {"autocast": "bfloat16"}, "torch.bfloat16"),
    ],
)
def test_what_does_not_fails(cluster, target, options, text):
    judged = _judged(cluster, "rerun", target, **options)
    assert judged.verdict is Verdict.FAILED
    assert text in " ".join(judged.reason.split())


@pytest.mark.parametrize("change", ["more", "fewer", "shape", "dtype"])
def test_a_function_that_changes_is_refused_or_not(cluster, change):
    for target, verdict in (
        ("impl", Verdict.PASSED),
        ("test_rerun:Patient", Verdict.PASSED),
        # With one tensor more it stops before that, and what it has is right.
        ("test_rerun:Torchs", Verdict.PASSED),
        # It goes back through the second run, whose gradients are the same but for a view.
        ("test_rerun:Reentrant", Verdict.PASSED if change == "shape" else Verdict.FAILED),
    ):
        judged = _judged(cluster, "unrepeatable", target, changed=change)
        assert judged.verdict is verdict, judged.reason


def test_a_target_that_does_not_tell_its_recomputation_is_not_supported(cluster):
    judged = _judged(cluster, "rerun", target_of(None))
    assert judged.verdict is Verdict.NOT_SUPPORTED
    assert "does not tell how it computes a function again" in judged.reason


@pytest.mark.parametrize(
    ("check", "options", "words"),
    [
        ("rerun", {"autocast": "int8"}, "autocast: 'int8' is not one of None, bfloat16"),
        ("rerun", {"changed": "more"}, "changed: 'more' is not one of None"),
        ("unrepeatable", {}, "changed: None is not one of more, fewer"),
        ("rerun", {"lies": "upside down"}, "lies: 'upside down' is not one of"),
    ],
)
def test_a_case_that_is_none(cluster, check, options, words):
    with pytest.raises(BadArgument, match=words):
        _judged(cluster, check, "impl", **options)
