"""The mechanism by which mutants are loaded, and that each is caught by what claims it."""

from __future__ import annotations

import dataclasses
import linecache
import re
import sys
import traceback
from collections.abc import Iterator

import mutant_cases_attention as attention
import mutant_cases_checkpoint as checkpoint
import mutant_cases_context as context
import mutant_cases_layer as layer
import mutant_cases_model as model
import mutant_cases_pipeline as pipeline
import mutant_cases_training as training
import pytest

from verify.adversary import Adversary
from verify.case import Case
from verify.checks.rerun_function import CHANGES
from verify.checks.stream_misuse import MISUSES
from verify.cluster import Cluster, open_cluster
from verify.errors import BadArgument, HarnessError
from verify.layout import Layout
from verify.mutants import CATALOGUE, Mutant, find, import_mutated
from verify.mutants.published import read_published
from verify.oracle.checkpoint import text_of
from verify.strategies.cases import MAPPINGS
from verify.targets import load_target
from verify.verdict import Judgement, Verdict, judge

MUTANTS = tuple(CATALOGUE["impl"].values())
CHECKED_BY_HAND = ("NameError", "AttributeError", "ImportError", "SyntaxError", "UnboundLocalError")

TP2, TP3, SP2, SP3 = (
    Layout(tp=2),
    Layout(tp=3),
    *(Layout(tp=n, sequence_parallel=True) for n in (2, 3)),
)
STRIDED = Layout(tp=2, dp=2, order="dp-tp-cp-ep-pp")
LATE = Adversary(late=True)
# The ranks of a block of experts are on two axes of either mesh, with three experts each.
EXPERTS = Layout(tp=2, dp=2, ep=2, etp=2, sequence_parallel=True)

SMALL = {"sequence": 6, "batch": 2}
ACTIVATION = {**SMALL, "hidden": 12}
LINEAR = {**SMALL, "in_features": 12, "out_features": 6}
TOKENS = {**SMALL, "vocabulary": 6, "hidden": 4}
LOGITS = {**SMALL, "vocabulary": 12}
MLP = {**SMALL, "hidden": 4, "ffn": 6}
ROUTER = {"sequence": 4, "batch": 4, "hidden": 4, "experts": 6, "top_k": 2}


def _case(concept: str, layout: Layout, shape: dict[str, int], lens: str, **options) -> Case:
    dtype = "bfloat16" if lens == "native" else "float64"
    return Case(
        concept=concept, layout=layout, shape=shape, options=options, lens=lens, dtype=dtype
    )


def _mappings() -> Iterator[tuple[str, Case]]:
    for concept in MAPPINGS:
        for layout in (STRIDED, TP3):
            yield "equivalence", _case(concept, layout, ACTIVATION, "fp64")
        late = _case(concept, TP2, ACTIVATION, "exact")
        yield "equivalence", dataclasses.replace(late, adversary=LATE)
    whole = {"tensor_parallel_output_grad": False}
    yield "equivalence", _case("gather_from_sp", TP2, ACTIVATION, "exact", **whole)
    yield "refusal", _case("scatter_to_tp", TP2, {**ACTIVATION, "hidden": 7}, "fp64")


def _linears() -> Iterator[tuple[str, Case]]:
    for concept, own in (("column_linear", "gather_output"), ("row_linear", "input_is_parallel")):
        turned = {own: own == "gather_output"}
        for layout in (TP2, SP3):
            for options in ({}, {"frozen_weight": True}, {"skip_bias_add": True}):
                yield "equivalence", _case(concept, layout, LINEAR, "exact", **options)
            yield "equivalence", _case(concept, layout, LINEAR, "fp64", strides="transposed")
        late = _case(concept, SP2, LINEAR, "exact")
        yield "equivalence", dataclasses.replace(late, adversary=LATE)
        yield "equivalence", _case(concept, TP2, LINEAR, "exact", **turned)
        yield "refusal", _case(concept, SP2, LINEAR, "fp64", **turned)
        split = "out_features" if concept == "column_linear" else "in_features"
        yield "refusal", _case(concept, TP2, {**LINEAR, split: 7}, "fp64")


