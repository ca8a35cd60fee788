"""megatron-core's pipeline schedules as a subject: a stack of layers that they train.

The layers are the contract's, and so is how many a chunk has; megatron-core is asked to refuse what
does not divide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from torch import Tensor

from verify.case import Case
from verify.oracle.pipeline import OPTIONS as _OPTIONS
from verify.targets.megatron_core.subjects import config_of
from verify.targets.pipeline_steps import ByMicrobatch, Chunk, PipelineSubject, Round

OPTIONS: Mapping[str, frozenset[str]] = {"pipeline": frozenset(_OPTIONS)}


class _Chunk(MegatronModule):
    """What a schedule takes for a model."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: TransformerConfig, chunk: Chunk, vp_stage: int | None) -> None:
        super().__init__(config)
        self.chunk, self.vp_stage = chunk, vp_stage
        self.input: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """Take what the stage before has sent; None on the first."""
        (self.input,) = tensors


class _Subject(PipelineSubject):
    def __init__(self, case: Case) -> None:
        layout, dtype = case.layout, getattr(torch, case.dtype)
        several = layout.vpp > 1
        overlap = several and bool(case.options.get("overlap", True))
        self.config = config_of(
            case,
            hidden_size=case.shape["hidden"],
            num_layers=case.shape["layers"],
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp if several else None,
            pipeline_dtype=dtype,
            variable_seq_lengths=bool(case.options.get("variable", False)),
            overlap_p2p_comm=overlap,
            batch_p2p_comm=not overlap,
            # The default refuses variable lengths, though there are no experts.
            moe_token_dispatcher_type="alltoall",
            deallocate_pipeline_outputs=bool(case.options.get("freed", False)),
        )
        for chunk in range(layout.vpp):
            get_num_layers_to_build(self.config, vp_stage=chunk if several else None)
        super().__init__(case)

    def run(self, round_: Round, *, forward_only: bool) -> tuple[ByMicrobatch, ByMicrobatch]:
        """One call of Megatron's function for the layout."""
        losses: dict[int, Tensor] = {}
        several = len(round_.chunks) > 1
        model = [
            _Chunk(self.config, chunk, index if several else None)
            for index, chunk in enumerate(round_.chunks)
        ]
        # A schedule divides a loss by the number of its microbatches.
        scale = round_.scale * len(round_.inputs)

        def step(
            data: Iterator[int], chunk: _Chunk
        ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
            microbatch = next(data)
            x = round_.inputs[microbatch] if chunk.input is None else chunk.input
            return chunk.chunk.forward(x), partial(loss_of, microbatch)

        def loss_of(microbatch: int, y: Tensor) -> tuple[Tensor, Tensor]:
            loss = round_.loss(y, microbatch)
            losses[microbatch] = loss.detach().clone()
            return loss * scale, losses[microbatch]

        sequence, batch, _ = round_.inputs[0].shape
        with torch.set_grad_enabled(not forward_only):
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=[iter(range(len(round_.inputs))) for _ in model],
                model=model,
                num_microbatches=len(round_.inputs),
                seq_length=sequence,
                micro_batch_size=batch,
                forward_only=forward_only,
            )
        given = {i: each.grad for i, each in enumerate(round_.inputs)}
        return losses, {i: gradient for i, gradient in given.items() if gradient is not None}


BUILDERS: Mapping[str, Callable[[Case], PipelineSubject]] = {"pipeline": _Subject}


def schedule_lacks(case: Case, option: str) -> str | None:
    """Why there is no schedule of the kind that an option of a case says."""
    kind, several = str(case.options.get(option, "default")), case.layout.vpp > 1
    if kind not in ("default", "1f1b", "interleaved"):
        return f"it has no schedule {kind}"
    if kind == "interleaved" and not several:
        return "its interleaved schedule is for several chunks a stage"
    if kind == "1f1b" and several:
        return "with several chunks a stage it takes the interleaved schedule"
    return None


def lacks(case: Case) -> str | None:
    """Why megatron-core or this adapter cannot do a case; None where it can."""
    if case.concept not in BUILDERS:
        return None
    layout = case.layout
    if reason := schedule_lacks(case, "schedule"):
        return reason
    if case.shape.get("microbatches", 0) % int(case.options.get("rounds", 1) or 1):
        return "rounds are this adapter's"
    if case.options.get("strides", "contiguous") != "contiguous":
        return "what a stage computes has to be contiguous, and these layers keep strides"
    if layout.vpp > 1 and layout.pp == 2 and not case.options.get("overlap", True):
        return "Megatron-LM refuses to interleave two stages without overlap"
    return None
