"""Diagnosis: a tensor spoilt in a known way is explained by that way, before anything else."""

import pytest
import torch
from observed import SHAPE, Scene, scene

from verify.case import Case
from verify.diagnose import diagnose
from verify.finding import LIKELY
from verify.layout import Layout
from verify.lens import Generated
from verify.oracle.contract import Contract, TensorSpec
from verify.placement import Shard, ZigzagShard, shard

LENSES = [("exact", "float64"), ("fp64", "float64"), ("native", "bfloat16")]


def explain(spoilt: Scene):
    comparison = spoilt.compare()
    assert comparison.evidence is not None, comparison.divergences
    return diagnose(comparison.evidence)


def first(spoilt: Scene) -> str:
    found = explain(spoilt)
    assert found, "no explanation"
    assert found[0].score >= LIKELY, found
    return found[0].sentence


def of_tp(layout=None, lens="fp64", dtype="float64", **parts) -> Scene:
    return scene(lens, dtype, layout=layout or Layout(tp=2, dp=2), **parts)


@pytest.mark.parametrize(("lens", "dtype"), LENSES)
@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (2.0, "2 times too large, 2 being the size of tp or dp"),
        (0.5, "2 times too small, 2 being the size of tp or dp"),
        (4.0, "4 times too large, 4 being the size of tp x dp"),
        (-1.0, "of the opposite sign"),
    ],
)
def test_a_constant_factor(lens, dtype, factor, words):
    for name in ("grad x", "grad weight", "grad bias"):
        assert words in first(of_tp(lens=lens, dtype=dtype).spoil(name, lambda t, r: t * factor))


def test_a_factor_before_the_bias():
    spoilt = of_tp()

    def way(tensor, rank):
        bias = spoilt.references[spoilt.ranks.replica(rank)].problem.parameters["bias"].full
        return (tensor - bias) * 2 + bias

    assert "y before bias is added is 2 times too large" in first(spoilt.spoil("y", way))


@pytest.mark.parametrize(
    ("extra", "layout", "words"),
    [
        (2.0, Layout(tp=3), "bias is added 3 times: by every rank of tp (size 3), before the sum"),
        (-1.0, Layout(tp=3), "bias is not added"),
        (1.0, Layout(tp=3), "bias is added twice"),
        (-0.5, Layout(tp=2), "bias is added only in part: divided by the size of tp (size 2)"),
    ],
)
def test_a_bias_added_too_often_or_not(extra, layout, words):
    shape = {**SHAPE, "in_features": 6}
    spoilt = Scene(Case(concept="fake_row", layout=layout, shape=shape))
    bias = spoilt.references[""].problem.parameters["bias"].full
    assert words in first(spoilt.spoil("y", lambda t, r: t + extra * bias))


def _masked(spoilt: Scene, name: str, rank: int, source: str) -> torch.Tensor:
    """The reference when only this rank's part of `source` is there."""
    reference = spoilt.references[spoilt.ranks.replica(rank)]
    index = spoilt.ranks.coordinates[rank]["tp"]

    def change(given_name: str, given: Generated) -> torch.Tensor:
        if given_name != source:
            return given.full
        if given.parts is not None:
            return given.parts[index]
        kept = torch.zeros_like(given.full)
        width = given.full.shape[-1] // 2
        kept[..., index * width : (index + 1) * width] = given.full[
            ..., index * width : (index + 1) * width
        ]
        return kept

    dtype = getattr(torch, spoilt.case.dtype)
    return spoilt.cut(name, rank, reference.evaluate(dtype, change)[name])


@pytest.mark.parametrize(("lens", "dtype"), LENSES)
def test_a_missing_sum(lens, dtype):
    spoilt = of_tp(lens=lens, dtype=dtype)
    spoilt.spoil("y", lambda t, r: _masked(spoilt, "y", r, "x"))
    assert first(spoilt) == (
        "the sum over tp (size 2) is missing: every rank has y of its own share only"
    )


def test_a_missing_sum_of_summands():
    spoilt = scene(concept="fake_sum")
    spoilt.spoil("y", lambda t, r: _masked(spoilt, "y", r, "x"))
    assert "the sum over tp (size 2) is missing" in first(spoilt)


