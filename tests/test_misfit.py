"""The check `misfit`: what it alters, what it asks, and what passes it not."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings

from verify.case import Case
from verify.cluster import open_cluster
from verify.errors import BadArgument
from verify.layout import Layout
from verify.misfit import INDEX, SHAPES, Misfit, fitting, misfits
from verify.property import CHECKS
from verify.strategies.cases import STRIDES, cases
from verify.strategies.misfits import misfit_cases
from verify.verdict import Verdict, judge

LINEAR = {"sequence": 2, "batch": 3, "in_features": 8, "out_features": 6}
ROW = Case(concept="row_linear", layout=Layout(tp=2), shape=LINEAR, options={"misfit": "x 2 one"})


@pytest.fixture(scope="module")
def sim():
    with open_cluster("sim", world_size=4) as cluster:
        yield cluster


def verdict(case, way, cluster):
    return judge("misfit", case, target_name=f"vacuous_targets:{way}", cluster=cluster)


def named(concept, layout=None, **shape):
    found = misfits(Case(concept=concept, layout=layout or Layout(), shape=shape), SHAPES)
    return {str(each) for each in found}


def test_what_is_altered():
    x = torch.arange(12).view(2, 3, 2)
    for how, shape in (
        ("longer", (2, 4, 2)),
        ("shorter", (2, 2, 2)),
        ("one", (2, 1, 2)),
        ("without", (2, 2)),
        ("twice", (2, 2, 3, 2)),
    ):
        assert Misfit("x", 1, how).altered(x).shape == shape
    # The whole of a dimension that is cut in two: either part is one longer.
    assert Misfit("x", 0, "longer").altered(x, ways=2).shape == (4, 3, 2)


def test_what_one_device_refuses():
    """Any number of tokens may have their features multiplied, and nothing else."""
    tokens = {"sequence": 3, "batch": 2}
    assert named("norm", **tokens, hidden=3) == {"x 2 longer", "x 2 shorter", "x 2 one"}
    assert named("vocab_embedding", **tokens, vocabulary=3, hidden=2) == set()
    assert named("copy_to_tp", **tokens, hidden=2) == set()
    loss = named("vocab_cross_entropy", **tokens, vocabulary=3)
    assert {"targets 0 one", "logits 1 without", "targets 0 twice"} <= loss
    assert not {"logits 2 one", "logits 2 longer"} & loss


def test_no_part_is_altered_that_could_fit():
    """Of a dimension that is cut no rank leaves its part out."""
    heads = {"sequence": 4, "batch": 2, "heads": 4, "groups": 2, "head_size": 2}
    assert "q 1 without" in named("core_attention", Layout(tp=2), **heads)
    assert "q 2 without" not in named("core_attention", Layout(tp=2), **heads)
    assert "q 3 without" not in named("core_attention", **heads)


def test_an_index_of_what_is_not_there():
    shape = {"sequence": 1, "batch": 2, "vocabulary": 6, "real_vocabulary": 4}
    case = Case(concept="vocab_cross_entropy", layout=Layout(), shape=shape)
    assert {str(each) for each in misfits(case, (INDEX,))} == {
        "targets -1 index",
        "targets -5 index",
        "targets 6 index",
    }
    masked = dataclasses.replace(case, options={"mask_padding": True})
    assert "targets 4 index" in {str(each) for each in misfits(masked)}
    targets = torch.zeros(1, 2, dtype=torch.int64)
    assert Misfit("targets", -1, INDEX).altered(targets).tolist() == [[0, -1]]
    assert not targets.any()


@pytest.mark.parametrize("wrong", [None, "x", "x 2 wider", "x -1 one", "x two one"])
def test_a_misfit_that_is_none(sim, wrong):
    case = Case(concept="row_linear", layout=Layout(), shape=LINEAR, options={"misfit": wrong})
    with pytest.raises(BadArgument, match=r"case.options.misfit: .* is none; give an input"):
        CHECKS["misfit"](case, target_name="impl", cluster=sim)


@pytest.mark.parametrize("computed", ["x 0 longer", "x 1 without", "y 0 longer"])
def test_what_one_device_computes_is_no_case(sim, computed):
    case = Case(concept="row_linear", layout=Layout(), shape=LINEAR, options={"misfit": computed})
    with pytest.raises(BadArgument, match="one device computes row_linear"):
        CHECKS["misfit"](case, target_name="impl", cluster=sim)


def test_a_target_that_refuses(sim):
    assert verdict(ROW, "Unspoilt", sim).verdict is Verdict.PASSED


@pytest.mark.parametrize(
    ("way", "text"),
    [
        ("Padding", "rank 1 was given x [2, 3, 1] instead of [2, 3, 4], and computed y [2, 3, 6]"),
        ("Refusing", "the target raised on a case that it has to compute"),
        ("Empty", "y is [0, 3, 6] on rank 0; it should be [2, 3, 6]"),
        ("Zero", "y is zero throughout on ranks 0, 1; it should not be"),
    ],
)
def test_one_that_does_not_or_always_does(sim, way, text):
    judged = verdict(ROW, way, sim)
    assert judged.verdict is Verdict.FAILED
    assert text in " ".join(judged.reason.split())


@settings(max_examples=20, deadline=None)
@given(case=misfit_cases(cases("row_linear", "tp_mlp", options={"strides": STRIDES[:1]})))
def test_cases_are_valid_but_for_the_misfit(case):
    assert Misfit.of(case) in misfits(fitting(case))
