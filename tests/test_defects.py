"""Defects of communication: what simulated ranks get at the place that is wrong, and elsewhere."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_cli import in_process

from impl import linear_cross_entropy
from verify.cluster import open_cluster
from verify.cluster.sim.defects import OPERATORS, Defect, listening, plant
from verify.errors import BadArgument
from verify.mutants.history import DEPTH, PREFIX, find_historic, mutants_of, root_of

# Ranks give 1, 2 and 4; or, where each gets another part, 10 times their number and the part's.
OWN, PARTS = [1.0, 2.0, 4.0], [[10.0 * rank + part for part in range(3)] for rank in range(3)]
PROGRAM = """\
import torch
import torch.distributed as dist

def all_reduce(op=dist.ReduceOp.SUM):
    x = own()
    dist.all_reduce(x, op=op)
    return x

def largest():
    return all_reduce(dist.ReduceOp.MAX)

def average():
    return all_reduce(dist.ReduceOp.AVG)

def least():
    return all_reduce(dist.ReduceOp.MIN)

def reduce():
    x = own()
    dist.reduce(x, 0)
    return x

def all_gather():
    x = [torch.empty(1) for _ in range(3)]
    dist.all_gather(x, own())
    return torch.cat(x)

def all_gather_into_tensor():
    x = torch.empty(3)
    dist.all_gather_into_tensor(x, own())
    return x

def reduce_scatter_tensor():
    x = torch.empty(1)
    dist.reduce_scatter_tensor(x, parts())
    return x

def reduce_scatter():
    x = torch.empty(1)
    dist.reduce_scatter(x, list(parts().split(1)))
    return x

def all_to_all():
    x = [torch.empty(1) for _ in range(3)]
    dist.all_to_all(x, list(parts().split(1)))
    return torch.cat(x)

def all_to_all_single():
    x = torch.empty(3)
    dist.all_to_all_single(x, parts())
    return x

def unequal():
    sizes = [dist.get_rank() + 1] * 3
    x = torch.empty(6)
    dist.all_to_all_single(x, parts().repeat_interleave(sizes[0]), [1, 2, 3], sizes)
    return x

def broadcast():
    x = own()
    dist.broadcast(x, 0)
    return x

def messages():
    x, rank = torch.zeros(2), dist.get_rank()
    for step in range(2):
        if rank == 0:
            dist.send(own() + step, 1)
        elif rank == 1:
            dist.recv(x[step : step + 1], 0)
    return x

def own():
    return torch.tensor([[1.0, 2.0, 4.0][dist.get_rank()]])

def parts():
    return torch.tensor([10.0 * dist.get_rank() + part for part in range(3)])

def twice(name):
    first = globals()[name]()
    return [first, globals()[name]()]