def test_a_sum_is_missing_wherever_the_parts_come_from():
    spoilt = of_tp()

    def way(tensor, rank):
        noise = torch.rand(tensor.shape, dtype=tensor.dtype, generator=_seeded(rank // 2))
        return noise if rank % 2 else tensor - noise

    assert "the all-reduce over tp (size 2) is missing" in first(spoilt.spoil("y", way))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_one_share_for_all():
    spoilt = scene(concept="fake_sum")
    spoilt.spoil("y", lambda t, r: _masked(spoilt, "y", r | 1, "x"))
    assert first(spoilt) == "y has the share of tp=1 only"


def test_a_share_left_out_or_counted_twice():
    for sign, words in ((-1, "of tp=1 is left out of y"), (1, "of tp=1 is counted twice in y")):
        spoilt = scene(concept="fake_sum", layout=Layout(tp=3))
        share = spoilt.references[""].problem.inputs["x"].parts[1]
        spoilt.spoil("y", lambda t, r, sign=sign, share=share: t + sign * share)
        assert words in first(spoilt)


def test_the_same_share_from_every_rank():
    spoilt = scene(concept="fake_sum", layout=Layout(tp=3))
    share = spoilt.references[""].problem.inputs["x"].parts[0]
    assert "y is 3 times the share of tp=0" in first(spoilt.spoil("y", lambda t, r: 3 * share))


def test_the_last_microbatch_only():
    spoilt = of_tp()
    reference = spoilt.references

    def change(name, given):
        if name != "grad y":
            return given.full
        kept = torch.zeros_like(given.full)
        kept[:, -1] = given.full[:, -1]
        return kept

    def way(tensor, rank):
        found = reference[spoilt.ranks.replica(rank)].evaluate(torch.float64, change)
        return spoilt.cut("grad weight", rank, found["grad weight"])

    assert "the last of the batch's 4 sequences only" in first(spoilt.spoil("grad weight", way))


def test_nothing_written():
    assert "y is all zero" in first(of_tp().spoil("y", lambda t, r: t * 0))
    assert "every element of y is NaN" in first(of_tp().spoil("y", lambda t, r: t * torch.nan))

    def some(tensor, rank):
        tensor[0, 0] = torch.nan
        return tensor

    assert "6 of 144 elements of y is NaN" in first(of_tp().spoil("y", some, [1]))


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (lambda t: t.roll(1, 0), "y is shifted by +1 along dimension 0"),
        (lambda t: t.roll(-1, 0), "y is shifted by -1 along dimension 0"),
        (lambda t: t.chunk(2, 0)[1].repeat(2, 1, 1) * 0 + t.roll(3, 0), "[1, 0]"),
        (lambda t: t.transpose(0, 1).reshape(t.shape), "a transposed buffer is read as if not"),
        (
            lambda t: torch.cat(t.chunk(2, -1), 0).reshape(t.shape),
            "the parts of dimension 2 of y over tp (size 2) are joined along dimension 0",
        ),
        (
            lambda t: torch.cat([t[:, :, :3], t[:, :, 3:] * 0], -1),
            "only the part of tp=0 of dimension 2 of y is there",
        ),
    ],
)
def test_the_right_values_in_the_wrong_place(way, words):
    assert words in first(of_tp().spoil_full("y", way))


def test_a_gather_that_is_missing():
    def way(tensor, rank):
        kept = torch.zeros_like(tensor)
        half = slice(0, 3) if rank % 2 == 0 else slice(3, 6)
        kept[..., half] = tensor[..., half]
        return kept

    assert "the gather over tp (size 2) is missing" in first(of_tp().spoil("y", way))


def test_equal_dimensions_exchanged():
    shape = {**SHAPE, "sequence": 4}
    spoilt = Scene(Case(concept="fake_row", layout=Layout(tp=2), shape=shape))
    spoilt.spoil_full("y", lambda t: t.transpose(0, 1))
    assert first(spoilt) == "dimensions 0 and 1 of y are exchanged"


