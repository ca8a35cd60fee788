"""Mutants that are generated from source: what is changed, what is not, and their names."""

import dataclasses

import pytest

from verify.case import Case
from verify.cluster import open_cluster
from verify.errors import BadArgument, HarnessError
from verify.layout import Layout
from verify.mutants import CATALOGUE
from verify.mutants.equivalent import Equivalent, Equivalents, Indifferent
from verify.mutants.generated import find_generated, generate
from verify.mutants.history import mutants_of
from verify.mutants.operators import OPERATORS
from verify.mutants.packages import short_modules_of
from verify.mutants.source import Source
from verify.mutation.run import Selection, select
from verify.mutation.trials import Surveyed
from verify.targets import load_target
from verify.verdict import Verdict, judge

HEAD = "import torch.distributed as dist\n"


def made(operator, body, head="def f(x, y, n, group, groups):"):
    """The lines that an operator makes of the last line of a function."""
    lines = body.splitlines()
    source = Source("\n".join([HEAD + head, *(f"    {line}" for line in lines)]) + "\n")
    found = []
    for node in source.nodes():
        for edit in OPERATORS[operator](node, source):
            text = source.text[: edit.start] + edit.text + source.text[edit.end :]
            compile(text, "made", "exec")
            assert edit.wrong.endswith(".")
            found.append(text.splitlines()[-1].strip())
    return found


@pytest.mark.parametrize(
    ("operator", "line", "expected"),
    [
        ("drop-collective", "y = all_reduce(x + y, group=group)", ["y = (x + y)"]),
        ("drop-collective", "dist.all_reduce(x, group=group)", ["x"]),
        ("drop-collective", "dist.all_to_all_single(x, y, group=group)", ["x.copy_(y)"]),
        ("drop-collective", "w = dist.all_reduce(x, group=group, async_op=True)", ["w = None"]),
        ("drop-collective", "y = divide(n, group=group)", []),
        (
            "repeat-collective",
            "return all_reduce(x, group=group)",
            ["return all_reduce(all_reduce(x, group=group), group=group)"],
        ),
        ("repeat-collective", "return all_gather(x, group=group)", []),
        (
            "average",
            "return all_reduce(x, group=group)",
            ["return (all_reduce(x, group=group) / (group).size())"],
        ),
        ("other-reduction", "op = dist.ReduceOp.SUM", ["op = dist.ReduceOp.MAX"]),
        ("other-group", "f(x, group=groups.tp)", ["f(x, group=None)", "f(x, group=groups.dp_cp)"]),
        ("other-group", 'groups.size("dp")', ["groups.size('tp')"]),
        (
            "other-rank",
            "r = dist.get_rank(group)",
            ["r = 0", "r = (dist.get_world_size(group) - 1 - dist.get_rank(group))"],
        ),
        ("one-rank", "n = dist.get_world_size(group)", ["n = 1"]),
        ("drop-scale", "y = x * (n + 1)", ["y = (x)"]),
        ("drop-scale", "x /= n", ["pass"]),
        ("drop-scale", "y = x.div_(n)", ["y = x"]),
        ("other-sign", "y = x - (y + n)", ["y = ((x) + (y + n))", "y = x - (((y) - (n)))"]),
        ("other-sign", "y = -x", ["y = (x)"]),
        ("swap-operands", "y = (x + n) / y", ["y = ((y) / (x + n))"]),
        ("swap-arguments", "f(x, y, n)", ["f(y, x, n)"]),
        ("swap-arguments", "f(x, x)", []),
        ("swap-arguments", "f(split_dim=x, concat_dim=y)", ["f(split_dim=y, concat_dim=x)"]),
        ("swap-items", "x, y = f()", ["y, x = f()"]),
        ("swap-items", "x, y = 0, 0", []),
        ("swap-items", "y = n in (x, y)", []),
        ("swap-items", "y = (x, y) in n", ["y = (y, x) in n"]),
        ("swap-items", "x, y = f(), f()", ["y, x = f(), f()"]),
        ("other-slice", "x[1:n]", ["x[:n]", "x[(1) + 1:n]", "x[1:]", "x[1:(n) - 1]"]),
        ("first-part", "x.narrow(0, n, 2)", ["x.narrow(0, 0, 2)"]),
        ("drop-mask", "y = x.masked_fill(y, 0.0)", ["y = x"]),
        ("drop-copy", "y = x.contiguous().view(n)", ["y = x.view(n)"]),
        ("leave-out", "x.add_(y)", ["pass"]),
        ("leave-out", "x[n:] = 0", ["pass"]),
        ("leave-out", "super().__init__()", []),
        ("other-constant", "f(x, -1, dim=0)", ["f(x, 0, dim=0)", "f(x, -1, dim=-1)"]),
        ("other-constant", "y = n + 1", ["y = n + 2"]),
        ("other-constant", "y = x[True]", []),
        ("flip", "y = x if n > 1 else y", ["y = x if (not (n > 1)) else y"]),
        ("flip", "return [each for each in x if each]", None),
        ("other-bound", "y = 0 <= x < n", ["y = 0 < x < n", "y = 0 <= x <= n"]),
        ("other-equality", "y = x == n", ["y = x != n"]),
        ("other-connective", "y = (x < n) | (x > y)", ["y = ((x < n) & (x > y))"]),
        ("other-connective", "y = x and n", ["y = ((x) or (n))"]),
        ("not-negated", "y = ~x", ["y = (x)"]),
        ("other-flag", "f(x, sequence_parallel=n)", ["f(x, sequence_parallel=(not (n)))"]),
        ("other-flag", "f(x, keep=True)", ["f(x, keep=False)"]),
    ],
)
def test_operators(operator, line, expected):
    found = made(operator, line)
    assert found == (
        ["return [each for each in x if (not (each))]"] if expected is None else expected
    )


