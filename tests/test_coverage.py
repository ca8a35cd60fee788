"""Coverage of the space: pairs are counted as they are, draws reach for new ones, and a run that
misses one can be told to fail."""

import json
from itertools import product

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from test_pytest_plugin import properties, report, row  # noqa: F401

from verify.case import Case
from verify.coverage.factors import pairs_of, row_from, row_key, row_of
from verify.coverage.space import pair_counts, spaces_of
from verify.coverage.steering import CONCEPT, Steering, chosen, foresee, note_default, steered
from verify.layout import Layout
from verify.report.pairs import triangle
from verify.runner import examiner
from verify.runner.draws import Examples, seeded, use_profile
from verify.runner.limits import Limits, limits, set_limits
from verify.runner.options import RunOptions
from verify.runner.record import Record
from verify.strategies.attention import attention_cases
from verify.strategies.cases import cases, with_option
from verify.strategies.context import block_cases, split_cases
from verify.strategies.gpt import model_cases
from verify.strategies.moe import moe_cases
from verify.strategies.pipeline import pipeline_cases
from verify.strategies.random import recomputed_cases
from verify.strategies.transformer import layer_cases
from verify.verdict import Verdict

pytest_plugins = ["pytester"]

LINEAR = Case(concept="column_linear", layout=Layout(tp=2), options={"bias": False})


@pytest.fixture
def as_in_a_run():
    undo = use_profile(RunOptions())
    yield
    undo()


