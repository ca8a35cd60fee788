"""Right examples that a property once called wrong, or could not decide, and defects like them."""

from functools import partial

import pytest

from verify.case import Case
from verify.cluster import open_cluster
from verify.errors import BadArgument
from verify.layout import Layout
from verify.rank_program import contract_of
from verify.verdict import Verdict, judge

SINGLE = {"lens": "native", "dtype": "float32"}
# The one token that attends to another has no loss: of queries and keys in the last layers the
# gradient is zero, but for what is left of terms that cancel, of which Adam makes steps.
ADAM = Case(
    concept="gpt_training",
    layout=Layout(pp=3, vpp=2, sequence_parallel=True),
    shape={
        "microbatches": 3,
        "sequence": 4,
        "batch": 1,
        "hidden": 3,
        "heads": 1,
        "groups": 1,
        "head_size": 2,
        "ffn": 1,
        "layers": 6,
        "vocabulary": 2,
        "steps": 1,
    },
    options={
        "attention_dropout": 0.25,
        "packed": 3,
        "placement": "contiguous",
        "hidden_dropout": 0.25,
        "zero_centered": True,
        "bias": False,
        "optimizer": "adam",
    },
    seed=1,
    **SINGLE,
)
# The sink leaves the key 1e-318 of a share, which has three digits.
HARDLY_ANY = Case(
    concept="core_attention",
    layout=Layout(),
    shape={
        "sequence": 2,
        "batch": 3,
        "heads": 3,
        "groups": 3,
        "head_size": 1,
        "key_sequence": 1,
    },
    options={"sink": True, "scale": 0.25, "magnitude": 256},
    seed=782,
)
# Each query has one key that is not dropped: of query and key norms the gradient is zero, but for
# what the attention of ranks, which takes it from its output, leaves of rounding.
ONE_KEY = Case(
    concept="gpt_training",
    layout=Layout(pp=2, sequence_parallel=True),
    shape={
        "microbatches": 2,
        "sequence": 4,
        "batch": 1,
        "hidden": 5,
        "heads": 1,
        "groups": 1,
        "head_size": 3,
        "ffn": 1,
        "layers": 2,
        "vocabulary": 4,
        "steps": 1,
    },
    options={
        "attention_dropout": 0.25,
        "packed": 3,
        "placement": "contiguous",
        "norm": "rms",
        "hidden_dropout": 0.25,
        "activation": "swiglu",
        "qk_norm": True,
        "zero_centered": True,
        "bias": False,
        "optimizer": "adam",
    },
    seed=33,
    lens="native",
    dtype="float16",
)
# Of one class the probability is one, and its gradient what little a penalty leaves.
ONE_CLASS = Case(
    concept="linear_cross_entropy",
    layout=Layout(cp=2),
    shape={"sequence": 3, "batch": 1, "hidden": 2, "vocabulary": 1},
    options={"chunk": 2, "z_loss": 0.0625},
    seed=276,
    **SINGLE,
)
# Of a head of two features 5.47 and 5.39 are left 0.04, and the mean has the errors of 5.4.
OFF_CENTRE = Case(
    concept="transformer_layer",
    layout=Layout(tp=2, sequence_parallel=True),
    shape={
        "sequence": 4,
        "batch": 18,
        "hidden": 4,
        "heads": 4,
        "groups": 2,
        "head_size": 2,
        "ffn": 2,
    },
    options={"hidden_dropout": 0.1, "qk_norm": True},
    seed=2,
    **SINGLE,
)
# A head of one feature is all but one, whatever it is; of the gradients of two ranks, whose sum is
# 200 times smaller than either, that leaves less than their rounding errors.
ALL_BUT_ONE = Case(
    concept="qk_norm",
    layout=Layout(tp=2, sequence_parallel=True),
    shape={"sequence": 4, "batch": 3, "heads": 2, "head_size": 1, "groups": 1},
    options={"kind": "rms", "zero_centered": True},
    seed=293,
    **SINGLE,
)
# All of two tokens are dropped.
NOTHING = Case(
    concept="moe_dispatch",
    layout=Layout(pp=2, sequence_parallel=True),
    shape={"sequence": 2, "batch": 1, "hidden": 6, "experts": 2, "top_k": 2},
    options={"dispatcher": "all_gather", "dropped": True},
    seed=909,
)


# Each of two weights is one number, and a normal one.
ONE_NUMBER = Case(
    concept="initialisation",
    layout=Layout(),
    shape={"hidden": 1, "ffn": 1, "layers": 2},
    seed=99,
)


@pytest.mark.parametrize(
    ("case", "mutant"),
    [
        (ADAM, "step-mean-of-means"),
        (ONE_KEY, "step-mean-of-means"),
        (ONE_CLASS, "chunked-loss-last-chunk"),
        (OFF_CENTRE, "gradients-averaged"),
        (ALL_BUT_ONE, "norm-of-heads-not-marked"),
        (NOTHING, None),
        (HARDLY_ANY, "attention-softmax-in-float32"),
    ],
    ids=lambda each: each.concept if isinstance(each, Case) else str(each),
)
def test_what_is_right_passes_and_a_defect_is_still_seen(case, mutant):
    with open_cluster("sim", world_size=3) as cluster:
        found = judge("equivalence", case, target_name="impl", cluster=cluster)
        assert found.verdict is Verdict.PASSED, found.reason
        if mutant is not None:
            wrong = judge("equivalence", case, target_name=f"impl@{mutant}", cluster=cluster)
            assert wrong.verdict is Verdict.FAILED


def test_what_need_not_overflow_is_not_expected_to():
    # The first stage has the embedding alone; its first rank may have none of the tokens.
    sizes = {
        "microbatches": 1, "sequence": 4, "batch": 1, "hidden": 3, "heads": 2, "groups": 2,
        "head_size": 2, "ffn": 2, "layers": 1, "vocabulary": 2, "steps": 1,
    }  # fmt: skip
    options = {"split": "0,1", "loss_scale": "static", "overflow": 1}
    made = partial(Case, concept="gpt_training", shape=sizes, seed=0)
    with pytest.raises(BadArgument, match=r"overflow: the first chunk has no layer"):
        contract_of(made(layout=Layout(tp=2, pp=2), options=options))
    with open_cluster("sim", world_size=4) as cluster:
        for layout, more in (
            (Layout(tp=2, pp=2), {"split": "1,0"}),
            (Layout(tp=2, pp=2), {"positions": "learned"}),
            (Layout(tp=2, pp=2, sequence_parallel=True), {}),
            (Layout(pp=2), {}),
        ):
            case = made(layout=layout, options={**options, **more})
            found = judge("equivalence", case, target_name="impl", cluster=cluster)
            assert found.verdict is Verdict.PASSED, found.reason


def test_one_number_may_be_far_from_the_spread_that_is_promised():
    with open_cluster("sim", world_size=1) as cluster:
        found = judge("initialisation", ONE_NUMBER, target_name="impl", cluster=cluster)
        assert found.verdict is Verdict.PASSED, found.reason
