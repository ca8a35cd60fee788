"""Steps of megatron-core's training, of the chunks of a `GPTModel` that a stage has.

What is around megatron-core is this adapter's, as a training script has it: the loss of the tokens
that count, and which hooks a schedule is given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor
from torch.nn import Parameter

from verify.case import Case
from verify.targets.megatron_core.multi_token import depths_of, losses_of
from verify.targets.megatron_core.subjects import Tensors
from verify.targets.megatron_core.training import (
    data_parallel_config,
    main_gradients,
    optimizer_of,
    schedule_of,
)


class Trainer:
    """The chunks in their data parallelism, an optimizer, and a schedule of its rates."""

    def __init__(self, case: Case, config: TransformerConfig, chunks: Sequence[GPTModel]) -> None:
        self.case, self.config = case, config
        self.distributed, self.overlap = (
            bool(case.options.get(name, False)) for name in ("distributed", "overlap")
        )
        # With several chunks their parameters are gathered when the schedule says. A configuration
        # is for one: it is changed.
        ddp = partial(data_parallel_config, case, config, align_param_gather=len(chunks) > 1)
        self.models = [
            DistributedDataParallel(
                config,
                ddp(),
                Float16Module(config, chunk) if config.bf16 else chunk,
                disable_bucketing=index > 0,
            )
            for index, chunk in enumerate(chunks)
        ]
        self.optimizer = optimizer_of(case, self.models)
        self.schedule = schedule_of(case, self.optimizer)
        self._hook()

    @property
    def rate(self) -> float:
        """The learning rate of the next update."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def gradients(self, parameters: Collection[Parameter]) -> dict[Parameter, Tensor]:
        """Main gradients of what is trained."""
        return main_gradients(self.models, parameters, distributed=self.distributed)

    def gradients_of_step(self, inputs: Tensors, finalised: Callable[[], None]) -> Tensor:
        """The mean loss of a step, and those of tokens further on, [1 + depths]; gradients are
        finalised, and `finalised` is called then."""
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()

        def finalise(*args: Any, **kwargs: Any) -> None:
            finalize_model_grads(*args, **kwargs)
            finalised()

        self.config.finalize_model_grads_func = finalise
        return self._mean_losses(inputs, forward_only=False)

    def update(self) -> tuple[bool, float]:
        """The optimizer's step: whether it was taken, and the norm of all gradients."""
        taken, norm, _ = self.optimizer.step()
        self.schedule.step(1)
        return bool(taken), float(norm)

    def evaluation(self, inputs: Tensors) -> Tensor:
        """The mean loss without dropout and without gradients."""
        gathering = self.overlap and self.distributed
        for model in self.models:
            if gathering:
                model.disable_forward_pre_hook()
            model.eval()
        with torch.no_grad():
            loss = self._mean_losses(inputs, forward_only=True)[0]
        for model in self.models:
            model.train()
            if gathering:
                model.enable_forward_pre_hook()
        return loss

    def complete_parameters(self) -> None:
        """Parameters that are on their way to other ranks arrive."""
        if self.overlap and self.distributed:
            for model in self.models:
                model.start_param_sync(force_sync=True)

    def _hook(self) -> None:
        """What a training script gives the schedules."""
        config, models = self.config, self.models
        config.grad_scale_func = self.optimizer.scale_loss
        several = len(models) > 1
        if self.overlap:
            # Of one model it is that, not a list of one.
            syncs = [model.no_sync for model in models], [m.start_grad_sync for m in models]
            config.no_sync_func, config.grad_sync_func = (
                each if several else each[0] for each in syncs
            )
            if several and self.distributed:
                config.param_sync_func = [model.start_param_sync for model in models]

    def _mean_losses(self, inputs: Tensors, *, forward_only: bool) -> Tensor:
        """The mean losses over all tokens that count, on every rank."""
        count, batch, sequence = inputs["tokens"].shape
        group = parallel_state.get_data_parallel_group(True)
        tokens = inputs["mask"].sum().double()
        dist.all_reduce(tokens, group=group)
        tokens = tokens.clamp_min(1)
        # Where gradients are not divided by the tokens that count, the loss is: the schedule and
        # data parallelism make means of it.
        means = count * group.size() / tokens.to(torch.float32)
        sums = get_forward_backward_func()(
            forward_step_func=partial(self._forward, inputs, means),
            data_iterator=[iter(range(count)) for _ in self.models],
            model=self.models,
            num_microbatches=count,
            seq_length=sequence,
            micro_batch_size=batch,
            forward_only=forward_only,
        )
        depths = 0 if forward_only else depths_of(self.case)
        total = torch.stack([torch.zeros(1 + depths, dtype=torch.float64), *sums]).sum(dim=0)
        dist.all_reduce(total, group=group)
        dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        return total / tokens

    def _forward(
        self,
        inputs: Tensors,
        means: Tensor,
        microbatches: Iterator[int],
        model: DistributedDataParallel,
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        at = next(microbatches)
        tokens, mask = inputs["tokens"][at], inputs["mask"][at]
        places = torch.arange(tokens.shape[1])
        ahead = (places[None] > places[:, None])[None, None]
        output = model(
            tokens,
            places.expand_as(tokens),
            ahead if self.case.options.get("mask") != "full" else None,
            labels=inputs["targets"][at],
            loss_mask=mask,
        )
        training = torch.is_grad_enabled() and depths_of(self.case) > 0

        def loss(losses: Tensor) -> tuple[Tensor, ...]:
            total = (losses * mask).sum()
            told = total.detach().double()[None]
            if training:
                told = torch.cat([told, losses_of(self.case, mask)])
            if self.config.calculate_per_token_loss:
                return total, mask.sum().to(torch.int), told
            return total * means, told

        return output, loss
