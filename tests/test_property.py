"""The checks against a target that is right, and against the same target with one defect each."""

from collections.abc import Iterator

import fake_targets
import pytest
import torch.distributed as dist

from verify import oracle
from verify.case import Case
from verify.checks.blame import Bench
from verify.cluster import Cluster, open_cluster
from verify.errors import BadArgument, HarnessError, Mismatch, NotSupported
from verify.finding import KINDS, Divergence, Finding
from verify.layout import Layout
from verify.oracle.contract import Contract
from verify.property import CHECKS
from verify.verdict import Verdict, judge, opens_gate, worst

SHAPE = {"sequence": 3, "batch": 2, "in_features": 8, "out_features": 5}
SUM = {"sequence": 4, "batch": 2, "hidden": 3}
LENSES = [("exact", "float64"), ("fp64", "float64"), ("native", "float32"), ("native", "bfloat16")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with open_cluster("process", world_size=4, timeout=20.0, stall=1.0) as opened:
        yield opened


def case_of(concept="fake_row", **parts) -> Case:
    given = {"layout": Layout(tp=2, dp=2), "shape": SHAPE if concept == "fake_row" else SUM}
    return Case(concept=concept, **{**given, **parts})


def check(name: str, case: Case, cluster: Cluster, defect: str | None = None) -> None:
    CHECKS[name](case, target_name=fake_targets.target_of(defect), cluster=cluster)


def finding(name: str, case: Case, cluster: Cluster, defect: str) -> Finding:
    """What the check finds; its text is fit for people, and it survives JSON."""
    with pytest.raises(Mismatch) as caught:
        check(name, case, cluster, defect)
    found = caught.value.finding
    assert found is not None
    assert found.check == name
    assert str(caught.value) == found.message()
    lines = found.message().splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[-1] == "Replay: shardproof repro REPORT.json"
    assert "Traceback" not in found.message()
    assert f"seed={case.seed}" in found.message()
    assert Finding.from_json(found.to_json()).to_json() == found.to_json()
    return found


@pytest.mark.parametrize(("lens", "dtype"), LENSES)
@pytest.mark.parametrize("check_name", ["equivalence", "determinism", "invariance"])
def test_the_right_target_passes(cluster, check_name, lens, dtype):
    for concept in ("fake_row", "fake_sum"):
        for options in ({}, {"strides": "transposed"}, {"zeros": "x"}):
            check(check_name, case_of(concept, lens=lens, dtype=dtype, options=options), cluster)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=4), Layout(dp=3), Layout(tp=2, pp=2)])
def test_the_right_target_passes_on_any_layout(cluster, layout):
    check("equivalence", case_of(layout=layout), cluster)
    check("equivalence", case_of(layout=layout, options={"frozen_weight": True}), cluster)
    check("invariance", case_of("fake_sum", layout=layout), cluster)


@pytest.mark.parametrize(
    ("defect", "kind", "tensor", "cause"),
    [
        ("detached", "missing", "grad x", None),
        ("bfloat16", "value", "y", "of the size of bfloat16"),
        ("bias before sum", "value", "y", "bias is added 2 times"),
        ("no sum", "value", "y", "the sum over tp (size 2) is missing"),
        ("twice", "value", "y", "2 times too large"),
        ("copies", "copies", "y", None),
        ("wrong row", "value", "y", None),
        ("nan", "value", "y", "is NaN or infinite"),
        ("transposed", "value", "y", "are exchanged in memory"),
        ("dtype", "dtype", "y", None),
        ("bias gradient", "value", "grad bias", "2 times too large"),
    ],
)
def test_equivalence_finds_a_wrong_tensor(cluster, defect, kind, tensor, cause):
    found = finding("equivalence", case_of(), cluster, defect)
    assert (found.kind, found.first.tensor) == (kind, tensor)
    if cause is not None:
        assert cause in found.explanations[0].sentence
        assert " ".join(found.explanations[0].sentence.split()) in " ".join(found.message().split())
    assert found.first.tensor in found.table()


