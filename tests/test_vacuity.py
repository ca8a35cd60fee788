"""A check never passes a target that shows nothing: empty tensors, frozen parameters, a constant
loss, or the reference's own results."""

from dataclasses import replace

import pytest
import torch
from observed import Scene
from vacuous_targets import WAYS
from vacuous_trainings import WAYS as OF_TRAININGS

from verify.case import Case
from verify.checks.vacuity import must_not_vanish
from verify.cluster import open_cluster
from verify.layout import Layout
from verify.oracle.contract import Contract, TensorSpec
from verify.runner.record import Record
from verify.runner.recorder import Recorder
from verify.verdict import Verdict, judge

CHECKS = ("equivalence", "invariance", "determinism", "communication", "waiting", "memory")
ORACLES = "vacuous_oracles"
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
STEPS = Case(
    concept="training_steps",
    layout=Layout(dp=2),
    shape={"steps": 2, "rounds": 2, "sequence": 2, "batch": 2, "hidden": 3, "ffn": 2},
    options={"overlap": True, "bucket": 7},
)
GPT = Case(
    concept="gpt_training",
    layout=Layout(pp=2, dp=2),
    shape={
        "steps": 2, "microbatches": 2, "sequence": 4, "batch": 2, "hidden": 3, "heads": 2,
        "groups": 2, "head_size": 2, "ffn": 2, "layers": 2, "vocabulary": 4,
    },
    options={"overlap": True, "bucket": 20, "norm": "rms", "bias": False},
)  # fmt: skip
OF_STEPS = ("equivalence", "invariance", "determinism", "waiting", "traffic")
TRAININGS = [(check, case) for case in (STEPS, GPT) for check in OF_STEPS]
TRAININGS += [("recomputation", replace(GPT, options={**GPT.options, "recompute": "full"}))]


@pytest.fixture(scope="module")
def sim():
    with open_cluster("sim", world_size=4) as cluster:
        yield cluster


def verdict(check, case, way, cluster, module="vacuous_targets"):
    return judge(check, case, target_name=f"{module}:{way}", cluster=cluster)


def _fails(judged):
    assert judged.verdict is Verdict.FAILED
    assert judged.finding is not None
    assert "Replay:" in judged.reason


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.concept)
def test_the_unspoilt_target_passes(sim, check, case):
    assert verdict(check, case, "Unspoilt", sim).verdict is Verdict.PASSED


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.concept)
def test_a_target_that_shows_nothing_never_passes(sim, check, case, way):
    _fails(verdict(check, case, way, sim))


@pytest.mark.parametrize(("check", "case"), TRAININGS)
def test_an_unspoilt_training_passes(sim, check, case):
    assert verdict(check, case, "Unspoilt", sim).verdict is Verdict.PASSED


@pytest.mark.parametrize("way", OF_TRAININGS)
@pytest.mark.parametrize("check", OF_STEPS)
def test_steps_that_show_nothing_never_pass(sim, check, way):
    _fails(verdict(check, STEPS, way, sim, "vacuous_trainings"))


@pytest.mark.parametrize("way", ["Still", "Flat", "Untold", "ZeroOnOne"])
@pytest.mark.parametrize(("check", "case"), TRAININGS[len(OF_STEPS) :])
def test_a_whole_model_that_shows_nothing_never_passes(sim, check, case, way):
    _fails(verdict(check, case, way, sim, "vacuous_trainings"))


@pytest.mark.parametrize("way", ["EmptyOnOne", "ZeroOnOne"])
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES[::2], ids=lambda case: case.concept)
def test_every_rank_has_to_show_its_part(sim, check, case, way):
    assert verdict(check, case, way, sim, "vacuous_trainings").verdict is Verdict.FAILED


@pytest.mark.parametrize(
    ("way", "text"),
    [
        ("Still", "gradient mlp.fc1.weight is zero throughout on ranks 0, 1; it should not be"),
        ("Flat", "norm is zero throughout on ranks 0, 1; it should not be"),
        ("Untold", "loss is [0] on ranks 0, 1; it should be [2]"),
        ("EmptyOnOne", "gradient mlp.fc1.weight is [0, 2, 3] on rank 1; it should be [2, 2, 3]"),
        ("ZeroOnOne", "loss is zero throughout on rank 1; it should not be"),
    ],
)
@pytest.mark.parametrize("check", ["waiting", "traffic"])
def test_what_is_said_of_a_training(sim, check, way, text):
    judged = verdict(check, STEPS, way, sim, "vacuous_trainings")
    assert text in " ".join(judged.reason.split())


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


@pytest.mark.parametrize("check", ["equivalence", "invariance"])
def test_while_a_target_runs_there_is_no_reference_to_be_found(sim, check):
    case = Case(concept="column_linear", layout=Layout(), shape=LINEAR, seed=8 * 1009 + 1)
    _fails(verdict(check, case, "Found", sim, ORACLES))


@pytest.mark.parametrize("way", ["Copying", "HandedOn"])
@pytest.mark.parametrize("check", ["equivalence", "determinism"])
def test_copies_of_what_the_reference_computes_are_noticed_by_the_calls(sim, check, way):
    """On whichever rank: the sum over tp of a row-parallel layer is alike on all of them."""
    judged = verdict(check, replace(CASES[0], layout=Layout(tp=4), seed=16), way, sim, ORACLES)
    assert judged.verdict is Verdict.FAILED
    assert "it has the reference compute: verify.lens." in " ".join(judged.reason.split())


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
