"""What a pretraining run is told, and the model, layout and schedule that follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from impl.context_parallel.attention import ALGORITHMS
from impl.data import CORPUS
from impl.latent_attention import LatentSizes
from impl.model_config import ModelConfig, layers_of
from impl.moe.layer import ExpertsConfig
from impl.moe.router import Choice, Losses
from impl.optimizer.schedule import Schedule
from impl.rotary import RotaryEmbedding
from impl.transformer import LayerConfig
from verify.layout import Layout

# Options that have an effect with others only.
_OF_LATENTS = ("kv_lora_rank", "q_lora_rank", "rope_size", "value_size")
_COEFFICIENTS = ("balance_coefficient", "z_coefficient")
_OF_EXPERTS = ("top_k", "shared_ffn", "dispatcher", "balance", *_COEFFICIENTS)
# Of the loss: far beyond what float16 holds, and far from what overflows float32.
_LARGEST_SCALE = 2.0**64
_PATHS = ("data", "cache", "save", "load", "log", "plot")
POSITIONS = {"rope": "rotary", "learned_absolute": "learned", "none": "none"}
NORMS = {"RMSNorm": "rms", "LayerNorm": "layer"}
# Megatron-LM's names of the algorithms, beside ours.
CP_ALGORITHMS = {**{name: name for name in ALGORITHMS if name != "hierarchical"}} | {
    "p2p": "ring",
    "a2a": "ulysses",
}
# What each is of: a microbatch, each sequence, the microbatches that replicas compute at once.
BALANCES = {
    "none": None,
    "aux_loss": "batch",
    "seq_aux_loss": "sequence",
    "global_aux_loss": "global",
}
DISPATCHERS = {"alltoall": "all_to_all", "allgather": "all_gather"}
SOFTMAXES = {"vanilla": False, "learnable": True}


@dataclass(frozen=True, kw_only=True)
class Options:
    """A run. Every field is an option of the command, whose help says what it is."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None
    sequence_parallel: bool = False
    pipeline: str | None = None
    cp_algorithm: str = "all_gather"

    layers: int = 4
    hidden: int = 64
    heads: int = 4
    groups: int | None = None
    ffn: int | None = None
    sequence: int = 128
    activation: str = "swiglu"
    norm: str = "RMSNorm"
    positions: str = "rope"
    tied: bool = True
    bias: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    qk_norm: bool = False
    softmax: str = "vanilla"
    layer_scaling: bool = False
    latent: bool = False
    kv_lora_rank: int = 32
    q_lora_rank: int | None = None
    rope_size: int = 8
    value_size: int | None = None
    experts: int | None = None
    top_k: int = 2
    shared_ffn: int | None = None
    dispatcher: str = "alltoall"
    balance: str = "none"
    balance_coefficient: float = 0.0
    z_coefficient: float = 0.0
    multi_token_layers: int = 0
    multi_token_scaling: float = 0.1
    recompute: str | None = None
    init_std: float = 0.1
    vocabulary_multiple: int = 128

    steps: int = 200
    global_batch_size: int = 8
    microbatch_size: int = 2
    lr: float = 3e-3
    min_lr: float = 3e-4
    warmup: int | None = None
    decay: int | None = None
    decay_style: str = "cosine"
    weight_decay: float = 0.1
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    bf16: bool = False
    fp16: bool = False
    initial_loss_scale: float = 2.0**32
    distributed_optimizer: bool = False
    overlap: bool = False
    bucket: int | None = None
    seed: int = 0

    data: Path = CORPUS
    cache: Path = Path(".shardproof-data")
    save: Path | None = None
    save_interval: int = 50
    load: Path | None = None
    resume: bool = False
    override_schedule: bool = False
    log: Path | None = None
    log_interval: int = 10
    plot: Path | None = None
    cluster: str = "sim"
    device: str = "cpu"

    def to_plain(self) -> dict[str, Any]:
        """The same as numbers and texts, which travel between processes."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {n: str(v) if isinstance(v, Path) else v for n, v in values.items()}

    @staticmethod
    def from_plain(values: Mapping[str, Any]) -> Options:
        """The options that `to_plain` told."""
        paths = {n: Path(v) for n, v in values.items() if n in _PATHS and v is not None}
        return Options(**{**values, **paths})

    def layout(self) -> Layout:
        """How the ranks share the work. ValueError where sizes do not fit."""
        return Layout(
            tp=self.tp,
            cp=self.cp,
            pp=self.pp,
            dp=self.dp,
            vpp=self.vpp,
            ep=self.ep,
            etp=self.etp,
            sequence_parallel=self.sequence_parallel,
        )

    def model(self, *, vocabulary: int) -> ModelConfig:
        """The model. ValueError where sizes do not fit."""
        if self.heads < 1 or self.hidden % self.heads:
            raise ValueError(
                f"hidden: {self.hidden} does not divide by {self.heads} heads; give a multiple"
            )
        head_size, ffn = (
            self.hidden // self.heads,
            self._default_ffn() if self.ffn is None else self.ffn,
        )
        turned = self.rope_size if self.latent else head_size
        layer = LayerConfig(
            hidden=self.hidden,
            heads=self.heads,
            head_size=head_size,
            groups=self.groups,
            ffn=ffn,
            norm=NORMS[self.norm],
            bias=self.bias,
            activation=self.activation,
            experts=None if self.experts is None else self._experts(self.experts, ffn),
            latent=self._latent(head_size) if self.latent else None,
            qk_norm=self.qk_norm,
            sink=SOFTMAXES[self.softmax],
            layer_scaling=self.layer_scaling,
            rotary=RotaryEmbedding(dim=turned) if self.positions == "rope" else None,
            algorithm=CP_ALGORITHMS[self.cp_algorithm],
            hidden_dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            recompute=self.recompute,  # type: ignore[arg-type]
        )
        return ModelConfig(
            layer=layer,
            layers=self.layers,
            vocabulary=vocabulary,
            max_sequence=self.sequence,
            positions=POSITIONS[self.positions],  # type: ignore[arg-type]
            tied=self.tied,
            vocabulary_multiple=self.vocabulary_multiple,
            multi_token_layers=self.multi_token_layers,
            multi_token_scaling=self.multi_token_scaling,
        )

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return torch.float16 if self.fp16 else torch.bfloat16 if self.bf16 else torch.float32

    def schedule(self) -> Schedule:
        """Learning rates. ValueError where steps do not fit."""
        warmup = min(self.steps // 10, 10) if self.warmup is None else self.warmup
        return Schedule(
            style=self.decay_style,
            maximum=self.lr,
            minimum=self.min_lr,
            warmup_steps=warmup,
            decay_steps=self.steps if self.decay is None else self.decay,
        )

    def source(self) -> Path | None:
        """The folder to load from, None to begin anew."""
        return self.save if self.resume else self.load

    def check(self) -> None:
        """Find what is wrong before any rank begins. ValueError, in one line."""
        for name in ("steps", "save_interval", "log_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is below 1; give 1 or more")
        if self.resume and self.save is None:
            raise ValueError("resume: there is no --save to resume from; give the folder")
        if self.resume and self.load is not None:
            raise ValueError("resume: it loads from --save, and --load is given too; give one")
        if self.plot is not None and self.log is None:
            raise ValueError("plot: it is made from --log, which is not given; give a file")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not from 0 up to below 1")
        if self.init_std < 0:
            raise ValueError(f"init_std: {self.init_std} is negative")
        self._check_together()
        layout, config = self.layout(), self.model(vocabulary=1)
        for stage in range(layout.pp):
            for chunk in range(layout.vpp):
                layers_of(config, layout=layout, stage=stage, chunk=chunk)
        self.schedule()
        each = self.dp * self.microbatch_size
        if self.microbatch_size < 1 or self.global_batch_size < 1 or self.global_batch_size % each:
            raise ValueError(
                f"global_batch_size: {self.global_batch_size} does not divide by dp={self.dp}"
                f" ranks of micro_batch_size={self.microbatch_size}; give a multiple of {each}"
            )

    def _check_together(self) -> None:
        """Find options that need others, or exclude each other."""
        if self.experts is None and (self.ep > 1 or self.etp not in (None, self.tp)):
            raise ValueError(
                f"layout: ep={self.ep} etp={self.etp} split experts, of which there are none; give"
                " --num-experts"
            )
        if self.experts is None:
            self._check_unused("without --num-experts", *_OF_EXPERTS)
        else:
            Choice(top_k=self.top_k).check(self.experts)
        if not self.latent:
            self._check_unused("without --multi-latent-attention", *_OF_LATENTS)
        if not self.fp16:
            self._check_unused("without --fp16", "initial_loss_scale")
        if not self.multi_token_layers:
            self._check_unused("without --mtp-num-layers", "multi_token_scaling")
        if self.source() is None:
            self._check_unused("without --load or --resume", "override_schedule")
        for name in (*_COEFFICIENTS, "multi_token_scaling"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)} is no weight; give 0 or more")
        if (self.balance == "none") is not (self.balance_coefficient == 0):
            raise ValueError(
                f"balance_coefficient: {self.balance_coefficient} of balance={self.balance}; give"
                " one above 0 for a loss, and only for one:"
                f" {', '.join(name for name in BALANCES if name != 'none')}"
            )
        if self.bf16 and self.fp16:
            raise ValueError("fp16: --bf16 is given too; give one")
        if not 1 <= self.initial_loss_scale <= _LARGEST_SCALE:
            raise ValueError(
                f"initial_loss_scale: {self.initial_loss_scale} is not from 1 to 2**64"
            )

    def _check_unused(self, why: str, *names: str) -> None:
        """Refuse options that would do nothing."""
        defaults = {field.name: field.default for field in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name}: {getattr(self, name)} has no effect {why}")

    def _experts(self, number: int, ffn: int) -> ExpertsConfig:
        losses = Losses(
            level=BALANCES[self.balance], balance=self.balance_coefficient, z=self.z_coefficient
        )
        return ExpertsConfig(
            number=number,
            ffn=ffn,
            choice=Choice(top_k=self.top_k),
            dispatcher=DISPATCHERS[self.dispatcher],
            bias=self.bias,
            shared_ffn=self.shared_ffn,
            losses=losses,
        )

    def _latent(self, head_size: int) -> LatentSizes:
        return LatentSizes(
            kv_lora_rank=self.kv_lora_rank,
            rope_size=self.rope_size,
            value_size=head_size if self.value_size is None else self.value_size,
            q_lora_rank=self.q_lora_rank,
        )

    def _default_ffn(self) -> int:
        """Four times the hidden size; with a gate, about as many weights in three matrices."""
        if self.activation in ("swiglu", "geglu"):
            return -(-self.hidden * 8 // 3 // 16) * 16
        return 4 * self.hidden
