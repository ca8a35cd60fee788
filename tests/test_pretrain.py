import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest

from impl.groups import build_groups
from impl.pretrain.command import command, main
from impl.pretrain.options import Options
from impl.pretrain.plot import main as plot
from impl.pretrain.records import Record, read_log
from impl.pretrain.run import build, pretrain
from verify.cluster import open_cluster

SMALL = ["--layers", "2", "--hidden", "16", "--heads", "2", "--seq-length", "16", "--batch", "4"]
TINY = Options(
    layers=2,
    hidden=16,
    heads=2,
    sequence=16,
    global_batch_size=4,
    steps=6,
    save_interval=3,
    vocabulary_multiple=1,
)


@pytest.fixture(scope="module")
def cluster():
    with open_cluster("sim", world_size=8) as opened:
        yield opened


@pytest.fixture
def options(tmp_path) -> Options:
    return replace(TINY, cache=tmp_path / "cache", save=tmp_path / "run")


def _run(cluster, options: Options) -> list[Record]:
    return cluster.run(pretrain, options, world_size=options.layout().world_size)[0]


def _losses(records: list[Record]) -> list[float]:
    return [record.loss for record in records]


def _command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


def test_a_resumed_run_goes_on_to_the_bit_at_the_same_layout(cluster, options):
    begun = replace(options, tp=2, pp=2, dropout=0.25, distributed_optimizer=True)
    whole = _run(cluster, begun)
    resumed = _run(cluster, replace(begun, save=None, load=options.save / "step-00000003"))
    assert [record.step for record in resumed] == [4, 5, 6]
    for one, other in zip(whole[3:], resumed, strict=True):
        assert replace(one, seconds=0.0) == replace(other, seconds=0.0)


def test_a_resumed_run_goes_on_at_another_layout(cluster, options):
    """The same to rounding: no further apart than a few times what the order of sums changes."""
    begun = replace(options, steps=3, decay=6, tp=2, cp=2, pp=2, sequence_parallel=True)
    first = _run(cluster, begun)
    rest = _run(cluster, replace(options, decay=6, dp=2, distributed_optimizer=True, resume=True))
    alone = [
        _losses(_run(cluster, replace(options, decay=6, save=None, microbatch_size=size)))
        for size in (1, 2, 4)
    ]
    spread = max(max(each) - min(each) for each in zip(*alone, strict=True))
    for found, expected in zip(_losses(first + rest), alone[0], strict=True):
        assert abs(found - expected) <= 10 * spread
    assert spread < alone[0][0] - alone[0][-1]
    assert [record.consumed for record in rest] == [16, 20, 24]


def test_the_loss_falls_and_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log, picture = tmp_path / "logs" / "run.jsonl", tmp_path / "loss.svg"
    files = ["--log", str(log), "--plot", str(picture)]
    assert _command(*SMALL, "--steps", "30", "--dp", "2", *files) == 0
    said = capsys.readouterr().out
    assert "step 30/30  loss" in said
    records = read_log(log)
    assert [record.step for record in records] == list(range(1, 31))
    assert records[-1].loss < records[0].loss - 1
    assert all(record.grad_norm > 0 and record.tokens == 64 for record in records)
    assert set(json.loads(log.read_text().splitlines()[0])) == {*Record.__dataclass_fields__}
    lines = ElementTree.parse(picture).getroot().findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [30, 30]


def test_a_resumed_log_has_every_step_once(cluster, options, tmp_path):
    log = tmp_path / "run.jsonl"
    _run(cluster, replace(options, log=log))
    # Killed after step 5, the last line half written.
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:5]) + lines[5][:9])
    (options.save / "latest").write_text("step-00000003\n")
    _run(cluster, replace(options, log=log, resume=True))
    found = read_log(log)
    assert [record.step for record in found] == [1, 2, 3, 4, 5, 6]
    assert [record.loss for record in found] == [json.loads(line)["loss"] for line in lines]


def test_runs_are_drawn_into_one_picture(tmp_path):
    for name in ("one", "two"):
        lines = [json.dumps({**LINE, "step": i, "loss": 5.0 - i}) for i in range(4)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    runs = [f"one rank={tmp_path / 'one'}", f"tp2 <&>={tmp_path / 'two'}"]
    plot.main([*runs, "-o", str(tmp_path / "both.svg")], standalone_mode=False)
    root = ElementTree.parse(tmp_path / "both.svg").getroot()
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"one rank", "tp2 <&>", "loss", "gradient norm"} <= set(texts)


