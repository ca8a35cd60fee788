"""What is drawn: valid, replayable, small when shrunk, and all of it reachable."""

import dataclasses
import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings

from verify.adversary import NONE
from verify.case import Case
from verify.errors import BadArgument
from verify.layout import Layout
from verify.lens import check_fits, generate
from verify.rank_program import contract_of
from verify.replica import RankMap
from verify.runner.limits import Limits, limits, set_limits
from verify.strategies.cases import (
    FAULTS,
    MAX_WORLD_SIZE,
    OPTIONS,
    SEQUENCE,
    SHAPES,
    STRIDES,
    cases,
    refusable_cases,
)

# Without the phase that explains: `find` returns the last example it tried, not the smallest.
SEARCH = settings(
    max_examples=4000,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


def check_valid(case: Case) -> None:
    contract = contract_of(case)
    ranks = RankMap(case.layout, contract.axes)
    check_fits(case, contract, ranks)
    generate(case, contract, ranks, "")


@given(case=cases(*SHAPES))
@settings(max_examples=300, deadline=None)
def test_drawn_cases_are_valid_and_replayable(case: Case) -> None:
    check_valid(case)
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case
    assert case.layout.world_size <= MAX_WORLD_SIZE
    for option, value in case.options.items():
        assert value != {**OPTIONS.get(case.concept, {}), "strides": STRIDES}[option][0]


@pytest.mark.parametrize("concept", SHAPES)
def test_every_case_shrinks_to_one_rank_and_sizes_of_one(concept: str) -> None:
    smallest = find(cases(concept), lambda case: True, settings=SEARCH)
    contract = contract_of(smallest)
    assert smallest == Case(
        concept=concept,
        layout=Layout(),
        shape=dict.fromkeys(SHAPES[concept], 1),
        lens="exact" if contract.linear else "fp64",
    )


def test_a_failure_on_two_ranks_shrinks_to_two_ranks() -> None:
    def wrong(case: Case) -> bool:
        return case.layout.tp > 1 and case.shape["batch"] > 1 and not case.options.get("bias", True)

    smallest = find(cases("row_linear"), wrong, settings=SEARCH)
    assert (smallest.layout, smallest.options) == (Layout(tp=2), {"bias": False})
    shape = {"sequence": 1, "batch": 2, "in_features": 2, "out_features": 1}
    assert (smallest.shape, smallest.seed, smallest.adversary) == (shape, 0, NONE)


def drawn(strategy, count: int = 1500) -> list[Case]:
    found: list[Case] = []

    @given(case=strategy)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found


def test_every_value_of_every_option_size_and_dtype_is_drawn() -> None:
    for concepts in (tuple(OPTIONS), ("vocab_cross_entropy",)):
        found = drawn(cases(*concepts))
        for concept in concepts:
            mine = [case for case in found if case.concept == concept]
            for option, values in OPTIONS[concept].items():
                seen = {case.options.get(option, values[0]) for case in mine}
                assert seen == set(values), (concept, option)
        assert {case.dtype for case in found} == {"float64", "float32", "bfloat16", "float16"}
        assert {case.layout.tp for case in found} == set(range(1, 9))
        assert {case.options.get("strides", STRIDES[0]) for case in found} == set(STRIDES)
        assert {bool(case.adversary) for case in found} == {False, True}
    flags = Counter(c.layout.sequence_parallel for c in drawn(cases("row_linear"), 300))
    assert min(flags[True], flags[False]) > 60


def test_replicas_and_awkward_sizes_are_common() -> None:
    found = drawn(cases(*SHAPES))
    replicas = [case.layout.world_size > case.layout.tp > 1 for case in found]
    assert sum(replicas) > len(found) / 2
    for axis in ("dp", "cp", "pp"):
        assert sum(getattr(case.layout, axis) > 1 for case in found) > len(found) / 6
    odd = [case.layout.tp in (3, 5, 6, 7) for case in found]
    assert sum(odd) > len(found) / 4
    assert len({str(case.layout) + case.layout.order for case in found}) > 100


def test_vocabularies_have_ranks_with_nothing_but_padding() -> None:
    options = {"mask_padding": (True,)}
    found = drawn(cases("vocab_cross_entropy", min_tp=2, options=options), 300)

    def empty(case: Case) -> bool:
        part = case.shape["vocabulary"] // case.layout.tp
        real = case.shape.get("real_vocabulary", case.shape["vocabulary"])
        return real <= case.shape["vocabulary"] - part

    assert sum(map(empty, found)) > 30


@given(case=refusable_cases(*FAULTS))
@settings(max_examples=200, deadline=None)
def test_a_case_to_refuse_is_wrong_in_one_thing(case: Case) -> None:
    """The oracle refuses it too, and no longer when that one thing is put right."""
    with pytest.raises(BadArgument):
        check_valid(case)
    assert any(_is_valid(near) for near in _neighbours(case)), case
    assert case.layout.tp > 1
    assert Case.from_json(case.to_json()) == case


def _is_valid(case: Case) -> bool:
    try:
        check_valid(case)
    except BadArgument:
        return False
    return True


def _neighbours(case: Case):
    """All that differ in one size, one option or in sequence parallelism."""
    for name in case.shape:
        if name != "real_vocabulary":
            yield dataclasses.replace(case, shape={**case.shape, name: 2 * case.layout.tp})
    for name in case.options:
        yield dataclasses.replace(
            case, options={n: v for n, v in case.options.items() if n != name}
        )
        for value in OPTIONS.get(case.concept, {}).get(name, ()):
            yield dataclasses.replace(case, options={**case.options, name: value})
    if SEQUENCE in SHAPES[case.concept].values():
        flag = not case.layout.sequence_parallel
        layout = dataclasses.replace(case.layout, sequence_parallel=flag)
        yield dataclasses.replace(case, layout=layout)


def test_every_fault_is_drawn() -> None:
    for concept, faults in FAULTS.items():
        found = drawn(refusable_cases(concept), 60 * len(faults))
        wrong = {
            fault for fault in range(len(faults)) for case in found if _shows(faults[fault], case)
        }
        assert wrong == set(range(len(faults))), concept


def _shows(fault, case: Case) -> bool:
    if fault.size:
        return bool(case.shape[fault.size] % case.layout.tp)
    if fault.option:
        return case.options.get(fault.option) in fault.values
    return case.layout.sequence_parallel not in fault.sequence_parallel


def test_what_the_run_cannot_check_is_not_drawn() -> None:
    before = limits()
    set_limits(Limits(max_world_size=3, lenses=("native",), adversaries=False))
    try:
        found = drawn(cases(*SHAPES), 200)
    finally:
        set_limits(before)
    assert max(case.layout.world_size for case in found) <= 3
    assert {case.lens for case in found} == {"native"}
    assert not any(case.adversary for case in found)
