"""One training step of a whole model: pipeline, data parallelism, optimizer, on any layout.

A step is given the microbatches of this rank's replica, the same on all its stages. The loss is the
mean over all tokens that count, of all microbatches and all ranks of dp and cp; so each microbatch
contributes the sum over its own, and what is accumulated is divided once, by the number of all. A
loss of multi-token prediction is divided by the same number, as in equation 24 of arXiv:2412.19437.

What routers add (`impl.moe.balance`) is a mean already, over the tokens of a microbatch, and is to
be one over microbatches: as it will be divided by the number of tokens, it is multiplied by that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, ModuleList

from impl.collectives import all_reduce
from impl.context_parallel.zigzag import PackedSequences, chunks_of
from impl.data_parallel import DataParallel
from impl.gradients import finalise_gradients
from impl.groups import Groups
from impl.model import GPTModel
from impl.moe.layer import RoutedExperts
from impl.optimizer.mixed import Optimizer, StepResult
from impl.pipeline.executor import Executor, Stage
from impl.pipeline.p2p import Link
from impl.pipeline.schedules import Schedule, build_schedule, forward_only


@dataclass(frozen=True)
class Microbatch:
    """`tokens` and the `targets` that should follow them, int [batch, sequence], and how much each
    target counts, 0 or 1 in `mask`: of this rank of dp and cp, the same on all of tp and pp. Where
    a row has several sequences, they are `packed` in every row alike, those of all ranks of cp;
    none attends to another, and each has its own positions. Padding counts unless `mask` is 0
    there; to the losses of routers a row is one sequence, and padding counts too."""

    tokens: Tensor
    targets: Tensor
    mask: Tensor
    packed: PackedSequences | None = None


@dataclass(frozen=True)
class TrainResult:
    """What a step did, on every rank: the mean `loss` over `tokens` that counted, both float64 of
    no dimension, before the update; those of the depths of multi-token prediction, [depths], each
    their sum by the same `tokens`; and what the optimizer says."""

    loss: Tensor
    further: Tensor
    tokens: Tensor
    step: StepResult


class Trainer:
    """Trains the chunks of one stage, which `data_parallel` and `optimizer` were made of.

    `schedule` is a kind of `impl.pipeline.schedules.KINDS`, by default interleaved for several
    chunks a stage, else 1f1b. A stage computes while tensors travel. Where `data_parallel`
    overlaps, a bucket is reduced from a chunk's last backward pass on.
    """

    def __init__(
        self,
        chunks: ModuleList,
        *,
        groups: Groups,
        data_parallel: DataParallel,
        optimizer: Optimizer,
        schedule: str | None = None,
    ) -> None:
        self.chunks, self.groups = chunks, groups
        self.data_parallel, self.optimizer = data_parallel, optimizer
        self.kind = schedule or ("interleaved" if groups.layout.vpp > 1 else "1f1b")
        self.link = _link(chunks, groups)
        model = chunks[0]
        assert isinstance(model, GPTModel)
        self.config, self._check_length = model.config, model.check_length
        self._routed = [each for each in chunks.modules() if isinstance(each, RoutedExperts)]
        self._weight = self.config.multi_token_scaling / max(self.config.multi_token_layers, 1)

    def train_step(
        self, microbatches: Sequence[Microbatch], *, finalised: Callable[[], None] | None = None
    ) -> TrainResult:
        """All microbatches forward and backward, and one update. Collective over the world.

        `finalised` is called before the optimizer sees the gradients: these are then of the mean
        loss times the loss scale. ValueError where the schedule does not take so many microbatches,
        and as the model raises it.
        """
        layout = self.groups.layout
        table = build_schedule(
            self.kind, pp=layout.pp, vpp=layout.vpp, microbatches=len(microbatches)
        )
        self.data_parallel.zero_gradients()
        scale = 1.0 if self.optimizer.loss_scale is None else self.optimizer.loss_scale.value
        tokens = self._tokens(microbatches)
        for each in self._routed:
            each.scale_losses(scale * float(tokens.clamp_min(1)) / len(microbatches))
        with self.data_parallel.no_sync():
            losses = self._run(table, microbatches, scale=scale, completing=self.data_parallel.sync)
        finalise_gradients(
            self.data_parallel,
            tp_group=self.groups.tp,
            tokens=tokens,
            embedding_group=self.groups.embedding,
        )
        if finalised is not None:
            finalised()
        means = losses / tokens.clamp_min(1)
        return TrainResult(means[0], means[1:], tokens, self.optimizer.step())

    def evaluate(self, microbatches: Sequence[Microbatch]) -> Tensor:
        """The mean loss over all tokens that count, float64 of no dimension, on every rank: forward
        only, without dropout. Leaves gradients and random streams as they are. Collective."""
        layout = self.groups.layout
        table = forward_only(pp=layout.pp, vpp=layout.vpp, microbatches=len(microbatches))
        self.chunks.eval()
        losses = self._run(table, microbatches, scale=1.0)
        self.chunks.train()
        return losses[0] / self._tokens(microbatches).clamp_min(1)

    def _tokens(self, microbatches: Sequence[Microbatch]) -> Tensor:
        """The number of tokens that count, of the whole step, float64."""
        counted = torch.stack([each.mask.sum() for each in microbatches]).sum()
        return all_reduce(counted.double().reshape(1), group=self.groups.dp_cp).reshape(())

    def _run(
        self,
        table: Schedule,
        microbatches: Sequence[Microbatch],
        *,
        scale: float,
        completing: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Tensor:
        """The sums of the losses of the whole step, float64, as `GPTModel.losses` has them in
        training."""
        self._check_rows(microbatches)
        sums: list[Tensor] = []
        Executor(
            table,
            stage=self._stage(microbatches, sums),
            link=self.link,
            inputs=[each.tokens for each in microbatches],
            scale=scale,
            shape=self._shape(microbatches),
            overlap=True,
            completing=completing,
        ).run()
        told = self.data_parallel.zero.double().new_zeros(1 + self.config.multi_token_layers)
        for each in sums:
            told[: len(each)] += each
        # Only the last stage has losses.
        return all_reduce(all_reduce(told, group=self.groups.dp_cp), group=self.groups.pp)

    def _stage(self, microbatches: Sequence[Microbatch], sums: list[Tensor]) -> Stage:
        """What the stage computes. `sums` gets the losses of each microbatch on the last one."""
        last = self.chunks[-1]

        def loss(h: Tensor, m: int) -> Tensor:
            assert isinstance(last, GPTModel)
            losses = last.losses(h, **vars(microbatches[m]))
            sums.append(losses.detach())
            return losses[0] + self._weight * losses[1:].sum()

        def forward(chunk: Module, x: Tensor, m: int) -> Tensor:
            y: Tensor = chunk(x, packed=microbatches[m].packed)
            return y

        return Stage(
            chunks=[partial(forward, chunk) for chunk in self.chunks],
            parameters=[list(chunk.parameters()) for chunk in self.chunks],
            loss=loss,
        )

    def _check_rows(self, microbatches: Sequence[Microbatch]) -> None:
        """Raise ValueError on every rank alike, before one waits for another that has raised it,
        where packed sequences are not those of a row, or longer than any may be."""
        size = self.groups.size("cp")
        for m, each in enumerate(microbatches):
            try:
                chunks_of(
                    each.tokens.shape[-1] * size,
                    size=size,
                    placement=self.config.layer.placement,
                    packed=each.packed,
                )
                self._check_length(each.tokens, each.packed)
            except ValueError as error:
                raise ValueError(f"microbatch {m}: {error}") from None

    def _shape(self, microbatches: Sequence[Microbatch]) -> tuple[int, ...] | None:
        """That of all activations, None if microbatches differ."""
        shapes = {tuple(each.tokens.shape) for each in microbatches}
        if len(shapes) > 1:
            return None
        ((batch, sequence),) = shapes
        split = dist.get_world_size(self.groups.tp) if self.groups.layout.sequence_parallel else 1
        return sequence // split, batch, self.config.layer.hidden


def _link(chunks: ModuleList, groups: Groups) -> Link:
    first = next(chunks.parameters())
    return Link(groups.pp, dtype=first.dtype, device=first.device)