def test_a_refusal_is_accepted_and_not_turned_around():
    body = "if n < 0:\n    raise ValueError(n + 1)"
    source = Source(HEAD + "def f(n):\n" + "".join(f"    {line}\n" for line in body.splitlines()))
    edits = {
        name: [edit.text for node in source.nodes() for edit in operator(node, source)]
        for name, operator in OPERATORS.items()
    }
    expected = {"accept": ["False"], "other-bound": [" <= "], "other-constant": ["1"]}
    assert {name: texts for name, texts in edits.items() if texts} == expected


def test_a_backward_without_a_gradient():
    text = HEAD + "class F:\n    def backward(ctx, g):\n        return g, None, g + 1\n"
    source = Source(text)
    (value,) = [node for node in source.nodes() if OPERATORS["no-gradient"](node, source)][:1]
    edits = [e.text for n in source.nodes() for e in OPERATORS["no-gradient"](n, source)]
    assert edits == ["None", "None"]
    assert source.function(value) == "F.backward"


def test_what_computes_nothing_is_left_alone():
    text = (
        '"""Of 1 and 2."""\n'
        "CONSTANT = 3\n"
        "@decorated(4)\n"
        "def f(x: tuple[5], *, y: int = 6) -> Literal[7]:\n"
        '    """Of 8."""\n'
        "    z: list[9] = x\n"
        "    divide(x, name='of' * 10)\n"
        '    raise ValueError(f"{x + 11}", 12)\n'
    )
    source = Source(text)
    numbers = {getattr(node, "value", None) for node in source.nodes()}
    assert {each for each in numbers if isinstance(each, int)} == {6}


def test_places_are_found_beside_other_alphabets_and_on_many_lines():
    text = 'def f(x):\n    return ("äöü", x,\n        x + 1)\n'
    source = Source(text)
    (edit,) = (e for n in source.nodes() for e in OPERATORS["other-sign"](n, source))
    assert text[edit.start : edit.end] == "x + 1"
    assert {tuple(source.lines(node)) for node in source.nodes()} == {(2, 3)}


def test_lines_of_a_place_are_those_that_run_with_it():
    text = "def f(x, y=1):\n    if x > 2:\n        y += 3\n    return y\n"
    source = Source(text)
    lines = {node.value: tuple(source.lines(node)) for node in source.nodes() if hasattr(node, "n")}
    assert lines == {1: (2, 3, 4), 2: (2,), 3: (3,)}