def _sharded(placement, layout) -> Scene:
    shape, axis = (8, 2, 4), "cp" if layout.cp > 1 else "tp"
    placed = {axis: placement}
    contract = Contract(
        inputs={"x": TensorSpec(shape, placed, placed)},
        parameters={},
        outputs={"y": TensorSpec(shape, placed, placed)},
        reference=lambda inputs, parameters: {"y": inputs["x"] * 3},
        axes=(axis,),
        linear=True,
    )
    return Scene(Case(concept="tripled", layout=layout), contract, {})


@pytest.mark.parametrize(
    ("own", "other", "words"),
    [
        (ZigzagShard(0), Shard(0), "are contiguous instead of zigzag"),
        (Shard(0), ZigzagShard(0), "are zigzag instead of contiguous"),
        (Shard(0, stride=2), Shard(0), "are contiguous instead of packed in two blocks"),
    ],
)
def test_another_placement(own, other, words):
    spoilt = _sharded(own, Layout(cp=2))
    full, ranks = spoilt.full("y"), spoilt.ranks

    def way(tensor, rank):
        return shard(full, {"cp": other}, ranks.sizes, ranks.coordinates[rank]).clone()

    assert words in first(spoilt.spoil("y", way))


def test_ranks_with_each_others_parts():
    spoilt = _sharded(Shard(0), Layout(tp=4))
    own = [tensors["y"] for tensors in spoilt.tensors]
    spoilt.spoil("y", lambda t, rank: own[3 - rank])
    assert "rank 0 that of rank 3, rank 1 that of rank 2" in first(spoilt)


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16, torch.float16])
def test_a_lower_precision(low):
    name = str(low).removeprefix("torch.")
    rounded = of_tp().spoil("y", lambda t, r: t.to(low).double())
    assert first(rounded) == f"y was rounded to {name}: all its values are"
    summed = of_tp().spoil("y", lambda t, r: (t * 0.3).to(low).double() / 0.3)
    assert "the error is of the size of" in first(summed)
    assert name in first(summed)


def test_an_error_that_is_no_rounding_elsewhere():
    def way(tensor, largest):
        noise = torch.rand(tensor.shape, dtype=tensor.dtype, generator=_seeded(5))
        return tensor + noise * largest

    spoilt = of_tp().spoil("y", lambda t, r: way(t, 0.01))
    assert "the error is of the size of bfloat16" in first(spoilt)
    spoilt.spoil("grad x", lambda t, r: way(t, 1.0))
    assert all(each.score < LIKELY for each in explain(spoilt))


@pytest.mark.parametrize(("count", "told"), [(7, False), (8, True)])
def test_the_size_of_few_errors_tells_nothing(count, told):
    spec = TensorSpec((count,), {}, {})
    contract = Contract(
        inputs={"x": spec},
        parameters={},
        outputs={"y": spec},
        reference=lambda given, _: {"y": given["x"] * 3},
    )
    case = Case(concept="fake_row", layout=Layout(), lens="fp64", dtype="float64")
    spoilt = Scene(case, contract, parameters={})
    spoilt.spoil("y", lambda t, r: t + t.abs().max() / 200)
    sentences = " ".join(each.sentence for each in explain(spoilt))
    assert ("the error is of the size of bfloat16" in sentences) is told


def test_where_it_is_wrong_if_nothing_explains_it():
    spoilt = of_tp()

    def way(tensor, rank):
        tensor[4] = torch.rand(tensor[4].shape, dtype=tensor.dtype, generator=_seeded(5))
        return tensor

    found = explain(spoilt.spoil("y", way, ranks=[1, 3]))
    assert all(each.score < LIKELY for each in found)
    sentences = [each.sentence for each in found]
    assert "only ranks with tp=1 are wrong" in sentences
    assert "only 4 of 6 along dimension 0 of y are wrong" in sentences


def test_noise_is_not_explained():
    def way(tensor, rank):
        return torch.randn(tensor.shape, dtype=tensor.dtype, generator=_seeded(rank))

    for seed in range(5):
        spoilt = of_tp(layout=Layout(tp=2, dp=1), seed=seed).spoil("y", way)
        assert explain(spoilt) == ()
