"""impl's recomputation where the properties do not reach: nesting, exceptions, and what a function
may take and return."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from impl.random import (
    DEFAULT,
    RandomTracker,
)
from impl.recompute import checkpoint, recompute_layers
from verify.cluster import open_cluster


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


@pytest.fixture(scope="module")
def cluster():
    with open_cluster("sim", world_size=4) as opened:
        yield opened


def _draw(count=1):
    return torch.rand(count).tolist()


WEIGHT = torch.linspace(-1, 1, 16).view(4, 4)


class Stochastic:
    """A function of everything that a function may take and return."""

    def __init__(self, tracker):
        self.tracker, self.weight = tracker, WEIGHT.clone().requires_grad_()
        self.calls = 0

    def __call__(self, x, index, name, scale=2.0):
        self.calls += 1
        with self.tracker.fork(name):
            hidden = F.dropout(x @ self.weight, 0.5)
        rows = F.dropout(hidden.exp(), 0.25)[index] * scale
        return rows, hidden.sum(), "text", None

    def run(self, x, *, again, keep=False):
        """Outputs, gradients and states; with `again` the function is checkpointed."""
        self.weight.grad = x.grad = None
        arguments = (x, torch.tensor([1, 0]), "a")
        found = checkpoint(self, *arguments, tracker=self.tracker) if again else self(*arguments)
        assert found[2:] == ("text", None)
        _draw()
        loss = (found[0] * torch.arange(1.0, 5.0)).sum() + found[1]
        loss.backward(retain_graph=keep)
        return loss, [*found[:2], self.weight.grad, x.grad, *self.tracker.states().values()]


def _same(one, other):
    return all(
        (a is None and b is None) or (a is not None and torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("needs", [True, False])
def test_arguments_and_results_of_every_kind(tracker, needs):
    x, function = torch.randn(2, 4, requires_grad=needs), Stochastic(tracker)
    start = tracker.states()
    _, plain = function.run(x, again=False)
    tracker.set_states(start)
    _, again = function.run(x, again=True)
    assert _same(plain, again)
    assert function.calls == 3
    assert (x.grad is not None) == needs


def test_without_gradients_nothing_is_kept_and_nothing_needs_one(tracker):
    x = torch.randn(2, 4)
    with torch.no_grad():
        y = checkpoint(Stochastic(tracker), x, 0, "a", tracker=tracker)[0]
    assert not y.requires_grad
    assert not checkpoint(F.gelu, x, tracker=tracker).requires_grad


def test_backward_twice(tracker):
    """As without recomputation: refused, or repeated where the graph was retained."""
    x, function = torch.randn(2, 4, requires_grad=True), Stochastic(tracker)
    loss, _ = function.run(x, again=True)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    loss, _ = function.run(x, again=True, keep=True)
    first, calls = x.grad.clone(), function.calls
    loss.backward()
    assert torch.equal(x.grad, 2 * first)
    assert function.calls == calls


def test_checkpoints_in_checkpoints_and_in_forks(tracker):
    weight = WEIGHT.clone().requires_grad_()

    def inner(x):
        return F.gelu(F.dropout(x @ weight, 0.5))

    def outer(x, wrap):
        with tracker.fork("a"):
            x = wrap(inner, x)
            with tracker.fork("b"):
                x = wrap(lambda z: wrap(inner, wrap(inner, z)), x)
        return F.dropout(wrap(inner, x), 0.5)

    def again(function, *args):
        return checkpoint(function, *args, tracker=tracker)

    start, found = tracker.states(), []
    for wrap in (lambda function, *args: function(*args), again):
        tracker.set_states(start)
        weight.grad, x = None, torch.ones(3, 4, requires_grad=True)
        with tracker.fork("b"):
            y = wrap(outer, x, wrap)
        with tracker.fork("a"):
            y.sum().backward()
        found.append([y, x.grad, weight.grad, *tracker.states().values()])
    assert _same(*found)


def test_an_exception_in_forward_or_in_backward_leaves_the_streams(tracker):
    x = torch.ones(8, requires_grad=True)
    fails = {"now": True}

    def function(z):
        with tracker.fork("a"):
            y = F.dropout(z.exp(), 0.5)
            if fails["now"]:
                raise OSError
        return y

    with pytest.raises(OSError):
        checkpoint(function, x, tracker=tracker)
    assert tracker.current == DEFAULT
    fails["now"] = False
    start = tracker.states()
    y = checkpoint(function, x, tracker=tracker)
    after, fails["now"] = tracker.states(), True
    with pytest.raises(OSError):
        y.sum().backward(retain_graph=True)
    assert tracker.current == DEFAULT
    assert _same(after.values(), tracker.states().values())
    # What autograd saves outside is not held back by the hooks of what failed.
    assert x.exp().grad_fn is not None
    fails["now"] = False
    y.sum().backward()
    tracker.set_states(start)
    other = torch.ones(8, requires_grad=True)
    function(other).sum().backward()
    assert torch.equal(x.grad, other.grad)


def test_autocast_is_what_it_was_in_forward(tracker):
    weight, x = WEIGHT.clone().requires_grad_(), torch.randn(3, 4, requires_grad=True)

    def function(z):
        return (z @ weight).exp() @ weight

    found = []
    for wrap in (lambda f, z: f(z), lambda f, z: checkpoint(f, z, tracker=tracker)):
        weight.grad = x.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = wrap(function, x)
        assert y.dtype is torch.bfloat16
        y.sum().backward()
        found.append([y, x.grad, weight.grad])
    assert _same(*found)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (torch.exp, lambda x: x.exp().exp(), "saves 2 tensors for backward and saved 1 in forward"),
        (torch.exp, lambda x: x.double().exp(), "float64.* and saved .*float32.* in forward"),
        (torch.exp, lambda x: x[:2].exp(), r"\(\[2\], .* and saved \(\[3\], "),
    ],
)
def test_a_function_that_does_something_else_the_second_time(tracker, first, second, words):
    ways = iter((first, second))
    y = checkpoint(lambda x: next(ways)(x), torch.ones(3, requires_grad=True), tracker=tracker)
    with pytest.raises(RuntimeError, match=words):
        y.sum().backward()


def test_what_is_saved_inside_is_freed_and_so_are_inputs(tracker):
    x = torch.randn(4, 4, requires_grad=True)
    inside = []

    def function(z):
        y = z.exp()
        inside.append(weakref.ref(y))
        return y.exp()

    y = x * 2
    source = weakref.ref(y)
    loss = checkpoint(function, y, tracker=tracker).sum()
    del y
    gc.collect()
    assert inside[0]() is None
    assert source() is not None
    loss.backward()
    del loss
    gc.collect()
    assert source() is None
    assert inside[1]() is None


def test_layers_of_a_stage(tracker):
    """Only its own layers count, in every way of recomputing them."""
    counts = [0] * 5

    def layer(index):
        def call(x):
            counts[index] += 1
            return F.dropout(x.sin(), 0.5) + x

        return call

    layers = [layer(i) for i in range(5)]
    for method, number, wanted in (
        ("uniform", 2, [2] * 5),
        ("uniform", 5, [2] * 5),
        ("block", 3, [2, 2, 2, 1, 1]),
        ("block", 5, [2] * 5),
    ):
        counts[:] = [0] * 5
        x = torch.ones(4, requires_grad=True)
        y = recompute_layers(
            layers,
            x,
            method=method,
            num_layers=number,
            tracker=tracker,
            sequence_parallel=False,
        )
        y.sum().backward()
        assert counts == wanted


def _distributed(strides):
    """What a function is given in forward and in backward, of an input that is distributed."""
    seen, group = [], dist.group.WORLD
    x = torch.arange(24.0).as_strided((2, 3, 2), strides).requires_grad_()

    def function(z):
        seen.append((z.stride(), z.detach().clone(), z.requires_grad))
        return z.exp()

    checkpoint(function, x, tracker=RandomTracker(), group=group).sum().backward()
    return [seen, x.grad]


@pytest.mark.parametrize("strides", [(6, 2, 1), (1, 2, 6), (12, 4, 2)])
def test_a_distributed_input_comes_back_as_it_lay_in_memory(cluster, strides):
    for ((before, x, _), (after, again, needs)), gradient in cluster.run(
        _distributed, strides, world_size=4
    ):
        assert after == before
        assert torch.equal(x, again)
        assert needs
        assert torch.equal(gradient, x.exp())


def _distributes_an_expanded_input():
    x = torch.ones(1, requires_grad=True)
    y = checkpoint(torch.exp, x.expand(4), tracker=RandomTracker(), group=dist.group.WORLD)
    y.sum().backward()
    return x.grad


def test_an_expanded_input_can_be_distributed(cluster):
    for gradient in cluster.run(_distributes_an_expanded_input, world_size=2):
        assert torch.allclose(gradient, 4 * torch.ones(1).exp())


def _refused():
    with pytest.raises(ValueError) as caught:
        checkpoint(torch.exp, torch.ones(3), tracker=RandomTracker(), group=dist.group.WORLD)
    return str(caught.value)


def test_what_cannot_be_distributed_is_refused(cluster):
    for message in cluster.run(_refused, world_size=2):
        assert "3 does not divide" in message