def _others() -> Iterator[tuple[str, Case]]:
    for layout in (STRIDED, TP3, SP3):
        yield "equivalence", _case("vocab_embedding", layout, TOKENS, "exact")
        for options in ({}, {"activation": "swiglu"}, {"activation": "squared_relu"}):
            yield "equivalence", _case("tp_mlp", layout, MLP, "fp64", **options)
    yield "equivalence", _case("vocab_embedding", SP2, TOKENS, "exact", scatter=True)
    yield "refusal", _case("vocab_embedding", TP2, {**TOKENS, "vocabulary": 7}, "fp64")
    yield "refusal", _case("vocab_embedding", TP2, TOKENS, "fp64", scatter=True)
    padded = {**LOGITS, "real_vocabulary": 3}
    for layout in (STRIDED, TP3):
        for options in ({}, {"ignored": True}, {"label_smoothing": 0.25}, {"magnitude": 1024}):
            yield "equivalence", _case("vocab_cross_entropy", layout, LOGITS, "fp64", **options)
        for options in ({}, {"label_smoothing": 0.25}):
            options = {"mask_padding": True, **options}
            yield "equivalence", _case("vocab_cross_entropy", layout, padded, "fp64", **options)
    yield "equivalence", _case("vocab_cross_entropy", TP2, LOGITS, "native")
    # The target is certain to 4e-12, so that the loss is the rounding error of numbers near 1.
    one = {"sequence": 1, "batch": 1, "vocabulary": 4, "real_vocabulary": 3}
    certain = _case("vocab_cross_entropy", TP2, one, "fp64", magnitude=16)
    yield "equivalence", dataclasses.replace(certain, seed=1)
    yield "refusal", _case("vocab_cross_entropy", TP2, LOGITS, "fp64", label_smoothing=1.0)
    yield "misfit", _case("vocab_cross_entropy", TP2, LOGITS, "fp64", misfit="targets 1 one")
    for index in (-1, 12):
        none = {"misfit": f"targets {index} index"}
        yield "misfit", _case("vocab_cross_entropy", TP2, LOGITS, "fp64", **none)
    for layout in (
        Layout(tp=2, cp=2, dp=2, order="cp-tp-ep-dp-pp"),
        Layout(dp=2, pp=3),
        Layout(tp=4, dp=2, ep=2, etp=2),
        Layout(cp=8, hierarchical_cp=(2, 4)),
        Layout(cp=2, dp=4, optimizer_instances=2),
    ):
        yield "groups", Case(concept="groups", layout=layout)


def _experts() -> Iterator[tuple[str, Case]]:
    routers = (
        {},
        {"scaling": 2.5, "capacity": 0.75, "loss_scale": 0.25, "balance": "global"},
        {"pre_softmax": True, "capacity": 1.0, "drop": "position", "balance": "batch"},
        {"score": "sigmoid", "expert_bias": True, "balance": "sequence", "z_loss": 0.5},
    )
    shared = {**ROUTER, "ffn": 4, "shared_ffn": 2}
    for options in routers:
        yield "equivalence", _case("moe_router", EXPERTS, ROUTER, "fp64", **options)
    grouped = {**ROUTER, "groups": 3, "group_top_k": 1}
    yield "equivalence", _case("moe_router", EXPERTS, grouped, "fp64")
    for switch in ("evaluated", "recomputed"):
        steps = {**ROUTER, "steps": 3}
        yield "equivalence", _case("moe_expert_bias", EXPERTS, steps, "fp64", **{switch: True})
    for dispatcher in ("all_to_all", "all_gather"):
        options = {"dispatcher": dispatcher}
        yield "equivalence", _case("moe_dispatch", EXPERTS, ROUTER, "exact", **options)
        yield "equivalence", _case("moe_layer", EXPERTS, shared, "fp64", bias=True, **options)
    options = {"activation": "swiglu", "balance": "batch", "z_loss": 0.5}
    for layout in (EXPERTS, Layout(tp=2)):
        yield "equivalence", _case("moe_layer", layout, shared, "fp64", **options)
    few = {**shared, "sequence": 2, "batch": 2, "experts": 8, "top_k": 1}
    yield "equivalence", _case("moe_layer", EXPERTS, few, "fp64")
    yield "equivalence", _case("moe_layer", EXPERTS, shared, "native")
    yield "refusal", _case("moe_router", EXPERTS, {**ROUTER, "top_k": 1, "groups": 4}, "fp64")
    yield "refusal", _case("moe_layer", EXPERTS, {**shared, "ffn": 3}, "fp64")


def _data() -> Iterator[tuple[str, Case]]:
    step = {"batch": 4, "microbatches": 2}
    text = {**step, "length": 30, "sequence": 4}
    for layout in (Layout(dp=2), Layout(cp=2, tp=2)):
        for consumed in (3, 5):
            yield "equivalence", _case("batches", layout, text, "exact", consumed=consumed)
        yield "equivalence", _case("sample_order", layout, {**step, "samples": 12}, "exact")
    for sizes in ({"batch": 3}, {"length": 4}):
        wrong = {**text, **sizes}
        yield "refusal", _case("batches", Layout(dp=2), wrong, "exact", placement="contiguous")
    yield "refusal", _case("batches", Layout(dp=2), text, "exact", consumed=-1)


