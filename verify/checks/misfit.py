"""The check `misfit`: inputs that do not fit each other, or what was built, are not computed.

Where one device raises an error for inputs of which one has another size in a dimension, or a
dimension more or fewer, every rank of the target raises one too, on purpose or not: what it must
not do is to broadcast, to cut, and to go on. The same of an index of what is not there; a result
that is not a number tells of one as well. As the case fits without it, and is computed first,
nothing else is what it raises for.
"""

from __future__ import annotations

import torch.distributed as dist

from verify.case import Case
from verify.checks.blame import Bench
from verify.checks.vacuity import unshown
from verify.cluster.base import Cluster
from verify.errors import BadArgument, HarnessError, NotSupported
from verify.lens import check_fits, generate
from verify.misfit import INDEX, Misfit, fitting, misfits
from verify.rank_program import (
    contract_of,
    load_weights,
    local_inputs,
    observe,
    session_of,
    target_code,
)
from verify.replica import RankMap
from verify.targets import load_target


def misfit(case: Case, *, target_name: str, cluster: Cluster) -> int:
    """Every rank computes the case without its misfit, and raises an error for the case."""
    bench = Bench("misfit", case, target_name, cluster)
    wrong, plain = Misfit.of(case), fitting(case)
    contract = contract_of(plain)
    ranks = RankMap(case.layout, contract.axes)
    check_fits(plain, contract, ranks)
    if wrong not in misfits(plain, (wrong.how,), (wrong.tensor,)):
        raise BadArgument(f"case.options.misfit: one device computes {case}")
    bench.require_support(case)
    size = case.layout.world_size
    observations = bench.run(observe, target_name, plain, world_size=size)
    if details := tuple(unshown(plain, contract, ranks, observations, contract.outputs)):
        raise bench.mismatch("contract", details=details)
    computed = bench.run(compute, target_name, case, world_size=size)
    if complaints := [f"rank {rank} {text}" for rank, text in enumerate(computed) if text]:
        raise bench.mismatch("misfit", details=tuple(complaints))
    return size


def compute(target_name: str, case: Case) -> str:
    """Rank program: what the target computes of a case with a misfit; empty where it raises, or
    gives what is not a number for an index."""
    target, wrong, plain = load_target(target_name), Misfit.of(case), fitting(case)
    contract = contract_of(plain)
    ranks, rank = RankMap(case.layout, contract.axes), dist.get_rank()
    problem = generate(plain, contract, ranks, ranks.replica(rank))
    inputs = local_inputs(contract, problem, ranks, rank, plain)
    fits = list(inputs[wrong.tensor].shape)
    inputs[wrong.tensor] = wrong.altered(inputs[wrong.tensor])
    for name, spec in contract.inputs.items():
        inputs[name].requires_grad_(spec.grad_placements is not None)
    given = f"{wrong.tensor} {list(inputs[wrong.tensor].shape)} instead of {fits}"
    if wrong.how == INDEX:
        given = f"{wrong.number} among the {wrong.tensor}"
    with session_of(target, case.layout) as session:
        with target_code(f"building {case.concept}"):
            subject = session.build(plain)
            parameters = dict(subject.parameters())
        load_weights(parameters, problem, ranks, rank, plain, contract)
        try:
            found = subject.forward(inputs)
        except (NotSupported, HarnessError):
            raise
        except Exception:
            return ""
    if wrong.how == INDEX and any(bool(each.isnan().any()) for each in found.values()):
        return ""
    shapes = ", ".join(f"{name} {list(each.shape)}" for name, each in found.items())
    return f"was given {given}, and computed {shapes}"
