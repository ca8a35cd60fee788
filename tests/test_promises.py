"""What a concept promises of communication and memory, against what is seen of it."""

from dataclasses import replace

import pytest
import torch
from fake_targets import Right, target_of

from verify import oracle
from verify.case import Case
from verify.checks.promises import kept_too_much, miscommunicated
from verify.checks.random_states import moved_by_backward
from verify.cluster import open_cluster
from verify.cluster.history import History, Record
from verify.errors import BadArgument, Mismatch, NotSupported
from verify.layout import Layout
from verify.oracle.contract import Contract, Step
from verify.property import CHECKS
from verify.rank_program import Observation

LAYOUT = Layout(tp=2, dp=2)
PROMISE = (Step("all_reduce", "tp", 6),)
SHAPE = {"sequence": 3, "batch": 2, "in_features": 8, "out_features": 5}


def contract(**promises) -> Contract:
    return Contract(inputs={}, parameters={}, outputs={}, reference=dict, **promises)


def record(operation="all_reduce", group=(0, 1), elements=6, phase="forward") -> Record:
    return Record(1, operation, group, (), "sum", "here", elements, phase)


def history(*records: Record) -> History:
    """Every rank has the same records, but for groups (0, 1), which are (2, 3) on ranks 2 and 3."""
    other = {(0, 1): (2, 3)}
    shifted = [replace(each, group=other.get(each.group, each.group)) for each in records]
    return History({0: [*records], 1: [*records], 2: shifted, 3: shifted})


def test_what_was_promised_passes():
    seen = history(
        record(),
        record("all_gather", group=(0,), phase="forward"),
        record("barrier", elements=0),
        record("all_gather_into_tensor", phase="backward", elements=4),
        record(phase="", elements=99),
    )
    promised = contract(forward=PROMISE, backward=(Step("all_gather", "tp", 4),), finish=())
    assert miscommunicated(promised, LAYOUT, seen) == ()
    # What is promised over a group of one rank is no communication.
    assert (
        miscommunicated(contract(forward=(Step("all_reduce", "cp", 9),)), LAYOUT, History()) == ()
    )


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ((), "ranks 0, 1, 2, 3 in forward: missing: 1 x all_reduce of 6 elements over tp"),
        ((record(), record()), "too much: 1 x all_reduce of 6 elements over tp"),
        ((record(elements=12),), "too much: 1 x all_reduce of 12 elements over tp; missing: 1 x"),
        ((record("reduce_scatter"),), "too much: 1 x reduce_scatter of 6 elements over tp"),
        ((record(phase="backward"),), "missing: 1 x all_reduce"),
        ((record(group=(0, 1, 2, 3)),), "over tp_dp; missing"),
    ],
)
def test_what_was_not_is_told(records, words):
    told = miscommunicated(contract(forward=PROMISE), LAYOUT, history(*records))
    assert any(words in line for line in told), told


def test_a_message_is_told_by_its_ranks_whatever_group_it_names():
    promised = contract(forward=(Step("send", "dp", 6),))

    def told(*peers):
        one = record("send", group=(0, 1, 2, 3))
        sent = [[replace(one, settings=f"to {each}")] for each in peers]
        return miscommunicated(promised, LAYOUT, History(dict(enumerate(sent))))

    assert told(2, 3, 0, 1) == ()
    assert told(1, 3, 0, 1) == (
        "rank 0 in forward: too much: 1 x send of 6 elements over tp_dp;"
        " missing: 1 x send of 6 elements over dp",
    )


def test_ranks_may_be_promised_different_things():
    """Only the first tp rank of either group communicates."""

    def promised(at):
        return PROMISE if at["tp"] == 0 else ()

    seen = history(record())
    told = miscommunicated(contract(forward=promised), LAYOUT, seen)
    assert told == ("ranks 1, 3 in forward: too much: 1 x all_reduce of 6 elements over tp",)
    only_first = History({rank: seen.of(rank) if rank in (0, 2) else [] for rank in range(4)})
    assert miscommunicated(contract(forward=promised), LAYOUT, only_first) == ()


def test_memory():
    seen = [Observation({}, {}, kept=kept) for kept in (4, 9, 5)]
    assert kept_too_much(contract(kept=9), seen) == ()
    (line,) = kept_too_much(contract(kept=5), seen)
    assert line == "rank 1 kept 9 elements for backward; promised are at most 5"
    assert kept_too_much(contract(), seen) == ()


def test_generators_that_are_told_of_once_only_are_changed():
    state, other = torch.tensor([1, 2]), torch.tensor([1, 3])
    seen = [
        Observation({}, {}, between={"default": state}, states={"default": state}),
        Observation({}, {}, between={"default": state, "tp": state}, states={"default": other}),
        Observation({}, {}, between={}, states={"cp": state}),
    ]
    said = moved_by_backward(seen)
    assert [line.split(": ")[0] for line in said] == ["rank 1", "rank 1", "rank 2"]
    assert all(name in line for name, line in zip(("tp", "default", "cp"), said, strict=True))


def promising(case: Case) -> Contract:
    """A row-parallel layer that promises one all-reduce in forward and to keep x and the weight's
    gradient's other half."""
    local = case.shape["sequence"] * case.shape["batch"]
    return replace(
        oracle.CONTRACTS["fake_row"](case),
        forward=(Step("all_reduce", "tp", local * case.shape["out_features"]),),
        backward=(),
        finish=(),
        kept=local * case.shape["in_features"] // case.layout.tp,
    )


oracle.CONTRACTS["fake_promising"] = promising


@pytest.fixture(scope="module")
def sim():
    with open_cluster("sim", world_size=4) as opened:
        yield opened


def check(name, cluster, defect=None, concept="fake_promising"):
    case = Case(concept=concept, layout=LAYOUT, shape=SHAPE)
    CHECKS[name](case, target_name=target_of(defect), cluster=cluster)


def test_the_checks(sim):
    check("communication", sim)
    check("memory", sim)
    with pytest.raises(Mismatch) as caught:
        check("communication", sim, "twice")
    assert "too much: 1 x all_reduce of 30 elements over tp" in str(caught.value)
    with pytest.raises(Mismatch) as caught:
        check("communication", sim, "bias gradient")
    assert "in finish: too much: 1 x all_reduce of 5 elements over tp" in str(caught.value)
    with pytest.raises(Mismatch) as caught:
        check("communication", sim, "no sum")
    assert "in forward: missing: 1 x all_reduce" in str(caught.value)
    with pytest.raises(Mismatch, match="ranks 0, 1, 2, 3 kept 44 elements"):
        check("memory", sim, "bfloat16")


def test_a_check_of_no_promise_is_refused(sim):
    for name in ("communication", "memory"):
        with pytest.raises(BadArgument, match="promises nothing about"):
            check(name, sim, concept="fake_row")
    with open_cluster("process", world_size=4) as real, pytest.raises(NotSupported):
        check("communication", real)


def test_autograd_is_left_as_it_was(sim):
    """What memory is watched by changes no gradient."""
    case = Case(concept="fake_promising", layout=LAYOUT, shape=SHAPE)
    CHECKS["equivalence"](case, target_name=target_of(None), cluster=sim)
    assert Right.name == "fake"
    assert torch.is_grad_enabled()