def drawn(strategy, count, *, steering=None, accept=lambda case: True):
    """The steering of a property that draws so many cases and checks those it accepts."""
    steering = steering or Steering()

    @settings(
        max_examples=Examples(count),
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def run(case):
        steering.reached(case)
        if accept(case):
            steering.checked(case)

    with steered(steering):
        run()
    return steering


def test_a_row_has_the_layout_the_arithmetic_and_every_option():
    row = row_of(LINEAR, {"bias": True, "gather_output": False})
    assert (row["tp"], row["dp"], row["sp"], row["dtype"]) == ("2", "1", "off", "float64")
    assert (row["bias"], row["gather_output"]) == ("off", "off")
    assert "etp" not in row
    experts = Case(concept="moe_layer", layout=Layout(tp=2, dp=2, ep=2))
    assert row_of(experts, {})["etp"] == "2"
    assert row_from(row_key("c", row)) == ("c", row)
    assert len(set(pairs_of(row))) == len(row) * (len(row) - 1) // 2


def _record(name, rows, open_=()):
    counts = {row_key("c", row): count for row, count in rows}
    return Record(property=name, verdict=Verdict.PASSED, rows=counts, open=tuple(open_))


def test_pairs_are_counted_over_properties_and_missed_only_if_none_has_them():
    def pair(*words):
        return ("c", words, False)

    one = _record(
        "s.one",
        [({"a": "1", "b": "x"}, 2), ({"a": "2", "b": "x"}, 1)],
        [pair("a", "1", "b", "y"), pair("a", "2", "b", "y")],
    )
    other = _record(
        "s.other",
        [({"a": "1", "b": "y"}, 3)],
        [("c", ("a", "3", "b", "y"), True), ("d", ("a", "1", "b", "y"), False)],
    )
    again = Record.from_json(json.loads(json.dumps(other.to_json())))
    assert again == other
    (space,) = spaces_of([one, again])
    assert (space.examples, dict(space.values["a"])) == (6, {"1": 5, "2": 1})
    assert space.missed == {("a", "2", "b", "y")}
    assert space.undecided == {("a", "3", "b", "y")}
    told = space.to_json()
    assert told["factors"] == {"a": {"1": 5, "2": 1}, "b": {"x": 3, "y": 3}}
    assert told["pairs"] == [{"factors": ["a", "b"], "counts": [[2, 3], [1, 0]]}]
    assert told["missed"] == ["a=2 with b=y"]
    assert pair_counts([space]) == {"exercised": 3, "missed": 1, "undecided": 1}
    shown = triangle(told)
    assert [(name, [(s.seen, s.of, s.shade) for s in row]) for name, row in shown.rows] == [
        ("b", [(3, 4, 4)])
    ]


VALUES = {"algorithm": "abcd", "bias": (True, False), "norm": "xyz", "mask": "pqr", "flat": "01"}


@st.composite
def _options(draw, forbidden=()):
    concept = chosen(draw, CONCEPT, ("options",))
    case = Case(concept=concept, layout=Layout(), shape={"n": draw(st.integers(0, 99))})
    for name, values in VALUES.items():
        allowed = [v for v in values if (case.options.get("algorithm"), v) not in forbidden]
        case = with_option(case, name, chosen(draw, name, allowed), default="none")
    return case


def test_all_pairs_are_covered_by_forty_cases(as_in_a_run):
    """Twelve pairs of the two largest factors, so twelve cases at least."""
    steering = drawn(_options(), 40)
    assert not list(steering.open())
    texts = {name: ["on", "off"] if name == "bias" else list(v) for name, v in VALUES.items()}
    wanted = {
        (one, value, other, its)
        for one, other in product(sorted(VALUES), repeat=2)
        if one < other
        for value in texts[one]
        for its in texts[other]
    }
    assert wanted <= steering.seen["options"]


def test_every_value_of_the_first_factor_is_drawn(as_in_a_run):
    draws = [[], []]
    for seed, found in enumerate(draws):
        with seeded("column_linear", seed=seed):
            drawn(cases("column_linear"), 40, accept=found.append)
        assert len({case.layout.tp for case in found}) >= 6, (seed, found)
    assert draws[0] != draws[1]


def test_what_is_drawn_does_not_depend_on_what_is_supported(as_in_a_run):
    found = []
    for supported in (True, False):
        seen = []
        drawn(
            cases("column_linear"),
            15,
            accept=lambda case, seen=seen, supported=supported: seen.append(case) or supported,
        )
        found.append(seen)
    assert found[0] == found[1]


def test_a_pair_that_cannot_be_is_not_required(as_in_a_run):
    forbidden = {("a", "x"), ("b", "q")}
    steering = drawn(_options(forbidden), 40)
    assert not list(steering.open())
    assert ("algorithm", "a", "norm", "x") not in steering.offered["options"]
    assert ("algorithm", "a", "norm", "y") in steering.seen["options"]


def test_a_pair_that_is_never_checked_is_given_up(as_in_a_run):
    def accept(case):
        return (case.options["algorithm"], case.options["mask"]) != ("c", "r")

    steering = drawn(_options(), 80, accept=accept)
    assert list(steering.open()) == [("options", ("algorithm", "c", "mask", "r"), True)]


ARITHMETIC = {"double": ("exact", "fp64"), **dict.fromkeys(("wide", "narrow"), ("native",))}


@st.composite
def _calculated(draw, *, told):
    """A size, a dtype, and a lens that the dtype has."""
    concept = chosen(draw, CONCEPT, ("calculated",))
    size = chosen(draw, "size", range(1, 9))
    if told:
        foresee({"type": name, "through": lens} for name in ARITHMETIC for lens in ARITHMETIC[name])
    kind = chosen(draw, "type", list(ARITHMETIC))
    options = {"size": size, "type": kind, "through": chosen(draw, "through", ARITHMETIC[kind])}
    return Case(concept=concept, layout=Layout(), shape={"n": 1}, options=options)


def test_choices_that_leave_others_none_are_steered_together(as_in_a_run):
    """Of each size there are four cases, two of which differ in the last choice only: what is to be
    had from it is nothing that a choice before it can know, unless it is told."""
    told, alone = (drawn(_calculated(told=told), 34) for told in (True, False))
    assert not list(told.open())
    wanted = {pair for pair in told.seen["calculated"] if "size" in (pair[0], pair[2])}
    assert {("size", str(n), "through", "exact") for n in range(1, 9)} <= wanted
    assert len(wanted - alone.seen["calculated"]) > 1


def test_of_a_world_without_room_nothing_is_foreseen(as_in_a_run):
    before = limits()
    set_limits(Limits(1))
    try:
        assert drawn(model_cases(min_pp=2), 3).seen["gpt_training"]
    finally:
        set_limits(before)


def test_the_simplest_case_is_drawn_once(as_in_a_run):
    """Hypothesis alone would begin with it several times, as only a number before it differs."""
    seen = []
    drawn(cases("column_linear"), 100, accept=seen.append)
    assert seen[0].layout == Layout()
    assert sum(case == seen[0] for case in seen) == 1
    assert sum(case.layout == Layout() for case in seen) < 10


def test_a_case_that_a_filter_rejects_makes_no_pairs_with_the_next(as_in_a_run):
    steering = drawn(cases("column_linear").filter(lambda case: case.layout.tp % 2), 30)
    assert steering.offered["column_linear"]
    assert all(one != other for one, _, other, _ in steering.offered["column_linear"])


@pytest.mark.parametrize("seed", range(4))
def test_a_failure_is_shrunk_whichever_of_several_strategies_it_came_from(seed):
    """What is drawn again on the way is drawn as it was, or Hypothesis calls it flaky."""
    steering = Steering()
    several = (split_cases("context_split"), split_cases("tokens_ahead"), cases("column_linear"))

    @settings(max_examples=100, database=None, deadline=None, derandomize=False)
    @hypothesis.seed(seed)
    @given(case=st.sampled_from(several).flatmap(lambda each: each))
    def run(case):
        steering.reached(case)
        if case.concept == "tokens_ahead" and case.layout.cp > 1:
            steering.active = False
            raise ZeroDivisionError

    with steered(steering), pytest.raises(ZeroDivisionError):
        run()


@pytest.mark.parametrize(
    "strategy",
    [
        cases("column_linear"),
        attention_cases("self_attention"),
        layer_cases(packed=(0, 2)),
        moe_cases("moe_router"),
        block_cases(),
        pipeline_cases(),
        recomputed_cases(),
    ],
    ids=["linear", "attention", "layer", "moe", "context", "pipeline", "recompute"],
)
def test_steered_draws_of_the_suites_leave_fewer_pairs_open_than_chance(as_in_a_run, strategy):
    class Unsteered(Steering):
        def best(self, *given):
            super().best(*given)

    steered_, chance = drawn(strategy, 25), drawn(strategy, 25, steering=Unsteered())
    left = [len(list(steering.open())) for steering in (steered_, chance)]
    assert left[0] < 0.8 * left[1]


def test_steering_changes_neither_replay_nor_shrinking(as_in_a_run):
    """What is found is the smallest case, with a steering and without."""
    found = []
    for steering in (None, Steering()):
        with steered(steering):
            case = find(
                cases("column_linear"),
                lambda case: case.layout.tp > 2 and case.dtype == "bfloat16",
                settings=settings(database=None, max_examples=500),
            )
        found.append(case)
    assert found[0] == found[1]
    assert found[0].layout == Layout(tp=3)


def test_defaults_are_noted_by_property(as_in_a_run):
    steering = Steering()
    note_default(LINEAR, "bias", True)
    with steered(steering):
        note_default(LINEAR, "gather_output", False)
    assert steering.checked(LINEAR)["gather_output"] == "off"
    assert Steering().checked(LINEAR).get("gather_output") is None


SUITE = """
from hypothesis import strategies as st, given
from verify.case import Case
from verify.coverage.steering import CONCEPT, chosen
from verify.layout import Layout

@st.composite
def cases(draw):
    concept = chosen(draw, CONCEPT, ("fake_row",))
    tp = chosen(draw, "tp", (1, 2, 3))
    dtype = chosen(draw, "dtype", ("float32", "bfloat16", "float16"))
    shape = {"sequence": 2, "batch": 1, "in_features": 6, "out_features": 2}
    seed = draw(st.integers(0, 999))
    return Case(concept=concept, layout=Layout(tp=tp), shape=shape, lens="native", dtype=dtype,
                seed=seed)

@given(case=cases())
def test_it(check, case):
    check("equivalence", case)
"""


def test_a_run_that_misses_a_pair_fails_if_it_is_told_to(
    properties,  # noqa: F811
    pytester,
    monkeypatch,
):
    monkeypatch.setattr(examiner, "FURTHER", 0)
    assert properties(SUITE, "--max-examples", "5").ret == 0
    result = properties(SUITE, "--max-examples", "5", "--require-pairs")
    assert result.ret == 1
    document = report(pytester)
    assert (document["verdict"], document["opens_gate"]) == ("passed", False)
    missed = document["coverage"]["pairs"]["missed"]
    assert missed >= 2
    (space,) = document["coverage"]["concepts"]
    result.stdout.fnmatch_lines([f"pair missed: fake_row: {space['missed'][0]}"])
    assert space["missed"][0] in (pytester.path / "out/index.html").read_text()


def test_a_property_that_misses_a_pair_draws_on(properties, pytester):  # noqa: F811
    assert properties(SUITE, "--max-examples", "5").ret == 0
    few = row(pytester, "fake.it")
    assert (few["examples"], report(pytester)["coverage"]["pairs"]["missed"] >= 2) == (5, True)
    found = []
    for _ in range(2):
        assert properties(SUITE, "--max-examples", "5", "--require-pairs").ret == 0
        found.append(row(pytester, "fake.it"))
        assert report(pytester)["coverage"]["pairs"]["missed"] == 0
    assert found[0]["examples"] in (15, 25, 35)
    assert found[0]["digest"] == found[1]["digest"] != few["digest"]


def test_a_run_that_has_them_all_passes(properties, pytester):  # noqa: F811
    result = properties(SUITE, "--max-examples", "20", "--require-pairs")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["pairs of values: * exercised, 0 missed"])
    (space,) = report(pytester)["coverage"]["concepts"]
    counts = {tuple(pair["factors"]): pair["counts"] for pair in space["pairs"]}
    assert all(count for row in counts["tp", "dtype"] for count in row)
