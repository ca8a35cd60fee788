"""A check never passes a target that shows nothing: empty tensors, frozen parameters, a constant
loss, or the reference's own results."""

import pytest
import torch
from observed import Scene
from vacuous_targets import WAYS

from verify.case import Case
from verify.checks.vacuity import must_not_vanish
from verify.cluster import open_cluster
from verify.layout import Layout
from verify.oracle.contract import Contract, TensorSpec
from verify.runner.record import Record
from verify.runner.recorder import Recorder
from verify.verdict import Verdict, judge

CHECKS = ("equivalence", "invariance", "determinism", "communication", "memory")
LINEAR = {"sequence": 2, "batch": 2, "in_features": 4, "out_features": 6}
CASES = [
    Case(concept="row_linear", layout=Layout(tp=2, dp=2), shape=LINEAR),
    Case(concept="column_linear", layout=Layout(), shape=LINEAR, lens="native", dtype="bfloat16"),
    Case(
        concept="tp_mlp",
        layout=Layout(tp=2),
        shape={"sequence": 2, "batch": 1, "hidden": 3, "ffn": 4},
        seed=8,
    ),
]
BLOCK = Case(
    concept="recomputed_block",
    layout=Layout(tp=2),
    shape={"sequence": 2, "batch": 2, "hidden": 4, "ffn": 4, "layers": 1},
    options={"recompute": "uniform-1"},
)


@pytest.fixture(scope="module")
def sim():
    with open_cluster("sim", world_size=4) as cluster:
        yield cluster


def verdict(check, case, way, cluster):
    return judge(check, case, target_name=f"vacuous_targets:{way}", cluster=cluster)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.concept)
def test_the_unspoilt_target_passes(sim, check, case):
    assert verdict(check, case, "Unspoilt", sim).verdict is Verdict.PASSED


@pytest.mark.parametrize("way", [way for way in WAYS if way != "Stolen"])
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.concept)
def test_a_target_that_shows_nothing_never_passes(sim, check, case, way):
    judged = verdict(check, case, way, sim)
    assert judged.verdict is Verdict.FAILED
    assert judged.finding is not None
    assert "Replay:" in judged.reason


@pytest.mark.parametrize("way", ["Empty", "Detached", "Zero"])
def test_recomputation_of_nothing_never_passes(sim, way):
    assert verdict("recomputation", BLOCK, "Unspoilt", sim).verdict is Verdict.PASSED
    assert verdict("recomputation", BLOCK, way, sim).verdict is Verdict.FAILED


@pytest.mark.parametrize(
    ("way", "text"),
    [
        ("Empty", "y is [0, 2, 6] on rank 0; it should be [2, 2, 6]"),
        ("Frozen", "grad weight is missing on ranks 0, 1: backward did not reach it"),
        ("Detached", "grad x is missing on ranks 0, 1: backward did not reach it"),
        ("Constant", "grad x is zero throughout on ranks 0, 1; it should not be"),
        ("Zero", "y is zero throughout on ranks 0, 1; it should not be"),
        ("Oracle", "it has the reference compute: verify.oracle."),
    ],
)
def test_what_is_said_of_it(sim, way, text):
    case = CASES[1] if way == "Oracle" else CASES[0]
    assert text in " ".join(verdict("determinism", case, way, sim).reason.split())


def test_what_the_oracle_refuses_for_a_target_is_no_refusal(sim):
    shape = {"sequence": 2, "batch": 1, "vocabulary": 4}
    wrong = {"label_smoothing": 1.5}
    case = Case(concept="vocab_cross_entropy", layout=Layout(tp=2), shape=shape, options=wrong)
    assert verdict("refusal", case, "Unspoilt", sim).verdict is Verdict.PASSED
    judged = verdict("refusal", case, "Asking", sim)
    assert judged.verdict is Verdict.FAILED
    assert "ran into an error while building" in " ".join(judged.reason.split())


def test_results_that_are_the_references_own_are_told_from_equal_ones(sim):
    case = Case(concept="column_linear", layout=Layout(), shape=LINEAR)
    judged = verdict("equivalence", case, "Stolen", sim)
    assert judged.verdict is Verdict.FAILED
    assert "y on rank 0 is the reference's own tensor" in " ".join(judged.reason.split())


def test_a_result_that_has_to_be_zero_may_be():
    """No upstream gradient, so that every gradient is zero."""
    zeros = Case(
        concept="row_linear", layout=Layout(tp=2), shape=LINEAR, options={"zeros": "grad y"}
    )
    with open_cluster("sim", world_size=2) as cluster:
        for check in ("determinism", "memory", "invariance"):
            assert verdict(check, zeros, "Unspoilt", cluster).verdict is Verdict.PASSED


def _concluded(*compared: int, must_check: bool = True) -> Record:
    recorder = Recorder("suite.one", must_check=must_check, on_example=lambda name, count: None)
    for count in compared:
        with recorder.example({}):
            if must_check:
                recorder.checked("equivalence", CASES[0], count)
    return recorder.conclude()


def test_a_property_that_compared_no_element_is_unknown():
    nothing = _concluded(0, 0)
    assert nothing.verdict is Verdict.UNKNOWN
    assert "no element was compared" in nothing.reason
    something = _concluded(0, 12, 3)
    assert (something.verdict, something.compared) == (Verdict.PASSED, 15)
    assert _concluded(0, must_check=False).verdict is Verdict.PASSED


@pytest.mark.parametrize(("value", "must"), [(0, False), (1, True)])
def test_whole_numbers_may_be_zero_where_the_reference_is(value, must):
    case = Case(concept="numbers", layout=Layout())
    contract = Contract(
        inputs={"x": TensorSpec((3,))},
        parameters={},
        outputs={"y": TensorSpec((3,)), "places": TensorSpec((3,), {}, None)},
        reference=lambda i, p: {"y": i["x"] * 2, "places": torch.full((3,), value)},
    )
    reference = Scene(case, contract, {}).references[""]
    assert must_not_vanish(reference, "places") is must