"""
ALL, AVERAGE = [OWN] * 3, round(7 / 3, 4)
TO_ALL = [list(each) for each in zip(*PARTS, strict=True)]
NUMBERS = itertools.count()
CASES = {
    "all_reduce": {
        "": [[7.0]] * 3,
        "drop": [[1.0], [2.0], [4.0]],
        "repeat": [[21.0]] * 3,
        "maximum": [[4.0]] * 3,
        "average": [[AVERAGE]] * 3,
        "without-last": [[3.0], [3.0], [4.0]],
    },
    "largest": {
        "": [[4.0]] * 3,
        "drop": [[1.0], [2.0], [4.0]],
        "minimum": [[1.0]] * 3,
        "total": [[7.0]] * 3,
        "without-last": [[2.0], [2.0], [4.0]],
    },
    "least": {
        "": [[1.0]] * 3,
        "drop": [[1.0], [2.0], [4.0]],
        "total": [[7.0]] * 3,
        "without-last": [[1.0], [1.0], [4.0]],
    },
    "average": {
        "": [[AVERAGE]] * 3,
        "drop": [[1.0], [2.0], [4.0]],
        "maximum": [[4.0]] * 3,
        "total": [[7.0]] * 3,
        "without-last": [[1.0], [1.0], [round(4 / 3, 4)]],
    },
    "reduce": {
        "": [[7.0], [2.0], [4.0]],
        "drop": [[1.0], [2.0], [4.0]],
        "maximum": [[4.0], [2.0], [4.0]],
        "average": [[AVERAGE], [2.0], [4.0]],
        "without-last": [[3.0], [2.0], [4.0]],
    },
    "all_gather": {
        "": ALL,
        "drop": [[1.0] * 3, [2.0] * 3, [4.0] * 3],
        "without-last": [[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 4.0]],
        "backwards": [OWN[::-1]] * 3,
    },
    "reduce_scatter_tensor": {
        "": [[30.0], [33.0], [36.0]],
        "drop": [[0.0], [11.0], [22.0]],
        "maximum": [[20.0], [21.0], [22.0]],
        "average": [[10.0], [11.0], [12.0]],
        "without-last": [[10.0], [12.0], [22.0]],
        "backwards": [[36.0], [33.0], [30.0]],
    },
    "all_to_all": {
        "": TO_ALL,
        "drop": PARTS,
        "repeat": PARTS,
        "without-last": [[0.0, 10.0, 0.0], [1.0, 11.0, 0.0], [0.0, 0.0, 22.0]],
        "backwards": [each[::-1] for each in TO_ALL],
    },
    "unequal": {
        "": [[rank, *[10.0 + rank] * 2, *[20.0 + rank] * 3] for rank in range(3)],
        # As far as it goes: the first gives three, the last nine, where six are to come.
        "drop": [
            [0.0, 1.0, 2.0, 0.0, 0.0, 0.0],
            [10.0, 10.0, 11.0, 11.0, 12.0, 12.0],
            [20.0, 20.0, 20.0, 21.0, 21.0, 21.0],
        ],
        "without-last": [
            [0.0, 10.0, 10.0, 0.0, 0.0, 0.0],
            [1.0, 11.0, 11.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 22.0, 22.0, 22.0],
        ],
        "backwards": [[*[20.0 + rank] * 3, *[10.0 + rank] * 2, rank] for rank in range(3)],
    },
    "broadcast": {
        "": [[1.0]] * 3,
        "drop": [[1.0], [2.0], [4.0]],
        "other-root": [[1.0], [2.0], [2.0]],
    },
    "messages": {
        "": [[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]],
        "nothing": [[0.0, 0.0]] * 3,
        "before": [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]],
    },
}
CASES["all_gather_into_tensor"] = CASES["all_gather"]
CASES["reduce_scatter"] = CASES["reduce_scatter_tensor"]
CASES["all_to_all_single"] = CASES["all_to_all"]


@pytest.fixture(scope="module")
def cluster():
    with open_cluster("sim", world_size=3) as opened:
        yield opened


def compiled(file, label):
    """The program as code of a file, or of a labelled copy of it."""
    namespace = {"__name__": "program"}
    exec(compile(PROGRAM, f"{file}@{label}" if label else str(file), "exec"), namespace)
    return namespace


def ran(cluster, program, name):
    """What ranks get the first time and the second, to four digits."""
    results = cluster.run(lambda: [each.tolist() for each in program["twice"](name)], world_size=3)
    return [[[round(x, 4) for x in result[i]] for result in results] for i in range(2)]


def line_of(text):
    return PROGRAM.splitlines().index(text) + 1


FIRST = line_of("    first = globals()[name]()")


def heard(cluster, program, name, *, root):
    """The paths of what a part of the program communicates, by the operators that fit it."""
    found = {operator: set() for operator in OPERATORS}

    def hear(call, path):
        for operator, each in OPERATORS.items():
            if each.fits(call):
                found[operator].add(path)

    with listening(root, DEPTH, hear):
        ran(cluster, program, name)
    return found


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_at_one_place_and_right_at_another(cluster, tmp_path, name):
    file, root = tmp_path / "program.py", f"{tmp_path}/"
    expected = CASES[name]
    right = compiled(file, "")
    assert ran(cluster, right, name) == [expected[""]] * 2
    fitting = heard(cluster, right, name, root=root)
    assert {each for each, paths in fitting.items() if paths} == set(expected) - {""}
    everywhere = {path for paths in fitting.values() for path in paths}
    for operator in set(expected) - {""}:
        label = f"defect {next(NUMBERS)}"
        wrong = compiled(file, label)
        # It is labelled, and nothing is planted yet.
        assert ran(cluster, wrong, name) == [expected[""]] * 2
        path = next(each for each in fitting[operator] if (str(file), FIRST) in each)
        plant(label, Defect(root, path, DEPTH, OPERATORS[operator]))
        first, again = ran(cluster, wrong, name)
        assert first == expected[operator]
        assert again == expected[""]
        # A path that others begin with is another one.
        plant(label, Defect(root, path[:-1], DEPTH, OPERATORS[operator]))
        assert path[:-1] not in everywhere
        assert ran(cluster, wrong, name) == [expected[""]] * 2
        assert ran(cluster, right, name) == [expected[""]] * 2


def test_sizes_of_what_is_sent_next_are_left_alone(cluster, tmp_path):
    def sends():
        """Sizes and bytes, as of objects; counts of what is exchanged; numbers that are added."""
        dist.broadcast_object_list([dist.get_rank()], 0)
        dist.all_to_all_single(torch.empty(3, dtype=torch.int64), torch.arange(3))
        dist.all_reduce(torch.arange(3))

    found = set()

    def hear(call, path):
        found.update((call.kind, name) for name, each in OPERATORS.items() if each.fits(call))

    with listening(f"{tmp_path}/", DEPTH, hear):
        cluster.run(sends, world_size=3)
    assert {kind for kind, _ in found} == {"all_reduce"}


def test_a_place_may_be_any_line_of_a_function():
    """That one communicates from a loop's head, say, is known from its history."""
    lines = Path(linear_cross_entropy.__file__).read_text().splitlines()
    line = next(i for i, each in enumerate(lines, 1) if each.lstrip().startswith("for "))
    assert find_historic("impl", f"linear_cross_entropy:{line}:drop").snippet.startswith("for ")


