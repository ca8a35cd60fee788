"""The suites where there is a GPU; and that the harness does not depend on the default device."""

import dataclasses

import pytest
import torch

from verify.case import Case
from verify.cli import main
from verify.cluster import open_cluster
from verify.errors import BadArgument
from verify.layout import Layout
from verify.lens import generate, local
from verify.property import CHECKS
from verify.rank_program import contract_of
from verify.replica import RankMap

GPUS = torch.cuda.device_count()
needs_a_gpu = pytest.mark.skipif(GPUS == 0, reason="needs a GPU; torch sees none here")
CASES = [
    Case(
        concept="column_linear",
        layout=Layout(tp=2, sequence_parallel=True),
        shape={"sequence": 4, "batch": 1, "in_features": 3, "out_features": 4},
    ),
    Case(
        concept="vocab_cross_entropy",
        layout=Layout(tp=2),
        shape={"sequence": 2, "batch": 3, "vocabulary": 8},
        options={"ignored": True},
    ),
]


def run(*arguments: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    assert isinstance(done.value.code, int)
    return done.value.code


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.concept)
@pytest.mark.parametrize(("lens", "dtype"), [("fp64", "float64"), ("native", "bfloat16")])
def test_what_ranks_are_given_is_drawn_on_the_cpu_whatever_the_default_device(case, lens, dtype):
    case = dataclasses.replace(case, lens=lens, dtype=dtype)
    contract = contract_of(case)
    ranks = RankMap(case.layout, contract.axes)
    expected = generate(case, contract, ranks, ranks.replica(1))
    with torch.device("meta"):
        found = generate(case, contract_of(case), ranks, ranks.replica(1))
        parts = [
            local(each, contract.inputs[name].placements, ranks, 1, case)
            for name, each in found.inputs.items()
        ]
    assert all(part.device.type == "cpu" for part in parts)
    for kind in ("inputs", "parameters", "upstream"):
        one, other = getattr(expected, kind), getattr(found, kind)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name].full, other[name].full) for name in one)


@pytest.mark.skipif(GPUS > 0, reason="shows what a machine without a GPU says")
@pytest.mark.parametrize("cluster", ["sim", "process"])
def test_a_gpu_that_is_not_there_is_refused_in_one_line(cluster, tmp_path, capsys):
    given = ["run", "--cluster", cluster, "--device", "cuda", "--suite", "linear"]
    assert run(*given, "--report", str(tmp_path / "report")) == 2
    said = capsys.readouterr()
    assert said.err.startswith("shardproof: error: --device: cuda needs a GPU")
    assert said.err.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_devices_are_named():
    with pytest.raises(BadArgument, match="device: 'tpu' is not one of cpu, cuda"):
        open_cluster("sim", world_size=1, device="tpu")


@needs_a_gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.concept)
def test_all_ranks_on_one_gpu_compute_what_one_device_does(case):
    with open_cluster("sim", world_size=2, device="cuda") as cluster:
        for check in ("equivalence", "determinism"):
            CHECKS[check](case, target_name="impl", cluster=cluster)


@needs_a_gpu
def test_the_suites_of_impl_pass_on_a_gpu(tmp_path):
    given = ["run", "--device", "cuda", "--max-examples", "5", "--report", str(tmp_path)]
    assert run(*given) == 0


@pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs for nccl; torch sees {GPUS}")
def test_a_gpu_a_rank_over_nccl(tmp_path):
    given = ["run", "--cluster", "process", "--device", "cuda", "--max-world-size", "2"]
    given += ["--suite", "linear,cross_entropy", "--max-examples", "5", "--report", str(tmp_path)]
    assert run(*given) == 0