def test_the_share_of_one_rank(cluster):
    found = finding("equivalence", case_of("fake_sum"), cluster, "one share")
    assert found.first.tensor == "y"
    assert found.explanations[0].sentence == "y has the share of tp=1 only"


def test_a_frozen_parameter_must_stay_without_gradient(cluster):
    case = case_of(options={"frozen_weight": True})
    found = finding("equivalence", case, cluster, "frozen gradient")
    assert (found.kind, found.first.tensor) == ("unexpected", "grad weight")


@pytest.mark.parametrize(
    ("defect", "words"),
    [
        ("extra output", "outputs: y, z; promised are y; unknown z"),
        ("unknown parameter", "parameters: weight, bias, scale; promised are weight, bias"),
        ("lost parameter", "missing bias"),
    ],
)
def test_names_that_are_not_promised(cluster, defect, words):
    found = finding("equivalence", case_of(), cluster, defect)
    assert found.kind == "contract"
    assert any(words in detail for detail in found.details)
    assert found.details[0].startswith("ranks 0, 1, 2, 3")


def test_a_target_that_raises(cluster):
    found = finding("equivalence", case_of(), cluster, "raise")
    assert found.kind == "crash"
    (detail,) = found.details
    assert detail.startswith("ranks 0, 1, 2, 3, running forward: ValueError: in_features: 7 is not")
    assert "fake_targets.py" in detail
    found = finding("equivalence", case_of(), cluster, "raise on one")
    assert found.details[0].startswith("ranks 1, 3, running forward: ValueError")


def test_a_target_that_hangs(cluster):
    found = finding("equivalence", case_of(), cluster, "deadlock")
    assert found.kind == "deadlock"
    for ranks in ("0, 2", "1, 3"):
        assert any(f"ranks {ranks}" in detail for detail in found.details)


def test_determinism(cluster):
    case = case_of()
    found = finding("determinism", case, cluster, "random")
    assert (found.kind, found.first.tensor) == ("bits", "y")
    assert "in a second run of the same case" in found.message()


def test_invariance(cluster):
    found = finding("invariance", case_of(), cluster, "bias before sum")
    assert found.first.tensor == "y"
    assert "bias is added 2 times" in found.explanations[0].sentence


def test_what_is_not_supported_is_said(cluster):
    shape = {**SHAPE, "in_features": 1001}
    case = case_of(shape=shape, layout=Layout())
    for name in ("equivalence", "determinism", "invariance", "refusal"):
        with pytest.raises(NotSupported, match="it is too wide"):
            check(name, case, cluster)


REFUSED = {**SHAPE, "in_features": 7}


def test_refusal(cluster):
    check("refusal", case_of(shape=REFUSED), cluster)
    for defect, words in (
        ("internal", "ran into an error while building, it did not refuse: IndexError"),
        ("vague", "refused while building without naming a size or an option: ValueError"),
    ):
        found = finding("refusal", case_of(shape=REFUSED), cluster, defect)
        assert found.kind == "refusal"
        assert any(words in detail for detail in found.details), found.details
    found = finding("refusal", case_of(), cluster, "vague")
    assert found.details == tuple(f"rank {rank} computed the case" for rank in range(4))


def _none(case: Case) -> Contract:
    raise BadArgument("case.shape.in_features: 8 is none")


def test_what_the_contract_refuses_is_no_refusal_of_the_target(monkeypatch):
    """The target would compute it; there is nothing to give it."""
    monkeypatch.setitem(oracle.CONTRACTS, "fake_row", _none)
    with open_cluster("sim", world_size=2) as sim, pytest.raises(HarnessError, match="8 is none"):
        check("refusal", case_of(layout=Layout(tp=2)), sim)


def test_a_refusal_by_some_ranks_is_a_deadlock(cluster):
    """Rank 0 of each pair fails on its part of 7; rank 1 waits for it."""
    found = finding("refusal", case_of(shape=REFUSED), cluster, "lenient")
    assert found.kind == "deadlock"


