"""The command `python -m impl.pretrain`, its options spelled as here or as in Megatron-LM."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import click

from impl.mlp import ACTIVATIONS, GATES
from impl.optimizer.schedule import SCHEDULES
from impl.pipeline.schedules import KINDS
from impl.pretrain.options import (
    BALANCES,
    CP_ALGORITHMS,
    DISPATCHERS,
    NORMS,
    POSITIONS,
    SOFTMAXES,
    Options,
)
from impl.pretrain.ranks import (
    CLUSTERS,
    RanksFailed,
    first_to_fail,
    run_as_rank,
    run_on_cluster,
    started_by_torchrun,
)
from impl.pretrain.run import pretrain, pretrain_plain
from impl.transformer import RECOMPUTED

EXIT_FAILED, EXIT_USAGE = 1, 2
_DEFAULTS = {field.name: field.default for field in fields(Options)}
_PATH = click.Path(path_type=Path)


def _one_of(names: Iterable[str]) -> click.Choice[str]:
    return click.Choice(sorted(names))


# Field, spellings, type ("flag" for a switch), help.
_TABLE: tuple[tuple[str, str, Any, str], ...] = (
    ("tp", "--tp --tensor-model-parallel-size", int, "Tensor-parallel ranks."),
    ("cp", "--cp --context-parallel-size", int, "Context-parallel ranks."),
    ("pp", "--pp --pipeline-model-parallel-size", int, "Pipeline stages."),
    ("dp", "--dp --data-parallel-size", int, "Replicas; under torchrun those its world leaves."),
    ("vpp", "--vpp --num-virtual-stages-per-pipeline-rank", int, "Chunks of a stage."),
    ("ep", "--ep --expert-model-parallel-size", int, "Expert-parallel ranks."),
    ("etp", "--etp --expert-tensor-parallel-size", int, "Of an expert. Default: as --tp."),
    ("sequence_parallel", "--sequence-parallel --sp", "flag", "Split what is between layers."),
    ("pipeline", "--pipeline-schedule", _one_of(KINDS), "Default: 1f1b, or interleaved."),
    ("cp_algorithm", "--cp-algorithm --cp-comm-type", _one_of(CP_ALGORITHMS), "Of attention."),
    ("layers", "--layers --num-layers", int, "Layers."),
    ("hidden", "--hidden --hidden-size", int, "Features of a hidden state."),
    ("heads", "--heads --num-attention-heads", int, "Heads."),
    ("groups", "--groups --num-query-groups", int, "Heads of keys. Default: as --heads."),
    ("ffn", "--ffn --ffn-hidden-size", int, "Default: as many weights as 4 times --hidden."),
    ("sequence", "--sequence --seq-length", int, "Tokens of a sample."),
    ("activation", "--activation", _one_of((*ACTIVATIONS, *GATES)), "Of the perceptron."),
    ("norm", "--normalization", _one_of(NORMS), "Norms."),
    ("positions", "--position-embedding-type", _one_of(POSITIONS), "How positions are told."),
    ("tied", "--untie-embeddings-and-output-weights", "no", "Logits have weights of their own."),
    ("bias", "--bias", "flag", "Linear layers add one."),
    ("dropout", "--dropout --hidden-dropout", float, "Of hidden states."),
    ("attention_dropout", "--attention-dropout", float, "Of shares of attention."),
    ("qk_norm", "--qk-norm --qk-layernorm", "flag", "Normalise queries and keys, or latents."),
    ("softmax", "--softmax-type", _one_of(SOFTMAXES), "learnable: with a sink for each head."),
    (
        "layer_scaling",
        "--layer-scaling --apply-query-key-layer-scaling",
        "flag",
        "Divide scores by the layer's number before the softmax, and multiply them in it.",
    ),
    (
        "latent",
        "--latent --multi-latent-attention",
        "flag",
        "Queries, keys and values from latents.",
    ),
    ("kv_lora_rank", "--kv-lora-rank", int, "The latent of keys and values."),
    ("q_lora_rank", "--q-lora-rank", int, "The latent of queries. Default: none."),
    ("rope_size", "--qk-pos-emb-head-dim", int, "Features of its heads that have positions."),
    ("value_size", "--v-head-dim", int, "Of its values. Default: as a head's."),
    ("experts", "--experts --num-experts", int, "Experts of a layer. Default: none."),
    ("top_k", "--top-k --moe-router-topk", int, "Experts of a token."),
    (
        "shared_ffn",
        "--shared-ffn --moe-shared-expert-intermediate-size",
        int,
        "Features of an expert that all tokens have. Default: none.",
    ),
    (
        "dispatcher",
        "--dispatcher --moe-token-dispatcher-type",
        _one_of(DISPATCHERS),
        "How tokens travel to experts.",
    ),
    (
        "balance",
        "--balance --moe-router-load-balancing-type",
        _one_of(BALANCES),
        "A loss of unequal loads: of microbatches, sequences, or those of all replicas at once.",
    ),
    ("balance_coefficient", "--balance-coefficient --moe-aux-loss-coeff", float, "Its weight."),
    ("z_coefficient", "--z-coefficient --moe-z-loss-coeff", float, "That of routers' z-loss."),
    (
        "multi_token_layers",
        "--multi-token-layers --mtp-num-layers",
        int,
        "Modules that predict tokens further on.",
    ),
    (
        "multi_token_scaling",
        "--multi-token-scaling --mtp-loss-scaling-factor",
        float,
        "Weight of the mean of their losses.",
    ),
    ("recompute", "--recompute --recompute-granularity", _one_of(RECOMPUTED), "In backward."),
    ("init_std", "--init-method-std", float, "Standard deviation of initial weights."),
    ("vocabulary_multiple", "--make-vocab-size-divisible-by", int, "Of each rank's rows."),
    ("steps", "--steps --train-iters", int, "Steps of the whole run."),
    ("global_batch_size", "--batch --global-batch-size", int, "Samples of a step."),
    ("microbatch_size", "--micro-batch --micro-batch-size", int, "Samples of a microbatch."),
    ("lr", "--lr", float, "Largest learning rate."),
    ("min_lr", "--min-lr", float, "Last learning rate."),
    (
        "warmup",
        "--warmup --lr-warmup-iters",
        int,
        "Steps until the largest. Default: a tenth, at most 10.",
    ),
    ("decay", "--decay --lr-decay-iters", int, "Steps until the last. Default: as --steps."),
    ("decay_style", "--decay-style --lr-decay-style", _one_of(SCHEDULES), "How it falls."),
    ("weight_decay", "--weight-decay", float, "Of matrices."),
    ("clip", "--clip --clip-grad", float, "Largest gradient norm; 0 for any."),
    ("beta1", "--adam-beta1", float, "Of AdamW."),
    ("beta2", "--adam-beta2", float, "Of AdamW."),
    ("bf16", "--bf16", "flag", "Compute in bfloat16, with main weights in float32."),
    ("fp16", "--fp16", "flag", "Compute in float16, with a dynamic scale of the loss."),
    ("initial_loss_scale", "--initial-loss-scale", float, "The first one, with --fp16."),
    (
        "distributed_optimizer",
        "--distributed-optimizer --use-distributed-optimizer",
        "flag",
        "Share out the optimizer's states over replicas.",
    ),
    ("overlap", "--overlap-grad-reduce", "flag", "Reduce gradients while backward goes on."),
    ("bucket", "--bucket --ddp-bucket-size", int, "Elements of a bucket. Default: all in one."),
    ("seed", "--seed", int, "Of initial weights, samples and dropout."),
    ("data", "--data --data-path", _PATH, "A text in UTF-8. Default: Shakespeare's Sonnets."),
    ("cache", "--data-cache-path", _PATH, "Folder of files of tokens."),
    ("save", "--save", _PATH, "Folder for checkpoints."),
    ("save_interval", "--save-interval", int, "Steps from one to the next."),
    ("load", "--load", _PATH, "Begin with a checkpoint, of any layout, or the newest in a folder."),
    ("resume", "--resume", "flag", "Begin with the newest checkpoint in --save."),
    (
        "override_schedule",
        "--override-opt_param-scheduler --override-schedule",
        "flag",
        "Learning rates are these options', not the checkpoint's.",
    ),
    ("log", "--log", _PATH, "File for a JSON line of each step."),
    ("log_interval", "--log-interval", int, "Steps from one line on the screen to the next."),
    ("plot", "--plot", _PATH, "File for a picture (SVG) of losses and gradient norms."),
    ("cluster", "--cluster", _one_of(CLUSTERS), "What runs the ranks, unless torchrun does."),
    ("device", "--device", _one_of(("cpu", "cuda")), "Where tensors are."),
)


def _option(field: str, spellings: str, kind: Any, help: str) -> click.Option:
    default = None if field == "dp" else _DEFAULTS[field]
    if kind in ("flag", "no"):
        return click.Option(
            [*spellings.split(), field],
            is_flag=True,
            flag_value=kind == "flag",
            default=default,
            help=help,
        )
    shown = default is not None and field != "data"
    return click.Option(
        [*spellings.split(), field], type=kind, default=default, show_default=shown, help=help
    )


def _train(debug: bool, **given: Any) -> None:
    """Train a GPT on real text, at any layout.

    Under torchrun its ranks are used; otherwise all ranks run here, in the cluster `sim` one after
    the other. A checkpoint can be loaded at any other layout. Exits with 2 if the command is wrong.

    \b
        python -m impl.pretrain --steps 100 --log one.jsonl
        python -m impl.pretrain --tp 2 --cp 2 --pp 2 --steps 100 --decay 200 --save run
        torchrun --nproc-per-node 8 -m impl.pretrain --tp 4 --sp --steps 200 --save run --resume
    """
    if given["dp"] is None:
        model = max(given["tp"] * given["cp"] * given["pp"], 1)
        ranks = int(os.environ["WORLD_SIZE"]) if started_by_torchrun() else model
        given["dp"] = max(ranks // model, 1)
    options = Options(**given)
    options.check()
    where: dict[str, Any] = {
        "world_size": options.layout().world_size,
        "device": options.device,
    }
    if started_by_torchrun():
        run_as_rank(pretrain, options, **where)
    else:
        run_on_cluster(options.cluster, pretrain_plain, options.to_plain(), **where)


command = click.Command(
    "pretrain",
    callback=_train,
    help=_train.__doc__,
    params=[
        *(_option(*row) for row in _TABLE),
        click.Option(["--debug"], is_flag=True, help="Show tracebacks."),
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit. An error is one line on stderr, with --debug a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command.main(given, prog_name="python -m impl.pretrain", standalone_mode=False)
        sys.exit(0)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _stop(given, error, EXIT_USAGE, _told(error.format_message()))
    except ValueError as error:
        _stop(given, error, EXIT_USAGE, _told(str(error)))
    except RanksFailed as error:
        code = EXIT_USAGE if error.usage else EXIT_FAILED
        _stop(given, error, code, str(error) if error.told else "")
    except (KeyboardInterrupt, click.Abort) as error:
        _stop(given, error, EXIT_FAILED, _told("interrupted; what was saved can be resumed"))


def _told(text: str) -> str:
    """The text, or nothing where another rank has told what went wrong."""
    return text if first_to_fail() else ""


def _stop(given: list[str], error: BaseException, code: int, said: str) -> NoReturn:
    if "--debug" in given:
        raise error
    if said:
        click.echo(f"pretrain: error: {' '.join(said.split())}", err=True)
    sys.exit(code)