def test_names_are_unique_and_every_mutant_changes_the_code():
    found = generate("impl", ("linear", "partition"))
    assert found == generate("impl", ("linear", "partition"))
    assert len({each.name for each in found}) == len(found) > 100
    for each in found:
        changed = each.applied_to(each.original)
        assert changed != each.original
        assert int(each.name.split(":")[2]) < each.lines.stop
        assert find_generated("impl", each.name.removeprefix("generated:")) is each


def test_a_mutant_of_other_source_is_not_applied():
    (first, *_) = generate("impl", ("partition",))
    with pytest.raises(HarnessError, match=r"impl\.partition is not as it was"):
        first.applied_to(first.original + "\n")


def test_a_generated_mutant_is_a_target():
    drops = [m for m in generate("impl", ("mappings",)) if m.family == "drop-collective"]
    case = Case(
        concept="copy_to_tp", layout=Layout(tp=2), shape={"sequence": 1, "batch": 1, "hidden": 2}
    )
    with open_cluster("sim", world_size=2) as cluster:
        verdicts = {
            judge("equivalence", case, target_name=f"impl@{each.name}", cluster=cluster).verdict
            for each in drops[:2]
        }
    assert verdicts == {Verdict.FAILED, Verdict.PASSED}


@pytest.mark.parametrize("name", ["", "linear:1:drop-scale", "none:1:drop-scale"])
def test_an_unknown_generated_mutant_is_one_line(name):
    with pytest.raises(BadArgument, match="no generated mutant") as caught:
        load_target(f"impl@generated:{name}")
    assert "\n" not in str(caught.value)


def test_selections():
    hand_made = select(Selection(), seed=0)
    assert [each.name for each in hand_made] == list(CATALOGUE["impl"])
    some = select(Selection(classes=("gradients",), modules=("gradients",)), seed=0)
    assert {each.family for each in some} == {"gradients"}
    sampled = select(Selection(generated=True, modules=("mlp",), sample=5), seed=3)
    assert sampled == select(Selection(generated=True, modules=("mlp",), sample=5), seed=3)
    assert len(sampled) == 5
    within = select(Selection(modules=("moe",), without=("moe.router",)), seed=0)
    assert {each.module.split(".")[1] for each in within} == {"moe"}
    assert "impl.moe.router" not in {each.module for each in within}
    of_one = select(Selection(modules=("linear",), without=("pretrain",)), seed=0)
    assert {each.module for each in of_one} == {"impl.linear"}
    left = select(Selection(generated=True, without=("pretrain", "mlp")), seed=0)
    modules = {each.module for each in left}
    assert {"impl.mlp", "impl.pretrain.run"}.isdisjoint(modules)
    assert {"impl.linear", "impl.moe.router"} <= modules
    listed = Equivalents.read()
    of_random = select(Selection(generated=True, modules=("random",)), seed=0)
    unlisted = select(Selection(generated=True, unlisted=True, modules=("random",)), seed=0)
    assert unlisted == [each for each in of_random if not listed.reason(each)]
    assert 0 < len(unlisted) < len(of_random)
    names = [each.name.removeprefix("generated:") for each in sampled[:1]]
    chosen = select(Selection(generated=True, names=tuple(names)), seed=0)
    assert [each.name for each in chosen] == [sampled[0].name]


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        (Selection(names=("none",)), "--name: 'none' is not one of"),
        (Selection(classes=("none",)), "--class: 'none' is not one of"),
        (Selection(modules=("none",)), "--module: 'none' is no module of impl"),
        (Selection(generated=True, modules=("liner",)), "--module: 'liner' is no module of impl"),
        (Selection(classes=("gradients",), modules=("mlp",)), "none is of all"),
        (Selection(generated=True, without=("pre",)), "--without: 'pre' is no module of impl"),
    ],
)
def test_a_wrong_selection_is_one_line(selection, words):
    with pytest.raises(BadArgument, match=words) as caught:
        select(selection, seed=0)
    assert "\n" not in str(caught.value)