def _random() -> Iterator[tuple[str, Case]]:
    # Parts have to be large enough not to be dropped alike by chance.
    spread = {**SMALL, "sequence": 8, "hidden": 24}
    for layout in (TP2, SP2, *(Layout(tp=2, cp=2, sequence_parallel=sp) for sp in (False, True))):
        for options in ({}, {"region": "tensor-parallel", "dropout": 0.5}, {"training": False}):
            yield "equivalence", _case("dropout", layout, spread, "fp64", **options)
    yield "equivalence", _case("dropout", TP2, spread, "fp64", strides="transposed")
    yield "refusal", _case("dropout", TP2, spread, "fp64", dropout=1.0)
    yield "misfit", _case("dropout", TP2, spread, "fp64", misfit="residual 0 one")
    for layout in (Layout(tp=2, dp=2, pp=2), Layout(cp=2, tp=2, pp=2), Layout(dp=4, ep=2, pp=2)):
        yield "streams", Case(concept="random_streams", layout=layout)
        for how in MISUSES:
            yield "misuse", Case(concept="random_streams", layout=layout, options={"misuse": how})
        for way in ("whole", "local"):
            shape = {"hidden": 12, "ffn": 24, "layers": 2}
            shape |= {"num_experts": 4} if layout.ep > 1 else {}
            for rule in ("transformer", "kaiming"):
                options = {"way": way, "rule": rule}
                yield "initialisation", _case("initialisation", layout, shape, "fp64", **options)
    # Of few values no spread can be told.
    shape = {"hidden": 2, "ffn": 240, "layers": 1}
    gated = {"rule": "linear", "activation": "swiglu"}
    yield "initialisation", _case("initialisation", TP2, shape, "fp64", **gated)
    shared, local = Layout(dp=4, ep=2, etp=2), {"way": "local", "rule": "linear"}
    for check, experts in (
        ("refusal", shared),
        ("initialisation", dataclasses.replace(shared, etp=1)),
    ):
        case = _case("initialisation", experts, {**shape, "num_experts": 2}, "fp64", **local)
        yield check, case


def _recomputed() -> Iterator[tuple[str, Case]]:
    shape = {**SMALL, "hidden": 4, "ffn": 16, "layers": 3}
    drop = {"inner_dropout": 0.5}
    for layout, plans in (
        (TP2, ("uniform-2", "block-2", "nested-2", "selective", "block-1-distributed")),
        (SP2, ("uniform-3", "block-2", "selective")),
    ):
        for plan in plans:
            case = _case("recomputed_block", layout, shape, "fp64", recompute=plan, **drop)
            yield "recomputation", case
            yield "equivalence", case
    for plan in ("uniform-2", "uniform-2-distributed", "block-3-distributed"):
        case = _case("recomputed_block", TP2, shape, "fp64", recompute=plan)
        yield "memory", case
        yield "communication", case
    case = _case("recomputed_block", TP2, shape, "native", recompute="uniform-1-distributed")
    yield (
        "recomputation",
        dataclasses.replace(
            case, options={**case.options, "strides": "transposed"}, dtype="float32"
        ),
    )
    for options in (
        {"autocast": "bfloat16"},
        {"autocast": "float16", "distributed": True},
        {"autocast_backward": "bfloat16"},
        {"lies": "transposed", "distributed": True},
    ):
        yield (
            "rerun",
            _case("recomputed_function", TP2, {**SMALL, "hidden": 4}, "native", **options),
        )
    for change in CHANGES:
        case = _case("recomputed_function", TP2, {**SMALL, "hidden": 4}, "native", changed=change)
        yield "unrepeatable", case
    yield "refusal", _case("recomputed_block", TP2, shape, "fp64", recompute="uniform-4")
    yield "refusal", _case("recomputed_block", SP2, shape, "fp64", recompute="block-1-distributed")