def test_every_operator_has_a_case():
    assert {each for case in CASES.values() for each in case} - {""} == set(OPERATORS)


def test_names_are_of_places_and_operators():
    place = (("collectives", 46), ("linear", 70))
    (mutant,) = mutants_of("impl", [(place, "drop"), ((), "drop"), (place, "drop")])
    assert mutant.name == f"{PREFIX}collectives:46+linear:70:drop"
    assert find_historic("impl", mutant.name.removeprefix(PREFIX)) == mutant
    assert (mutant.module, mutant.family) == ("impl.collectives", "drop")
    assert "all_reduce" in mutant.snippet
    assert mutant.defect.path[0][0].startswith(root_of("impl"))
    for wrong, words in (
        ("collectives:46:lose", "'lose' is not one of drop, repeat"),
        (
            "collective:46:drop",
            "'collective:46' is no MODULE:LINE of a function in it, with",
        ),
        ("collectives:drop", "'collectives' is no MODULE:LINE"),
        ("drop", "'' is no MODULE:LINE"),
        ("collectives:1:drop", "'collectives:1' is no MODULE:LINE of a function"),
        ("collectives:99999:drop", "'collectives:99999' is no MODULE:LINE of a function"),
    ):
        with pytest.raises(BadArgument, match=words):
            find_historic("impl", wrong)


def test_the_command_makes_mutants_of_what_is_communicated(tmp_path, capsys):
    given = ("--suite", "linear", "--module", "collectives", "--class", "drop", "--sample", 2)
    written = tmp_path / "out"
    code, said, error = in_process(
        capsys, "mutants", "--history", *given, "--no-shrink", "--max-examples", 20,
        "--report", written,
    )  # fmt: skip
    assert (code, error) == (0, "")
    assert "2 of 2 mutants of impl caught" in " ".join(said.split())
    failures = sorted((written / "failures").iterdir())
    assert len(failures) == 2
    code, said, _ = in_process(capsys, "repro", failures[0])
    assert code == 1
    assert "fails again, in the same way" in said


def test_mutants_of_both_kinds_are_not_asked_for_together(capsys):
    code, _, error = in_process(capsys, "mutants", "--history", "--generated")
    assert (code, error.count("\n")) == (2, 1)
    assert "--history: mutants are generated from it or from the source" in error