def test_megatrons_spellings_are_the_same_options():
    pairs = {
        "--tp 2": "--tensor-model-parallel-size 2",
        "--cp 2": "--context-parallel-size 2",
        "--pp 2": "--pipeline-model-parallel-size 2",
        "--ep 2": "--expert-model-parallel-size 2",
        "--sp": "--sequence-parallel",
        "--layers 6": "--num-layers 6",
        "--hidden 8": "--hidden-size 8",
        "--heads 8": "--num-attention-heads 8",
        "--sequence 32": "--seq-length 32",
        "--batch 16": "--global-batch-size 16",
        "--micro-batch 4": "--micro-batch-size 4",
        "--steps 9": "--train-iters 9",
        "--warmup 3": "--lr-warmup-iters 3",
        "--clip 0.5": "--clip-grad 0.5",
        "--distributed-optimizer": "--use-distributed-optimizer",
        "--latent": "--multi-latent-attention",
        "--qk-norm": "--qk-layernorm",
        "--balance seq_aux_loss": "--moe-router-load-balancing-type seq_aux_loss",
        "--balance-coefficient 0.1": "--moe-aux-loss-coeff 0.1",
        "--z-coefficient 0.1": "--moe-z-loss-coeff 0.1",
        "--dispatcher allgather": "--moe-token-dispatcher-type allgather",
        "--shared-ffn 8": "--moe-shared-expert-intermediate-size 8",
        "--layer-scaling": "--apply-query-key-layer-scaling",
    }
    for ours, theirs in pairs.items():
        parsed = [command.make_context("x", text.split()).params for text in (ours, theirs)]
        assert parsed[0] == parsed[1] != command.make_context("x", []).params


REFUSED = {
    "--tp 3": "heads: 2 does not divide",
    "--tp 0": "layout.tp: 0 is not a size",
    "--pp 3": "layers: 2 do not divide by 3 stages",
    "--vpp 2": "layout.vpp",
    "--dp 3": "global_batch_size: 4 does not divide by dp=3",
    "--cp 3": "sequence: 16 does not divide into the 6 chunks",
    "--lr fast": "'fast' is not a valid float",
    "--hiden 4": "No such option",
    "--steps 0": "steps: 0 is below 1",
    "--resume": "no --save to resume from",
    "--resume --save none": "none has neither latest nor metadata.json",
    "--load .": "neither latest nor metadata.json",
    "--data none.txt": "none.txt: No such file",
    "--seq-length 200000": "give a longer text or shorter samples",
    "--plot x.svg": "it is made from --log",
    "--log . --steps 1": "log: .",
    "--lr 0.1 --min-lr 0.2": "minimum: 0.2",
    "--lr-decay-style wave": "'wave' is not one of",
    "--moe-z-loss-coeff 0.1": "z_coefficient: 0.1 has no effect without --num-experts",
    "--experts 2 --top-k 3": "top_k: 3 is not from 1 to the 2 experts",
    "--mtp-loss-scaling-factor 0.5": "multi_token_scaling: 0.5 has no effect without --mtp",
    "--mtp-num-layers 1 --mtp-loss-scaling-factor nan": "multi_token_scaling: nan is no weight",
    "--override-schedule": "override_schedule: True has no effect without --load or --resume",
    "--top-k 1": "top_k: 1 has no effect without --num-experts",
    "--dispatcher allgather": "dispatcher: allgather has no effect without --num-experts",
    "--experts 2 --balance-coefficient 0.1": "balance_coefficient: 0.1 of balance=none",
    "--experts 2 --balance aux_loss": "balance_coefficient: 0.0 of balance=aux_loss",
    "--experts 2 --z-coefficient nan": "z_coefficient: nan is no weight",
    "--experts 2 --balance aux_loss --balance-coefficient -1": "balance_coefficient: -1.0 is no",
    "--v-head-dim 4": "value_size: 4 has no effect without --multi-latent-attention",
    "--latent --groups 1": "groups: 1 of 2 heads",
    "--latent --kv-lora-rank 0": "kv_lora_rank: 0 is no size",
    "--fp16 --bf16": "fp16: --bf16 is given too",
    "--initial-loss-scale 4": "has no effect without --fp16",
    "--fp16 --initial-loss-scale 0": "initial_loss_scale: 0.0 is not from 1 to 2**64",
    "--fp16 --initial-loss-scale inf": "initial_loss_scale: inf is not from 1",
}