def test_bad_cases_are_the_callers_mistake(cluster):
    with pytest.raises(BadArgument, match="does not divide by 2"):
        check("equivalence", case_of(shape=REFUSED), cluster)
    with pytest.raises(BadArgument, match="'fake_tow' is not one of"):
        check("equivalence", case_of(concept="fake_tow"), cluster)
    with pytest.raises(BadArgument, match="target: 'nobody' is not one of impl, megatron-core"):
        CHECKS["equivalence"](case_of(), target_name="nobody", cluster=cluster)


def _broken() -> None:
    raise KeyError("ours")


def _only_rank_0() -> int:
    return dist.get_rank()


def test_a_failure_of_the_harness_is_not_the_targets(cluster):
    bench = Bench("equivalence", case_of(), fake_targets.target_of(None), cluster)
    with pytest.raises(HarnessError, match="KeyError"):
        bench.run(_broken, world_size=2)
    assert bench.run(_only_rank_0, world_size=2) == [0, 1]


def test_verdicts(cluster):
    def judged(case, defect=None, name="equivalence"):
        target = fake_targets.target_of(defect)
        return judge(name, case, target_name=target, cluster=cluster)

    assert judged(case_of()).verdict is Verdict.PASSED
    failed = judged(case_of(), "no sum")
    assert failed.verdict is Verdict.FAILED
    assert failed.finding.first.tensor == "y"
    wide = case_of(shape={**SHAPE, "in_features": 1001}, layout=Layout())
    assert judged(wide).verdict is Verdict.NOT_SUPPORTED
    unknown = judged(case_of("fake_zero", shape=SUM))
    assert unknown.verdict is Verdict.UNKNOWN
    assert "it shows nothing" in unknown.reason
    with pytest.raises(BadArgument, match="check: 'magic' is not one of equivalence"):
        judged(case_of(), name="magic")


def test_a_verdict_is_never_lost():
    passed, lacks, known, unknown, failed = Verdict
    assert worst([]) is Verdict.UNKNOWN
    assert worst([passed, lacks]) is passed
    assert worst([lacks]) is lacks
    assert worst([passed, unknown, lacks]) is unknown
    assert worst([unknown, failed, passed]) is failed
    assert worst([passed, known, lacks]) is known
    assert worst([known, unknown]) is unknown
    assert opens_gate([passed, lacks])
    assert opens_gate([passed, known])
    closed = ([], [lacks], [unknown, passed], [failed], [known, failed])
    assert not any(opens_gate(each) for each in closed)


def test_findings_survive_json_and_foreign_ones_are_refused():
    divergence = Divergence(
        tensor="y",
        kind="value",
        rank=1,
        coordinates={"tp": 1},
        ranks=(1,),
        index=(0, 2),
        reference=1.0,
        candidate=float("nan"),
        error=float("inf"),
        bound=0.0,
    )
    found = Finding(
        check="equivalence",
        kind="value",
        target="impl",
        case=case_of(),
        divergences=(divergence,),
    )
    data = found.to_json()
    assert data["divergences"][0]["candidate"] == "nan"
    assert Finding.from_json(data).to_json() == data
    assert set(KINDS) >= {"value", "crash"}
    for spoilt, words in (
        ({**data, "kind": "odd"}, "finding.kind: 'odd' is not one of value"),
        ({k: v for k, v in data.items() if k != "case"}, r"missing fields \['case'\]"),
        ({**data, "divergences": [{"tensor": "y"}]}, "finding"),
        ([], "expected an object, got list"),
    ):
        with pytest.raises(BadArgument, match=words) as caught:
            Finding.from_json(spoilt)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["equivalence", "refusal"])
def test_a_harness_that_breaks_under_the_target_is_unknown(cluster, name):
    target = fake_targets.target_of("harness")
    judgement = judge(name, case_of(), target_name=target, cluster=cluster)
    assert judgement.verdict is Verdict.UNKNOWN
    assert "the cluster broke under the target" in judgement.reason