def _uneven() -> Iterator[tuple[str, Case]]:
    """Stages with other layers than one thinks, and what comes together in few cases."""
    tall = {**checkpoint.SHAPE, "heads": 4, "groups": 4, "ffn": 16, "layers": 1, "steps": 1}
    four = {**checkpoint.PLAIN, "saved": text_of(Layout(tp=4))}
    yield "equivalence", _case("checkpoint", Layout(dp=4), tall, "exact", **four)
    small = {**model.SMALL, "microbatches": 1}
    routed = {**small, "experts": 2, "top_k": 1}
    pack = {**small, "sequence": 8}
    for layout, shape, options in (
        (Layout(pp=2), {**small, "layers": 3}, {"last": 2}),
        (Layout(pp=2), {**routed, "layers": 3}, {"split": "2,1", "every": 2}),
        (Layout(pp=2), routed, {"every": 2}),
        (Layout(), pack, {"packed": 3, "evaluated": True}),
        (Layout(), small, {"pipeline": "zb-h1", "overlap": True}),
    ):
        case = _case("gpt_training", layout, shape, "fp64", **model.PLAIN, **options)
        yield "equivalence", case


CASES = (
    *_mappings(),
    *_linears(),
    *_others(),
    *_experts(),
    *_data(),
    *_random(),
    *_recomputed(),
    *attention.cases(),
    *layer.cases(),
    *context.cases(),
    *pipeline.cases(),
    *training.cases(),
    *checkpoint.cases(),
    *model.cases(),
    *_uneven(),
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with open_cluster("sim", world_size=8) as opened:
        yield opened


def _judged(target: str, concepts: tuple[str, ...], cluster: Cluster) -> Iterator[Judgement]:
    for check, case in CASES:
        if case.concept in concepts:
            yield judge(check, case, target_name=target, cluster=cluster)


@pytest.mark.parametrize("concept", sorted({case.concept for _, case in CASES}))
def test_impl_passes_every_case(cluster, concept):
    for judgement in _judged("impl", (concept,), cluster):
        assert judgement.verdict is Verdict.PASSED, judgement.reason


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_caught_by_each_concept_that_claims_it(cluster, mutant):
    for concept in mutant.caught_by:
        for judgement in _judged(f"impl@{mutant.name}", (concept,), cluster):
            assert judgement.verdict in (Verdict.FAILED, Verdict.PASSED), judgement.reason
            assert not any(name in judgement.reason for name in CHECKED_BY_HAND), judgement.reason
            if judgement.verdict is Verdict.FAILED:
                break
        else:
            pytest.fail(f"{concept} does not catch it")


def test_the_catalogue_is_coherent():
    concepts = {case.concept for _, case in CASES}
    assert len({mutant.wrong for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        assert mutant.caught_by
        assert set(mutant.caught_by) <= concepts
        assert mutant.wrong.endswith(".")
        assert mutant.snippet != mutant.replacement


def test_every_published_defect_is_a_mutant_or_has_the_reason_why_not():
    published, seen = read_published(), {mutant.seen for mutant in MUTANTS}
    assert {name for name, each in published.items() if not each.reason} == seen & set(published)
    assert {name for name in seen if re.fullmatch(r"[A-Z0-9]+-\d+", name)} <= set(published)
    assert len({each.title for each in published.values()}) == len(published)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[GRP-02", "cannot read"),
        ('GRP-02 = "a group"\n', r"GRP-02 lacks \['source', 'title'\]"),
        ('[GRP-02]\ntitle = "a group"\n', r"GRP-02 lacks \['source'\]"),
        ('[GRP-02]\ntitle = "a"\nsource = "b"\nreasons = "c"\n', r"\['reasons'\] too many"),
        ('[GRP-02]\ntitle = "a"\nsource = "b"\nreason = ""\n', "no text"),
        ('[GRP-02]\ntitle = "a"\nsource = 1\n', "no text"),
    ],
)
def test_a_wrong_file_of_published_defects(tmp_path, text, words):
    path = tmp_path / "published.toml"
    path.write_text(text)
    with pytest.raises(HarnessError, match=words) as caught:
        read_published(path)
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_mutant_is_one_line_with_names_that_come_close():
    for name, words in (
        ("impl@row-bias-befor-sum", "did you mean row-bias-before-sum"),
        ("impl@0", "none of its"),
        ("impl@", "none of its"),
        ("megatron-core@row-bias-before-sum", "targets that have are impl"),
    ):
        with pytest.raises(BadArgument, match=words) as caught:
            load_target(name)
        assert "\n" not in str(caught.value)


def test_a_mutant_leaves_the_target_as_it_is(cluster):
    """In one process, and in both orders; the modules of the target are the same objects."""
    load_target("impl")
    before = {n: m for n, m in sys.modules.items() if n.startswith(("impl", "verify.targets"))}
    mutated = load_target("impl@gradients-averaged")
    after = {n: m for n, m in sys.modules.items() if n.startswith(("impl", "verify.targets"))}
    assert before == after
    assert sys.modules["verify.targets"].impl is before["verify.targets.impl"]
    assert type(mutated) is not type(load_target("impl"))
    assert load_target("impl@gradients-averaged") is mutated
    case = _case("row_linear", SP2, LINEAR, "exact")
    names = ("impl", "impl@gradients-averaged", "impl")
    verdicts = [judge("equivalence", case, target_name=n, cluster=cluster).verdict for n in names]
    assert verdicts == [Verdict.PASSED, Verdict.FAILED, Verdict.PASSED]


def test_a_worker_process_needs_the_name_only():
    case = _case("row_linear", TP2, LINEAR, "exact")
    names = ("impl@row-bias-before-sum", "impl")
    with open_cluster("process", world_size=2) as processes:
        seen = [judge("equivalence", case, target_name=n, cluster=processes) for n in names]
    assert [each.verdict for each in seen] == [Verdict.FAILED, Verdict.PASSED]
    assert "bias is added 2 times" in " ".join(seen[0].reason.split())


def test_a_crash_shows_the_mutated_source(cluster):
    """The line is that of the mutant, in a file that is named after it."""
    name = "pipeline-chunk-of-the-peer"
    reasons = [
        judge(check, case, target_name=f"impl@{name}", cluster=cluster).reason
        for check, case in CASES
        if (check, case.concept) == ("equivalence", "pipeline")
    ]
    crash = f"impl/pipeline/executor.py@{name}"
    assert any(crash in "".join(reason.split()) for reason in reasons)


# Two packages: one with the code, one that uses it, also late and by way of a third module.
SOURCES = {
    "code_of_hers/__init__.py": "",
    "code_of_hers/sums.py": "def add(a, b):\n    return a + b\ndef fail():\n    raise OSError\n",
    "code_of_hers/late.py": "def late(a, b):\n    from code_of_hers.sums import add\n"
    "    return add(a, b)\n",
    "user_of_hers.py": "from code_of_hers import late, sums\nadd, fail = sums.add, sums.fail\n",
    "code_of_hers/other.py": "",
}
WRONG = Mutant(
    name="minus",
    family="sums",
    wrong="It subtracts.",
    module="code_of_hers.sums",
    snippet="a + b",
    replacement="a - b",
    caught_by=("sums",),
)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    for path, source in SOURCES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - set(before):
        del sys.modules[name]


def test_any_package_can_be_mutated(packages):
    private = import_mutated("user_of_hers", WRONG)
    assert not any(name.startswith(("code_of_hers", "user_of_hers")) for name in sys.modules)
    import user_of_hers

    assert (private.add(5, 2), user_of_hers.add(5, 2)) == (3, 7)
    assert (private.late.late(5, 2), user_of_hers.late.late(5, 2)) == (3, 7)
    assert sys.modules["user_of_hers"] is user_of_hers
    assert private.sums is not user_of_hers.sums


def test_a_traceback_shows_the_mutated_source(packages):
    private = import_mutated(
        "user_of_hers", dataclasses.replace(WRONG, snippet="OSError", replacement="KeyError(1)")
    )
    with pytest.raises(KeyError) as caught:
        private.fail()
    linecache.checkcache()
    text = "".join(traceback.format_exception(caught.value))
    assert "code_of_hers/sums.py@minus" in text
    assert "raise KeyError(1)" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"snippet": "a * b"}, "occurs 0 times in code_of_hers.sums"),
        ({"snippet": "a"}, "times in code_of_hers.sums, not once"),
        ({"module": "code_of_hers.other"}, "does not import a copy of code_of_hers.other"),
    ],
)
def test_a_mutant_that_does_not_fit_is_the_harness_mistake(packages, change, words):
    before = dict(sys.modules)
    with pytest.raises(HarnessError, match=words):
        import_mutated("user_of_hers", dataclasses.replace(WRONG, **change))
    assert sys.modules == before


def test_the_harness_itself_has_no_mutants(packages):
    with pytest.raises(HarnessError, match=r"does not import a copy of verify\.layout"):
        import_mutated("user_of_hers", dataclasses.replace(WRONG, module="verify.layout"))


def test_a_mutant_that_cannot_be_imported_leaves_no_trace(packages):
    before, finders = dict(sys.modules), list(sys.meta_path)
    wrong = dataclasses.replace(WRONG, snippet="def fail():", replacement="def fail(:")
    with pytest.raises(SyntaxError):
        import_mutated("user_of_hers", wrong)
    assert (sys.modules, sys.meta_path) == (before, finders)


def test_find():
    assert find("impl", MUTANTS[0].name) is MUTANTS[0]
