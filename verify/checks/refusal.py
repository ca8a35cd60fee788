"""The check `refusal`: sizes and options that cannot be computed are refused, clearly, by every
rank.

A refusal is an exception that the target raises on purpose, while making its groups, building or
running forward, on every rank, with a message that names a size, an option or its value. An
exception out of a library that ran into the bad sizes, a hang, and a result are none.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import linecache
import re
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from verify import oracle
from verify.case import HARNESS_OPTIONS, Case
from verify.checks.blame import Bench
from verify.cluster.base import Cluster
from verify.errors import BadArgument, HarnessError, NotSupported
from verify.layout import Layout
from verify.oracle.contract import Contract
from verify.placement import Partial, Placements, Replicate
from verify.rank_program import contract_of, session_of
from verify.replica import RankMap
from verify.targets import load_target

# An exception of these types is a mistake that was run into, whoever wrote the message.
_INTERNAL = (
    AttributeError,
    IndexError,
    KeyError,
    NameError,
    TypeError,
    UnboundLocalError,
    ZeroDivisionError,
)
_TORCH = str(Path(torch.__file__).parent)
_ORACLE = str(Path(oracle.__file__).parent)
_STANDARD = sysconfig.get_paths()["stdlib"]


@dataclass(frozen=True)
class Answer:
    """What one rank said to a case: the stage at which it raised, and whether on purpose; without a
    stage, it computed."""

    stage: str = ""
    kind: str = ""
    message: str = ""
    deliberate: bool = False


def refusal(case: Case, *, target_name: str, cluster: Cluster) -> int:
    """Every rank refuses the case with an error that names what is wrong with it."""
    bench = Bench("refusal", case, target_name, cluster)
    bench.require_support(case)
    answers = bench.run(answer, target_name, case, world_size=case.layout.world_size)
    complaints = [
        f"rank {rank} {text}" for rank, each in enumerate(answers) if (text := _lacks(each, case))
    ]
    if complaints:
        raise bench.mismatch("refusal", details=tuple(dict.fromkeys(complaints)))
    return len(answers)


def answer(target_name: str, case: Case) -> Answer:
    """Rank program: what the target says to a case that it has to refuse."""
    target, given = load_target(target_name), _inputs(case)
    stage = "making its process groups"
    try:
        with session_of(target, case.layout) as session:
            stage = "building"
            subject = session.build(case)
            stage = "running forward"
            subject.forward(given)
            return Answer()
    except (NotSupported, HarnessError):
        raise
    except Exception as error:
        return Answer(stage, type(error).__name__, str(error), is_deliberate(error))


def _lacks(answer: Answer, case: Case) -> str:
    """What a refusal lacks; empty where it is one."""
    said = f"{answer.kind}: {' '.join(answer.message.split())}"
    if not answer.stage:
        return "computed the case"
    if not answer.deliberate:
        return f"ran into an error while {answer.stage}, it did not refuse: {said}"
    if not _names_something(answer.message, case):
        return f"refused while {answer.stage} without naming a size or an option: {said}"
    return ""


def is_deliberate(error: Exception) -> bool:
    """Whether the exception comes out of a `raise` or `assert` of the target with a message."""
    if isinstance(error, _INTERNAL) or not str(error).strip():
        return False
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    place = last.tb_frame.f_code.co_filename
    if isinstance(error, BadArgument):
        # An adapter may ask the oracle, which judges and does not refuse for a target.
        return not place.startswith(_ORACLE)
    standard = place.startswith(_STANDARD) and "site-packages" not in place
    library = place.startswith(_TORCH) or standard
    return not library and last.tb_lineno in _raising_lines(place)


@cache
def _raising_lines(path: str) -> frozenset[int]:
    """The lines of a source file that are part of a `raise` or `assert`."""
    tree = ast.parse("".join(linecache.getlines(path)))
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Raise | ast.Assert))
    return frozenset(
        line for node in found for line in range(node.lineno, (node.end_lineno or 0) + 1)
    )


def _names_something(message: str, case: Case) -> bool:
    """Whether a message has one of the case's sizes in it, or the name of an option that is set, or
    what it is set to in words."""
    layout = case.layout
    numbers = {*case.shape.values(), *layout.sizes.values(), *layout.expert_sizes.values()} - {1}
    # A path is no name, and digits in it are no size.
    message = re.sub(r"\S*/\S*", " ", message)
    words = " ".join(message.lower().replace("_", " ").split())
    options = {
        name for name, value in case.options.items() if value is not None and value is not False
    }
    options |= {"sequence_parallel"} if layout.sequence_parallel else set()
    named = any(name.replace("_", " ") in words for name in options)
    given = {name: case.options[name] for name in {*case.options} - {*HARNESS_OPTIONS}}
    values = {each.replace("_", " ") for each in given.values() if isinstance(each, str)} - {""}
    named |= any(re.search(rf"\b{re.escape(value)}\b", words) for value in values)
    return named or bool(numbers & {int(found) for found in re.findall(r"\d+", message)})


def _inputs(case: Case) -> Mapping[str, Tensor]:
    """Zeros of the shapes that this rank would be given, divided as evenly as the sizes allow; the
    integers that the contract gives. Empty for a concept without a contract."""
    if case.concept not in oracle.CONTRACTS:
        return {}
    contract = _contract_near(case)
    ranks, rank = RankMap(case.layout, contract.axes), dist.get_rank()
    found = {}
    for name, spec in contract.inputs.items():
        fixed = (0,) * prod(spec.shape) if spec.values is None else spec.values
        full = torch.tensor(fixed, dtype=torch.int64).view(spec.shape)
        part = _roughly(full, spec.placements, ranks, rank)
        integer = spec.high is not None or spec.values is not None
        dtype = torch.int64 if integer else getattr(torch, case.dtype)
        found[name] = part.to(dtype, copy=True)
        if spec.grad_placements is not None:
            found[name].requires_grad_()
    return found


def _contract_near(case: Case) -> Contract:
    """The contract of the case or, where the oracle refuses it too, of the case without sequence
    parallelism, without one of its options, without all, without either and then with a one for one
    of its sizes, or on one rank: the target is to refuse whatever the inputs, and those that are
    right but for one thing leave it no other reason."""
    apart = dataclasses.replace(case.layout, sequence_parallel=False)
    plain = dataclasses.replace(case, options={})
    alone = dataclasses.replace(case, layout=apart)
    without = (
        dataclasses.replace(case, options={n: v for n, v in case.options.items() if n != name})
        for name in case.options
    )
    simple = dataclasses.replace(plain, layout=apart)
    smaller = (dataclasses.replace(simple, shape={**case.shape, size: 1}) for size in case.shape)
    if found := _contracts((case, alone, *without, plain, simple)):
        return found[0]
    # A size that is no input's is another for the target to name.
    if found := _contracts(smaller):
        return max(found, key=_elements)
    return contract_of(dataclasses.replace(plain, layout=Layout()))


def _contracts(cases: Iterable[Case]) -> list[Contract]:
    """Those of the cases that the oracle has any for."""
    found = []
    for case in cases:
        with contextlib.suppress(BadArgument):
            found.append(contract_of(case))
    return found


def _elements(contract: Contract) -> int:
    return sum(prod(spec.shape) for spec in contract.inputs.values())


def _roughly(full: Tensor, placements: Placements, ranks: RankMap, rank: int) -> Tensor:
    for axis, placement in placements.items():
        if isinstance(placement, Replicate | Partial):
            continue
        parts = full.tensor_split(ranks.sizes[axis], placement.dim)
        full = parts[ranks.coordinates[rank][axis]]
    return full
