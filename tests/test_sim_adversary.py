"""The adversary of the sim cluster: what it shows, and that right programs do not notice."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from verify.adversary import FAULTS, NONE, Adversary, Fault
from verify.cluster import CollectiveMismatch, Deadlock, RankFailures, open_cluster
from verify.cluster.base import BufferRace
from verify.cluster.history import History
from verify.cluster.sim import SimCluster
from verify.errors import BadArgument

LATE = Adversary(late=True)
RENDEZVOUS = Adversary(rendezvous=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[SimCluster]:
    with open_cluster("sim", world_size=4, timeout=20.0) as opened:
        yield opened


def right() -> list[torch.Tensor]:
    """Asynchronous collectives and messages of every sort, waited for before use."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.arange(4.0, dtype=torch.float64) + rank
    whole = torch.empty(4 * size, dtype=torch.float64)
    part, token = torch.empty(4, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    works = [dist.all_gather_into_tensor(whole, x, async_op=True)]
    works.append(dist.reduce_scatter_tensor(part, x.repeat(size), async_op=True))
    total = x.clone()
    works.append(dist.all_reduce(total, async_op=True))
    works.append(dist.barrier(async_op=True))
    ring = [
        dist.P2POp(dist.irecv, token, (rank - 1) % size),
        dist.P2POp(dist.isend, torch.tensor([rank]), (rank + 1) % size),
    ]
    works += dist.batch_isend_irecv(ring)
    for work in works:
        work.wait()
    dist.broadcast(total, src=size - 1)
    return [whole, part, total, token]


@given(
    adversary=st.builds(
        Adversary,
        late=st.booleans(),
        rendezvous=st.booleans(),
        schedule=st.none() | st.integers(0, 10**6),
    )
)
@settings(max_examples=30, deadline=None)
def test_a_right_program_does_not_notice(cluster: SimCluster, adversary: Adversary) -> None:
    expected = cluster.run(right, world_size=3)
    found = cluster.run(right, world_size=3, adversary=adversary)
    for mine, theirs in zip(expected, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def used_before_wait() -> torch.Tensor:
    x = torch.ones(3)
    work = dist.all_reduce(x, async_op=True)
    y = x * 2
    work.wait()
    return y


def used_before_receive_is_done() -> torch.Tensor:
    x = torch.zeros(3, dtype=torch.int64)
    if dist.get_rank() == 0:
        dist.send(torch.ones(3, dtype=torch.int64), 1)
        return x
    work = dist.irecv(x, 0)
    y = x.clone()
    work.wait()
    return y


def test_results_are_poisoned_until_they_are_waited_for(cluster):
    assert all(y.isnan().all() for y in cluster.run(used_before_wait, world_size=2, adversary=LATE))
    _, y = cluster.run(used_before_receive_is_done, world_size=2, adversary=LATE)
    assert (y > 2**62).all()


def input_reused() -> None:
    x, whole = torch.ones(2), torch.empty(4)
    work = dist.all_gather_into_tensor(whole, x, async_op=True)
    x.mul_(2)
    work.wait()


def output_written() -> None:
    x = torch.ones(2)
    work = dist.all_reduce(x, async_op=True)
    x.zero_()
    work.wait()


def sent_buffer_reused() -> None:
    x = torch.ones(2)
    if dist.get_rank() == 1:
        dist.recv(x, 0)
        return
    work = dist.isend(x, 1)
    x.add_(1)
    work.wait()


@pytest.mark.parametrize(
    ("program", "what"),
    [(input_reused, "input"), (output_written, "output"), (sent_buffer_reused, "input")],
)
def test_a_write_to_a_buffer_in_flight(cluster, program: Callable[[], None], what: str):
    cluster.run(program, world_size=2)
    with pytest.raises(BufferRace) as caught:
        cluster.run(program, world_size=2, adversary=LATE)
    text = str(caught.value)
    assert f"its {what} was written in between" in text
    assert text.count(f"test_sim_adversary.py:{program.__code__.co_firstlineno + 1}") == 0
    assert text.count(f"in {program.__name__}") == 2


def send_first() -> None:
    x = torch.ones(2)
    peer = 1 - dist.get_rank()
    dist.send(x, peer)
    dist.recv(x, peer)


def test_rendezvous_sends_that_wait_for_each_other(cluster):
    cluster.run(send_first, world_size=2)
    with pytest.raises(Deadlock) as caught:
        cluster.run(send_first, world_size=2, adversary=RENDEZVOUS)
    assert "waits in send of float32 [2] to rank 1" in str(caught.value)
    assert "no matching receive" in str(caught.value)


def any_source() -> list[int]:
    x = torch.zeros(1)
    if dist.get_rank():
        dist.send(x, 0)
        return []
    return [dist.recv(x) for _ in range(dist.get_world_size() - 1)]


def test_a_drawn_schedule_changes_what_depends_on_it(cluster):
    orders = {
        tuple(cluster.run(any_source, world_size=4, adversary=Adversary(schedule=seed))[0])
        for seed in range(20)
    }
    assert len(orders) > 1
    again = [
        cluster.run(any_source, world_size=4, adversary=Adversary(schedule=3))[0] for _ in range(2)
    ]
    assert again[0] == again[1]


def three_sums() -> torch.Tensor:
    x = torch.ones(2, dtype=torch.float64)
    for _ in range(3):
        dist.all_reduce(x)
    return x


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("kind", FAULTS)
def test_every_fault_is_seen(cluster, kind: str, number: int):
    """A dead rank, a lost and a doubled collective end the run; a flipped bit reaches everybody."""
    fault = Fault(kind=kind, rank=1, number=number)
    adversary = Adversary(faults=(fault,))
    if kind == "flip":
        right = cluster.run(three_sums, world_size=3)
        wrong = cluster.run(three_sums, world_size=3, adversary=adversary)
        assert not any(map(torch.equal, right, wrong))
        return
    with pytest.raises(RankFailures) as caught:
        cluster.run(three_sums, world_size=3, adversary=adversary)
    if kind == "die":
        (failure,) = caught.value.failures
        assert (failure.rank, failure.kind.rpartition(".")[2]) == (1, "Killed")
        assert f"die at communication {number} of rank 1" in failure.message
    else:
        assert isinstance(caught.value, Deadlock | CollectiveMismatch)
    assert len(cluster.run(three_sums, world_size=3)) == 3


def other_order() -> None:
    a, b = torch.ones(2), torch.zeros(2)
    if dist.get_rank() == 0:
        dist.all_reduce(a)
        dist.all_reduce(b)
    else:
        _second_first(a, b)


def _reduce_a(a: torch.Tensor) -> None:
    dist.all_reduce(a)


def _reduce_b(b: torch.Tensor) -> None:
    dist.all_reduce(b)


def _second_first(a: torch.Tensor, b: torch.Tensor) -> None:
    _reduce_b(b)
    _reduce_a(a)


def swapped() -> None:
    a, b = torch.ones(2), torch.zeros(2)
    steps = [(_reduce_a, a), (_reduce_b, b)]
    for step, x in steps if dist.get_rank() != 1 else reversed(steps):
        step(x)


def swapped_among_the_others() -> None:
    a, b = torch.ones(2), torch.zeros(2)
    if dist.get_rank() == 0:
        dist.all_reduce(a)
        dist.all_reduce(b)
        return
    steps = [(_reduce_a, a), (_reduce_b, b)]
    for step, x in steps if dist.get_rank() == 1 else reversed(steps):
        step(x)


def rooted() -> None:
    x = torch.ones(2)
    for root in range(dist.get_world_size()):
        if dist.get_rank() == root:
            dist.broadcast(x, root)
        else:
            dist.broadcast(x, root)


def test_calls_that_fit_in_the_wrong_order(cluster):
    with pytest.raises(CollectiveMismatch) as caught:
        cluster.run(swapped, world_size=3)
    text = str(caught.value)
    assert "ranks 0, 1 issue the same calls in different orders" in text
    assert "in _reduce_a" in text
    assert "in _reduce_b" in text
    with pytest.raises(CollectiveMismatch, match="ranks 1, 2 issue the same calls"):
        cluster.run(swapped_among_the_others, world_size=3)
    cluster.run(rooted, world_size=3)
    cluster.run(other_order, world_size=2)


def test_history(cluster, tmp_path):
    history, other = History(), History()
    cluster.run(right, world_size=3, history=history)
    cluster.run(right, world_size=3, history=other, adversary=Adversary(late=True, schedule=7))
    assert history.first_difference(other) is None
    operations = [record.operation for record in history.of(1)]
    assert operations == [
        "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "barrier", "recv", "send",
        "broadcast",
    ]  # fmt: skip
    first = history.of(1)[0]
    assert (first.group, first.tensors, first.elements) == ((0, 1, 2), ("float64 [4]",), 4)
    assert first.site.endswith("in right")
    table = " ".join(history.table(1).split())
    assert "reduce_scatter_tensor 0,1,2 float64 [12] sum tests" in table
    assert "broadcast 0,1,2 float64 [4] root 2 tests" in table
    history.save(tmp_path / "h.json")
    assert History.load(tmp_path / "h.json") == history
    shorter = History()
    cluster.run(three_sums, world_size=3, history=shorter)
    rank, one, two = history.first_difference(shorter)
    assert (rank, one.operation, two.operation) == (0, "all_gather_into_tensor", "all_reduce")


class _Seeing(TorchFunctionMode):
    """Sees every call, and makes it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def under_a_mode():
    with _Seeing():
        dist.all_reduce(torch.ones(2))


def test_a_call_is_told_by_its_place_and_not_by_a_mode_that_sees_it(cluster):
    history = History()
    cluster.run(under_a_mode, world_size=2, history=history)
    assert history.of(1)[0].site.endswith("in under_a_mode")


def test_bad_settings(tmp_path):
    with pytest.raises(BadArgument, match=r"fault.kind: 'melt' is not one of die, flip, drop"):
        Fault(kind="melt", rank=0, number=1)
    with pytest.raises(BadArgument, match=r"fault.number: 0 is not a whole number from 1 up"):
        Fault(kind="die", rank=0, number=0)
    with pytest.raises(BadArgument, match="unknown fields"):
        Adversary.from_json({"evil": True})
    (tmp_path / "h.json").write_text('{"ranks": {"0": [{"number": 1}]}}')
    with pytest.raises(BadArgument, match="is no history"):
        History.load(tmp_path / "h.json")
    adversary = Adversary(late=True, faults=(Fault(kind="die", rank=1, number=2),), schedule=4)
    assert Adversary.from_json(adversary.to_json()) == adversary
    assert not NONE
    with (
        open_cluster("process", world_size=1) as real,
        pytest.raises(BadArgument, match="the cluster process has none; take sim"),
    ):
        real.run(three_sums, world_size=1, adversary=LATE)
