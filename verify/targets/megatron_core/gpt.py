"""megatron-core's `GPTModel` and its training as a subject: its schedules, data parallelism,
finalisation of gradients and optimizers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.pipeline_parallel.utils import is_vp_first_stage, is_vp_last_stage
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    get_transformer_layer_offset,
)
from torch import Tensor
from torch.nn import Parameter

from verify.case import Case
from verify.cluster.history import mark_step
from verify.placement import Placements
from verify.targets.megatron_core import stand_ins
from verify.targets.megatron_core.experts import (
    AUXILIARY,
    expert_arguments,
    name_of,
    routing_lacks,
)
from verify.targets.megatron_core.layer import (
    NAMES,
    layer_config,
    layer_lacks,
    parts_of,
)
from verify.targets.megatron_core.multi_token import (
    JOIN,
    depths_of,
    modules_lack,
    modules_of,
    own_rows,
    whole,
)
from verify.targets.megatron_core.multi_token import name_of as name_of_module
from verify.targets.megatron_core.norm import Norm
from verify.targets.megatron_core.pipeline import schedule_lacks
from verify.targets.megatron_core.random import random_states
from verify.targets.megatron_core.subjects import Tensors
from verify.targets.megatron_core.trainer import Trainer
from verify.targets.megatron_core.training import OPTIONS as _TRAINING
from verify.targets.megatron_core.training import training_lacks
from verify.targets.stacks import Member, Stacks

_LAYER = ("norm", "qk_norm", "bias", "activation", "rotary_dim", "interleaved", "mask", "window")
OPTIONS: Mapping[str, frozenset[str]] = {
    "gpt_training": (_TRAINING["training_steps"] - {"spare"})
    | frozenset(_LAYER)
    | {
        "algorithm",
        "placement",
        "recompute",
        "positions",
        "max_sequence",
        "tied",
        "multiple",
        "first",
        "last",
        "split",
        "pipeline",
        "evaluated",
        "hidden_dropout",
        "attention_dropout",
        "every",
        "dispatcher",
        "multi_token",
        "multi_token_scaling",
        "multi_token_normalised",
        *AUXILIARY,
    }
}
_POSITIONS = {"none": "none", "rotary": "rope", "learned": "learned_absolute"}
_OUTSIDE = {
    "embedding.word_embeddings.weight": "embedding.tokens.weight",
    "embedding.position_embeddings.weight": "embedding.positions.weight",
    "output_layer.weight": "output.weight",
}


class GPTSubject:
    """Trains in its forward pass."""

    def __init__(self, case: Case) -> None:
        self.case, self.config = case, _config(case)
        self.vpp = case.layout.vpp
        self.chunks = [self._chunk(index) for index in range(self.vpp)]
        self.named = {
            (index, name): parameter
            for index, chunk in enumerate(self.chunks)
            for name, parameter in chunk.named_parameters()
        }
        layers: list[list[int]] = [[] for _ in range(case.layout.pp)]
        dist.all_gather_object(
            layers, self._layers(), group=parallel_state.get_pipeline_model_parallel_group()
        )
        self.stacks = Stacks(case, self._own(), layers=layers, copied=self._copied)
        self.join = whole(self.stacks.given[JOIN]) if depths_of(case) else None

    def parameters(self) -> Mapping[str, tuple[Parameter, Placements]]:
        """This stage's part of every stack."""
        found = dict(self.stacks.parameters())
        if self.join is not None:
            found[JOIN] = (self.join, self.stacks.promised[JOIN].placements)
        return found

    def forward(self, inputs: Tensors) -> Tensors:
        """All steps; what is told of each, stacked."""
        if self.join is not None:
            self.stacks.given[JOIN] = own_rows(self.join)
        self.stacks.fill()
        if self._copied:
            # A copy on the last stage gets its values from the first.
            for chunk in self.chunks:
                chunk.setup_embeddings_and_output_layer()
        training = Trainer(self.case, self.config, self.chunks)
        told: dict[str, list[Tensor]] = {}
        after: list[dict[str, Tensor]] = []
        for step in range(self.case.shape["steps"]):
            mark_step(step)
            mine = {name: tensor[step] for name, tensor in inputs.items()}
            for name, value in self._step(training, mine, after).items():
                told.setdefault(name, []).append(value)
        training.complete_parameters()
        after.append(_as_promised(self.stacks.values()))
        for name in after[0]:
            told[name] = [each[name] for each in after[1:]]
        return {name: torch.stack(values) for name, values in told.items()}

    def finish_gradients(self) -> None:
        """Nothing: every step does."""

    def random_states(self) -> Mapping[str, Tensor]:
        """The state of every stream."""
        return random_states()

    @property
    def _tied(self) -> bool:
        return bool(self.case.options.get("tied", True))

    @property
    def _copied(self) -> bool:
        """Whether the last stage has the embedding too, if it is not the first."""
        return self._tied or depths_of(self.case) > 0

    def _chunk(self, index: int) -> GPTModel:
        case, vp_stage = self.case, index if self.vpp > 1 else None
        shape, options = case.shape, case.options
        dim = options.get("rotary_dim")
        block = get_gpt_decoder_block_spec(
            self.config, use_transformer_engine=False, vp_stage=vp_stage
        )
        layers = [_layer_of(case, each.submodules.mlp) for each in block.layer_specs]
        vp_size = self.config.virtual_pipeline_model_parallel_size
        first = parallel_state.is_pipeline_first_stage() and is_vp_first_stage(vp_stage, vp_size)
        last = parallel_state.is_pipeline_last_stage() and is_vp_last_stage(vp_stage, vp_size)
        return GPTModel(
            self.config,
            TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm),
            vocab_size=shape["vocabulary"],
            max_sequence_length=int(options.get("max_sequence") or shape["sequence"]),
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=self._tied,
            position_embedding_type=_POSITIONS[str(options.get("positions", "none"))],
            rotary_percent=1.0 if dim is None else int(dim) / shape["head_size"],
            mtp_block_spec=modules_of(case, _layer_of(case)) if last else None,
            vp_stage=vp_stage,
        )

    def _offset(self, chunk: int) -> int:
        offset: int = get_transformer_layer_offset(self.config, chunk if self.vpp > 1 else None)
        return offset

    def _layers(self) -> list[int]:
        """The layers of this stage, by their numbers in the model."""
        counts = [len(chunk.decoder.layers) for chunk in self.chunks]
        return [self._offset(i) + each for i, count in enumerate(counts) for each in range(count)]

    def _own(self) -> dict[str, Member]:
        """The parameters of this stage by the contract's names, of experts those of a layer."""
        own: dict[str, list[Parameter]] = {}
        for (chunk, name), parameter in self.named.items():
            if not self._is_unused(chunk, name):
                own.setdefault(self._name(chunk, name), []).append(parameter)
        found: dict[str, Member] = {}
        for name, each in own.items():
            if ".experts." in name:
                found[name] = each
            else:
                (found[name],) = each
        return found

    def _is_unused(self, chunk: int, name: str) -> bool:
        """Whether a parameter is the output's own beside a copy of the embedding that it is tied
        to, which megatron-core makes and leaves alone: docs/findings.md."""
        twice = depths_of(self.case) > 0 and self._tied and not self.chunks[chunk].pre_process
        return twice and name == "output_layer.weight"

    def _name(self, chunk: int, name: str) -> str:
        """The contract's name of a parameter of a chunk, the same of all experts of a layer."""
        name = name.replace("decoder.final_layernorm", "final_norm")
        if found := re.fullmatch(r"mtp\.layers\.(\d+)\.(.+)\.(\w+)", name):
            return name_of_module(*found.groups())
        if name == "embedding.word_embeddings.weight" and not self.chunks[chunk].pre_process:
            return "lookup.weight"
        if not (found := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)\.(\w+)", name)):
            return _OUTSIDE.get(name, name)
        index, module, last = found.groups()
        if module in NAMES:
            inner = f"{NAMES[module]}.{last}"
        else:
            inner = f"mlp.{name_of(f'{module}.{last}'.removeprefix('mlp.'))}"
        return f"layers.{self._offset(chunk) + int(index)}.{inner}"

    def _step(
        self, training: Trainer, inputs: Tensors, after: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        wide = torch.promote_types(self.stacks.dtype, torch.float32)

        def finalised() -> None:
            # What the forward passes of a step have seen is what the step before has left.
            after.append(_as_promised(self.stacks.values()))
            gradients = training.gradients(self.named.values())
            given = self.stacks.gradients(gradients.__getitem__, dtype=wide)
            found.update(_as_promised(given))

        rate = training.rate
        loss, *further = training.gradients_of_step(inputs, finalised)
        taken, norm = training.update()
        report = {"scale": 1.0, "skipped": float(not taken), "rates": [rate]}
        found |= {name: torch.tensor(v, dtype=torch.float64) for name, v in report.items()}
        found |= {"loss": loss, "norm": torch.tensor(norm).to(wide)}
        found |= {"further": torch.stack(further)} if further else {}
        if self.case.options.get("evaluated", False):
            found["evaluation"] = training.evaluation(inputs)
        return found


def _as_promised(told: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is told of stacks, of joining weights as the contract has them."""
    return {n: whole(each).detach() if n.endswith(f" {JOIN}") else each for n, each in told.items()}


def _layer_of(case: Case, mlp: ModuleSpec | None = None) -> ModuleSpec:
    return ModuleSpec(module=TransformerLayer, submodules=parts_of(case, mlp))


def _config(case: Case) -> TransformerConfig:
    """That of the layer, of experts, and where layers are. Auxiliary losses are means over
    microbatches and ranks, and tokens no measure of them: the loss is a mean beside them."""
    layout, options = case.layout, case.options
    several, recompute = layout.vpp > 1, str(options.get("recompute") or "")
    given: dict[str, Any] = {}
    if text := options.get("split"):
        stages = [["decoder"] * int(count) for count in str(text).split(",")]
        stages[0].insert(0, "embedding")
        stages[-1] += [*["mtp"] * depths_of(case), "loss"]
        given["pipeline_model_parallel_layout"] = stages
    elif several:
        given["virtual_pipeline_model_parallel_size"] = layout.vpp
    if recompute.startswith("full"):
        given |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
            "distribute_saved_activations": recompute == "full_distributed",
        }
    if depths := depths_of(case):
        scaling = options.get("multi_token_scaling", 0.1)
        given |= {"mtp_num_layers": depths, "mtp_loss_scaling_factor": scaling}
    if "experts" in case.shape:
        given |= {**expert_arguments(case), "moe_layer_freq": int(options.get("every", 1) or 1)}
    return layer_config(
        case,
        num_layers=case.shape["layers"],
        pipeline_model_parallel_size=layout.pp,
        pipeline_dtype=getattr(torch, case.dtype),
        num_layers_in_first_pipeline_stage=options.get("first"),
        num_layers_in_last_pipeline_stage=options.get("last"),
        overlap_p2p_comm=several,
        batch_p2p_comm=not several,
        # With overlap that is wrong, as `pipeline` shows: docs/findings.md.
        deallocate_pipeline_outputs=not several,
        calculate_per_token_loss=not any(name in options for name in AUXILIARY),
        **given,
    )


def lacks(case: Case) -> str | None:
    """Why megatron-core or this adapter cannot do a case; None where it can."""
    if case.concept not in BUILDERS:
        return None
    options, layout, shape = case.options, case.layout, case.shape
    if "experts" in shape and (reason := _experts_lack(case)):
        return reason
    if reason := modules_lack(case):
        return reason
    if layout.cp > 1:
        return "its local attention, and so the model, has no context parallelism"
    unit = layout.tp * int(options.get("multiple", 1) or 1)
    if shape["vocabulary"] % unit:
        return "vocab_parallel_cross_entropy does not mask the padding of the vocabulary"
    if reason := schedule_lacks(case, "pipeline"):
        return reason
    if options.get("recompute") and options.get("mask") == "sliding_window" and stand_ins.needed():
        return "its mask of a window is made on CUDA, again in backward, where no stand-in is"
    # It is given masks, where the layer alone makes its own.
    plain = dataclasses.replace(case, options={**options, "recompute": ""})
    return training_lacks(case) or layer_lacks(plain)


def _experts_lack(case: Case) -> str | None:
    if case.options.get("bias", True):
        return "where there are biases, routers and experts have some, too"
    if case.options.get("balance") == "global" and case.shape["microbatches"] > 1:
        return "its global loss counts tokens of all microbatches before"
    return routing_lacks(case)


BUILDERS: Mapping[str, Callable[[Case], GPTSubject]] = {"gpt_training": GPTSubject}
