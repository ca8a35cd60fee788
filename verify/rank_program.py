"""What runs on every rank: build the subject, load it, run it forward and backward, hand back
tensors.

Target code runs only inside `target_code`, which marks what it raises, so that the driver can tell
a target that fails from a harness that does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from verify import oracle
from verify.borrowed import Borrowed, is_looked_at
from verify.case import Case
from verify.cluster.base import RankFailure
from verify.cluster.history import mark
from verify.errors import BadArgument, HarnessError, Mismatch
from verify.layout import Layout
from verify.lens import Problem, dtype_of, generate, local
from verify.oracle.contract import Contract
from verify.placement import Placements, shard
from verify.replica import RankMap
from verify.target import Session, Subject, Target
from verify.targets import load_target
from verify.watch import Watch

_MARK = "shardproof: the target was "

Local = dict[str, Tensor | None]


@dataclass(frozen=True)
class Observation:
    """One rank's local tensors, by the names of `verify.reference.result_names` (and the gradients
    of frozen parameters), and the placement of every parameter.

    `masks` are the dropouts that the contract promises, `kept` the elements that autograd kept for
    backward where it promises those. `states` are the random generators' states after backward, and
    `between` those after forward, where the subject tells them.
    """

    tensors: Local
    placements: dict[str, Placements]
    masks: tuple[Tensor, ...] = ()
    kept: int = 0
    states: dict[str, Tensor] = field(default_factory=dict)
    between: dict[str, Tensor] = field(default_factory=dict)


def contract_of(case: Case) -> Contract:
    """The contract of a case. Raises BadArgument for an unknown concept or option value."""
    if case.concept not in oracle.CONTRACTS:
        known = ", ".join(sorted(oracle.CONTRACTS))
        raise BadArgument(f"case.concept: {case.concept!r} is not one of {known}")
    return oracle.CONTRACTS[case.concept](case)


@contextmanager
def target_code(doing: str) -> Iterator[None]:
    """Mark what is raised inside as the target's, with what it was doing; a HarnessError is never
    the target's, wherever it is raised."""
    try:
        yield
    except HarnessError:
        raise
    except Exception as error:
        error.add_note(f"{_MARK}{doing}")
        raise


def what_the_target_did(failure: RankFailure) -> str | None:
    """What the target was doing when it raised; None where it was not target code that raised."""
    _, found, rest = failure.traceback.rpartition(_MARK)
    return rest.partition("\n")[0].strip() if found else None


@contextmanager
def session_of(target: Target, layout: Layout) -> Iterator[Session]:
    """A target's session, entered and left as target code."""
    with target_code("making its process groups"):
        manager = target.session(layout)
        session = manager.__enter__()
    try:
        yield session
    except BaseException as error:
        manager.__exit__(type(error), error, error.__traceback__)
        raise
    with target_code("undoing its process groups"):
        manager.__exit__(None, None, None)


@dataclass(frozen=True)
class Source:
    """Whose data a run is given: a replica of another case, in full."""

    case: Case
    replica: str


def observe(
    target_name: str, case: Case, source: Source | None = None, times: int = 1
) -> Observation:
    """Rank program: the local tensors of one forward and backward pass, the last of so many with
    the same inputs and weights. Collective over the world.

    Without `source` each rank is given the part of its own replica of `case`.
    """
    target = load_target(target_name)
    contract = contract_of(case)
    ranks, rank = RankMap(case.layout, contract.axes), dist.get_rank()
    if source is None:
        given = generate(case, contract, ranks, ranks.replica(rank))
    else:
        theirs = contract_of(source.case)
        others = RankMap(source.case.layout, theirs.axes)
        given = generate(source.case, theirs, others, source.replica).whole()
    borrowed = Borrowed(contract, looks=is_looked_at(case))
    with session_of(target, case.layout) as session:
        with target_code(f"building {case.concept}"), borrowed.watching():
            subject = session.build(case)
        with target_code("naming its parameters"):
            parameters = dict(subject.parameters())
        load_weights(parameters, given, ranks, rank, case, contract)
        watch = Watch(contract, [parameter for parameter, _ in parameters.values()], borrowed)
        for _ in range(times):
            for parameter, _ in parameters.values():
                parameter.grad = None
            tensors, between = _run(subject, contract, given, ranks, rank, case, watch)
        for name, (parameter, _) in parameters.items():
            tensors[f"grad {name}"] = parameter.grad
        placements: dict[str, Placements] = {n: dict(p) for n, (_, p) in parameters.items()}
        states = _random_states(subject)
        with target_code("compared with its contract"):
            borrowed.refuse()
    found = {n: None if t is None else t.detach().cpu() for n, t in tensors.items()}
    masks = tuple(mask.cpu() for mask in watch.masks)
    return Observation(found, placements, masks, watch.kept, states, between)