def equivalent(mutant, **more):
    return Equivalent(
        mutant.module,
        mutant.function,
        mutant.line,
        mutant.family,
        " ".join(mutant.snippet.split()),
        " ".join(mutant.replacement.split()),
        "It is.",
        **more,
    )


def test_entries_of_equivalent_mutants():
    mutants = generate("impl", ("gradients",))
    right = equivalent(mutants[0])
    listed = Equivalents([right])
    assert (listed.reason(mutants[0]), listed.reason(mutants[1])) == ("It is.", "")
    assert listed.stale(mutants) == []
    assert listed.stale(generate("impl", ("mlp",))) == []
    for wrong in (dataclasses.replace(right, nth=2), dataclasses.replace(right, snippet="x")):
        (said,) = Equivalents([wrong]).stale(mutants)
        assert said.endswith("no mutant is so")


def test_entries_of_what_is_communicated_are_of_all_that_passes_a_line():
    line = impl_line("gradients", "all_reduce(")
    places = [(("collectives", 46), ("gradients", line), *above) for above in ((), (("norm", 60),))]
    mutants = mutants_of("impl", [(place, name) for place in places for name in ("drop", "total")])
    other = mutants_of("impl", [((("collectives", 46),), "drop")])
    _, (module, text) = mutants[0].texts[:2]
    assert (module, "all_reduce(" in text) == ("impl.gradients", True)
    right = Indifferent(module, text, "drop", "It is.")
    listed = Equivalents([right])
    assert [listed.reason(each) for each in mutants] == ["It is.", "", "It is.", ""]
    assert [listed.reason(each) for each in other] == [""]
    assert listed.without_a_line("impl") == listed.stale(generate("impl", ("gradients",))) == []
    for wrong in ({"line": "no line"}, {"line": ""}, {"module": "impl.none"}, {"operator": "none"}):
        (said,) = Equivalents([dataclasses.replace(right, **wrong)]).without_a_line("impl")
        assert said.endswith("nothing is so")


def test_mutants_of_a_history_that_are_not_listed():
    line = impl_line("moe.balance", "all_reduce(self.counts")
    place = (("collectives", 46), ("collectives", 94), ("moe.balance", line))
    fitting = {(place, name): frozenset([0]) for name in ("repeat", "drop")}
    surveyed = [Surveyed("moe.some", communicated=fitting)]
    for unlisted, left in ((False, ["drop", "repeat"]), (True, ["drop"])):
        choice = select(Selection(history=True, unlisted=unlisted), seed=0)
        assert [each.family for each in choice(surveyed)] == left


def test_a_stale_entry_of_a_history_is_one_line(monkeypatch):
    stale = Equivalents([Indifferent("impl.mlp", "no line", "drop", "It is.")])
    monkeypatch.setattr(Equivalents, "read", lambda: stale)
    with pytest.raises(
        BadArgument, match=r"equivalent\.toml: impl\.mlp, drop of 'no line'"
    ) as caught:
        select(Selection(history=True), seed=0)
    assert "\n" not in str(caught.value)


def impl_line(module, text):
    lines = short_modules_of("impl")[module].read_text().splitlines()
    return next(number for number, each in enumerate(lines, 1) if text in each)


def test_the_entries_that_there_are_fit_the_source():
    listed = Equivalents.read()
    assert listed.stale(generate("impl")) == listed.without_a_line("impl") == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "cannot read"),
        ('[[equivalent]]\nmodule = "impl.mlp"\n', "equivalent 1 lacks"),
        ('[[history]]\nmodule = "impl.mlp"\nnth = 2\n', "history 1 lacks .* has .'nth'. too many"),
        ("[[other]]\nreason = ''\n", "has tables .'other'., which are none of equivalent, history"),
    ],
)
def test_a_wrong_file_of_equivalents(tmp_path, text, words):
    path = tmp_path / "equivalent.toml"
    path.write_text(text)
    with pytest.raises(HarnessError, match=words):
        Equivalents.read(path)
    path.unlink()
    with pytest.raises(HarnessError, match="cannot read"):
        Equivalents.read(path)