LINE = {
    "step": 1,
    "loss": 1.5,
    "grad_norm": 1.0,
    "lr": 0.1,
    "tokens": 8,
    "consumed": 4,
    "seconds": 0.1,
}
NO_STEPS = {
    "no JSON": "loss 1.5",
    "no step of a run, which has step, loss": json.dumps([1, 1.5]),
    "which has step, loss, grad_norm, lr, tokens": json.dumps({"step": 1}),
    "loss='1.5', no number": json.dumps({**LINE, "loss": "1.5"}),
    "loss=None, no number": json.dumps({**LINE, "loss": None}),
    "step=1.5, no whole number": json.dumps({**LINE, "step": 1.5}),
    "tokens=True, no whole number": json.dumps({**LINE, "tokens": True}),
    "no whole number up to": json.dumps({**LINE, "step": 10**400}),
    "skipped=0, no true or false": json.dumps({**LINE, "skipped": 0}),
    "further=['x'], no list of numbers": json.dumps({**LINE, "further": ["x"]}),
    "a value of 1e+301; it shows up to 1e+300": json.dumps({**LINE, "loss": 1e301}),
}


@pytest.mark.parametrize("words", NO_STEPS)
def test_a_file_that_is_no_log_is_refused_in_one_line(words, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(NO_STEPS[words] + "\n")
    with pytest.raises(click.UsageError) as caught:
        plot.main([f"run={path}", "-o", str(tmp_path / "x.svg")], standalone_mode=False)
    assert words in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("loss", [0.0, -5.0, 1e18, 1e-30, 1e299, math.nan, math.inf])
def test_any_loss_can_be_drawn(loss, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps({**LINE, "loss": loss}) + "\n")
    plot.main([f"run={path}", "-o", str(tmp_path / "x.svg")], standalone_mode=False)
    assert "nan" not in (tmp_path / "x.svg").read_text()


KINDS = {
    "experts that are balanced": {
        "experts": 4,
        "shared_ffn": 8,
        "balance": "global_aux_loss",
        "balance_coefficient": 0.1,
        "z_coefficient": 0.01,
        "multi_token_layers": 2,
    },
    "experts that are balanced by sequences": {
        "experts": 4,
        "balance": "seq_aux_loss",
        "balance_coefficient": 1.0,
        "dispatcher": "allgather",
    },
    "experts that are balanced by microbatches": {
        "experts": 4,
        "balance": "aux_loss",
        "balance_coefficient": 1.0,
    },
    "latent attention": {
        "latent": True,
        "q_lora_rank": 8,
        "kv_lora_rank": 6,
        "rope_size": 4,
        "qk_norm": True,
        "softmax": "learnable",
        "layer_scaling": True,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_all_kinds_are_trained_alike_at_any_layout(kind, cluster, options):
    given: dict = {**KINDS[kind], "layers": 4, "save": None, "lr": 0.1}
    alone = _run(cluster, replace(options, **given))
    spread = _run(cluster, replace(options, **given, tp=2, cp=2, pp=2, sequence_parallel=True))
    if given.get("balance") != "global_aux_loss":
        spread += _run(cluster, replace(options, **given, dp=2, cp=2, pp=2))
        alone += alone
    for one, many in zip(alone, spread, strict=True):
        assert [many.loss, *many.further] == pytest.approx([one.loss, *one.further], rel=1e-4)
        assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-3)
        assert len(one.further) == given.get("multi_token_layers", 0)
    plain = _run(cluster, replace(options, layers=4, save=None, lr=0.1))
    for one, other in zip(alone, plain, strict=False):
        assert one.loss != pytest.approx(other.loss, rel=1e-4)


def test_a_balanced_router_is_trained_otherwise(cluster, options):
    losses: list[dict] = [{}, {"balance": "seq_aux_loss", "balance_coefficient": 1.0}]
    found = [_run(cluster, replace(options, experts=4, save=None, **given)) for given in losses]
    assert found[0][0].loss == found[1][0].loss
    assert found[0][0].grad_norm != pytest.approx(found[1][0].grad_norm, rel=1e-3)


def test_float16_skips_steps_until_the_scale_fits(cluster, options):
    given: dict = {"fp16": True, "initial_loss_scale": 2.0**34, "steps": 40, "save": None}
    records = _run(cluster, replace(options, **given, dp=2, pp=2))
    assert all(record.skipped for record in records[:4])
    assert [record.lr for record in records[:5]] == [0.0] * 5
    trained = [record for record in records if not record.skipped]
    assert len(trained) > 10
    assert trained[-1].loss < trained[0].loss - 0.3
    assert all(record.grad_norm > 0 for record in trained)


def test_a_skipped_step_has_no_norm_to_draw(tmp_path):
    path = tmp_path / "run.jsonl"
    lines = [{**LINE, "step": i, "skipped": i == 1, "grad_norm": float(i != 1)} for i in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot.main([f"run={path}", "-o", str(tmp_path / "x.svg")], standalone_mode=False)
    root = ElementTree.parse(tmp_path / "x.svg").getroot()
    drawn = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(each.attrib["points"].split()) for each in drawn] == [3, 2]


def factors(options: Options) -> dict[str, float]:
    """Rank program: by how much each parameter decays."""
    trainer = build(options, build_groups(options.layout())).trainer
    found = {
        id(parameter): group.weight_decay_multiplier
        for group in trainer.optimizer.parameter_groups
        for parameter in group.parameters
    }
    return {name: found[id(each)] for name, each in trainer.chunks.named_parameters()}


def test_experts_have_biases_too_which_do_not_decay(cluster, options):
    given = replace(options, experts=2, bias=True, ffn=8)
    (found,) = cluster.run(factors, given, world_size=1)
    vectors = {name for name in found if name.endswith("bias") or "norm" in name}
    assert any(name.endswith("experts.fc1.bias") for name in vectors)
    assert {name for name, factor in found.items() if factor == 0.0} == vectors


ONE_RANK_FAILS = """\
import torch.distributed as dist
import impl.pretrain.command as command

def program(options):
    if dist.get_rank() == 1:
        raise ValueError("checkpoint: its disk is gone")
    dist.barrier()

command.pretrain = program
command.main()
"""


def test_an_error_under_torchrun_is_told_by_the_rank_that_failed_first(tmp_path):
    """Rank 0 waits for rank 1, which fails, and fails because of that."""
    script, logs = tmp_path / "one_rank_fails.py", tmp_path / "logs"
    script.write_text(ONE_RANK_FAILS)
    arguments = ["--nproc-per-node", "2", "--log-dir", logs, "--redirects", "3", script]
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments, "--dp", "2"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=120,
    )
    assert ended.returncode == 1
    said = {path.parent.name: path.read_text() for path in logs.rglob("stderr.log")}
    assert set(said) == {"0", "1"}
    assert "pretrain: error: checkpoint: its disk is gone\n" in said["1"]
    assert "pretrain: error" not in said["0"]


@pytest.mark.parametrize("arguments", REFUSED)
def test_bad_input_is_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert _command(*SMALL, *arguments.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("pretrain: error: ")
    assert said.count("\n") == 1
    assert REFUSED[arguments] in said


def test_a_run_that_is_killed_can_be_resumed(tmp_path):
    def start(*more: str) -> subprocess.Popen:
        arguments = [*SMALL, "--save", "run", "--save-interval", "1", "--steps", "500", *more]
        return subprocess.Popen(
            [sys.executable, "-m", "impl.pretrain", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=subprocess.PIPE,
            text=True,
        )

    def kill_after(process: subprocess.Popen, saves: int) -> int:
        assert process.stdout is not None
        saved = 0
        for line in process.stdout:
            saved += line.startswith("saved")
            if saved == saves:
                break
        time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        return int((tmp_path / "run" / "latest").read_text().split("-")[1])

    reached = kill_after(start(), saves=2)
    assert reached >= 2
    assert kill_after(start("--resume", "--log", "log.jsonl"), saves=1) > reached
    assert read_log(tmp_path / "log.jsonl")[0].step == reached + 1