def _random_states(subject: Subject) -> dict[str, Tensor]:
    with target_code("telling its random states"):
        tell = getattr(subject, "random_states", None)
        return {} if tell is None else {name: state.cpu() for name, state in tell().items()}


def load_weights(
    parameters: Mapping[str, tuple[Parameter, Placements]],
    given: Problem,
    ranks: RankMap,
    rank: int,
    case: Case,
    contract: Contract,
) -> None:
    """Write the generated weights into the subject, by the placements that the target declares."""
    with target_code("compared with its contract"):
        _same_names("parameters", parameters, contract.parameters)
        for name, (parameter, placements) in parameters.items():
            if foreign := sorted(set(placements) - set(contract.axes)):
                raise Mismatch(
                    f"{name} is placed over {', '.join(foreign)}; {case.concept} is split over"
                    f" {', '.join(contract.axes)}"
                )
            full = given.parameters[name].full
            try:
                part = shard(full, placements, ranks.sizes, ranks.coordinates[rank])
            except (ValueError, IndexError) as error:
                raise Mismatch(f"{name} {list(full.shape)} cannot be cut: {error}") from error
            if part.shape != parameter.shape or parameter.dtype is not dtype_of(case):
                raise Mismatch(
                    f"{name} is {list(parameter.shape)} {_short(parameter.dtype)} on rank {rank};"
                    f" its placement makes it {list(part.shape)} {case.dtype}"
                )
            with torch.no_grad():
                parameter.copy_(part)
            parameter.grad = None


def local_inputs(
    contract: Contract, given: Problem, ranks: RankMap, rank: int, case: Case
) -> dict[str, Tensor]:
    """A rank's own copies of its parts of the inputs, on its device."""
    device = torch.get_default_device()
    return {
        name: local(given.inputs[name], spec.placements, ranks, rank, case).to(device)
        for name, spec in contract.inputs.items()
    }


def _run(
    subject: Subject,
    contract: Contract,
    given: Problem,
    ranks: RankMap,
    rank: int,
    case: Case,
    watch: Watch,
) -> tuple[Local, dict[str, Tensor]]:
    """Outputs and input gradients, and the random states after forward. A gradient that autograd
    does not reach is None."""
    device = torch.get_default_device()
    inputs = local_inputs(contract, given, ranks, rank, case)
    differentiable = [n for n, spec in contract.inputs.items() if spec.grad_placements is not None]
    for name in differentiable:
        inputs[name].requires_grad_()
    mark("forward")
    with target_code("running forward"), torch.enable_grad(), watch.forward():
        outputs = dict(subject.forward(dict(inputs)))
    between = _random_states(subject)
    upstream = {
        name: local(generated, contract.outputs[name].grad_placements or {}, ranks, rank, case).to(
            device
        )
        for name, generated in given.upstream.items()
    }
    with target_code("compared with its contract"):
        _same_names("outputs", outputs, contract.outputs)
        for name, gradient in upstream.items():
            if outputs[name].shape != gradient.shape:
                raise Mismatch(
                    f"{name} is {list(outputs[name].shape)} on rank {rank}; it should be"
                    f" {list(gradient.shape)}"
                )
    reached = [name for name in upstream if outputs[name].requires_grad]
    mark("backward")
    if reached:
        with target_code("running backward"), watch.backward():
            torch.autograd.backward([outputs[n] for n in reached], [upstream[n] for n in reached])
    mark("finish")
    with target_code("finishing its gradients"), watch.borrowed.watching():
        subject.finish_gradients()
    mark("")
    gradients = {f"grad {name}": inputs[name].grad for name in differentiable}
    return {name: outputs[name] for name in contract.outputs} | gradients, between


def _same_names(what: str, found: Mapping[str, object], promised: Mapping[str, object]) -> None:
    missing, extra = sorted(set(promised) - set(found)), sorted(set(found) - set(promised))
    if missing or extra:
        raise Mismatch(
            f"{what}: {', '.join(found) or 'none'}; promised are {', '.join(promised) or 'none'}"
            + f"; missing {', '.join(missing)}" * bool(missing)
            + f"; unknown {', '.join(extra)}" * bool(extra)
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
