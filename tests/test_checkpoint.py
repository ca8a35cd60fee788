import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from checkpoint_programs import Setting, load, save, streams

from impl.checkpoint import folder as folders
from impl.checkpoint import storage
from impl.checkpoint.folder import LATEST, METADATA
from impl.checkpoint.pieces import Box, overlap, run_of
from verify.cluster import Cluster, RankFailures, open_cluster
from verify.layout import Layout

ONE, TWO, STAGES = Layout(), Layout(tp=2), Layout(pp=2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with open_cluster("sim", world_size=4) as opened:
        yield opened


@pytest.fixture(scope="module")
def checkpoint(cluster: Cluster, tmp_path_factory) -> Path:
    """A folder with a checkpoint, which no test changes."""
    folder = tmp_path_factory.mktemp("saved")
    _save(cluster, Setting(TWO), folder, steps=3)
    return folder


def _save(cluster, setting: Setting, folder: Path, steps: int = 1) -> list:
    return cluster.run(save, setting, str(folder), steps, world_size=setting.layout.world_size)


def _load(cluster, setting: Setting, folder: Path, override: bool = False) -> list:
    size = setting.layout.world_size
    return cluster.run(load, setting, str(folder), override, world_size=size)


def _refusal(cluster, setting: Setting, folder: Path) -> str:
    """The one line that every rank says."""
    with pytest.raises(RankFailures) as caught:
        _load(cluster, setting, folder)
    failures = caught.value.failures
    assert len(failures) == setting.layout.world_size
    assert {each.kind.rpartition(".")[2] for each in failures} == {"CheckpointError"}
    (text,) = {each.message for each in failures}
    assert "\n" not in text
    return text


def test_runs_of_a_flat_tensor_are_boxes_in_order():
    for shape in ((), (5,), (2, 3), (3, 1, 2), (2, 2, 2, 2)):
        places = torch.arange(math.prod(shape)).view(shape)
        for start, stop in product(range(places.numel() + 1), repeat=2):
            found = [_cut(places, box) for box in run_of(shape, start, stop)]
            assert len(found) <= max(2 * len(shape) - 1, 1)
            assert [i for part in found for i in part] == list(range(start, stop))


def _cut(places: torch.Tensor, box: Box) -> list[int]:
    for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        places = places.narrow(dim, offset, size)
    return places.reshape(-1).tolist()


def test_boxes_overlap_where_all_their_sides_do():
    assert overlap(Box((0, 2), (2, 2)), Box((1, 0), (3, 3))) == Box((1, 2), (1, 1))
    assert overlap(Box((0, 2), (2, 2)), Box((2, 0), (3, 3))) is None
    assert overlap(Box((), ()), Box((), ())) == Box((), ())


@pytest.mark.parametrize("layout", [ONE, STAGES, Layout(dp=4), Layout(tp=2, pp=2)], ids=str)
def test_a_checkpoint_is_loaded_by_a_world_of_another_size(cluster, checkpoint, layout):
    """Bit for bit: what one rank has was made by it too, and another layout has parts of that."""
    setting = Setting(layout, seed=2, distributed=layout.dp > 1)
    found = _load(cluster, setting, checkpoint)
    assert [steps for steps, _ in found] == [3] * layout.world_size
    ((_, whole),) = _load(cluster, Setting(ONE, seed=1), checkpoint)
    for _, have in found:
        for name, values in have.items():
            original = name.replace("output.weight", "embedding.tokens.weight")
            if original.endswith("tokens.weight"):
                # The last row may be padding.
                values = values.view(-1, setting.hidden)[:-1]
            assert torch.isin(values, whole[original]).all(), name


def test_padding_is_in_no_checkpoint(checkpoint):
    content = _content(checkpoint / "step-00000003")
    assert content["tensors"]["model.embedding.tokens.weight"]["size"] == [7, 4]
    # Nothing but JSON and safetensors: nothing that has to be unpickled.
    suffixes = {path.suffix for path in (checkpoint / "step-00000003").iterdir()}
    assert suffixes == {".json", ".safetensors"}


def test_random_streams_go_on_or_are_seeded_anew(cluster, tmp_path):
    same = cluster.run(streams, Setting(TWO), Setting(TWO, seed=9), str(tmp_path), world_size=2)
    for saved, loaded, _ in same:
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    folder = str(tmp_path / "other")
    split = Setting(STAGES, seed=1)
    found = cluster.run(streams, Setting(TWO, seed=1), split, folder, world_size=2)
    used = [s for saved, _, first in found for s in (*saved.values(), *first.values())]
    for _, loaded, _ in found:
        for state in loaded.values():
            assert not any(torch.equal(state, each) for each in used)
    # Of tp alone another size: what is replicated over tp goes on.
    found = cluster.run(
        streams, Setting(TWO), Setting(Layout(dp=2)), str(tmp_path / "third"), world_size=2
    )
    for saved, loaded, _ in found:
        assert torch.equal(loaded["default"], saved["default"])
        assert not torch.equal(loaded["tensor-parallel"], saved["tensor-parallel"])


class _Killed(BaseException):
    pass


def _steps_of_a_save(monkeypatch, at: int) -> list[str]:
    """Have the process die at a step of a save, counted from 0; the steps that were made."""
    made: list[str] = []

    def dying(name, work):
        def call(*args, **kwargs):
            if len(made) == at:
                raise _Killed
            made.append(name)
            return work(*args, **kwargs)

        return call

    monkeypatch.setattr(folders, "synchronise", dying("synchronise", folders.synchronise))
    monkeypatch.setattr(Path, "rename", dying("rename", Path.rename))
    monkeypatch.setattr(Path, "replace", dying("replace", Path.replace))
    monkeypatch.setattr(Path, "write_text", dying("write", Path.write_text))
    return made


def test_a_save_that_is_killed_leaves_the_one_before(cluster, tmp_path, monkeypatch):
    before, after = Setting(ONE, seed=1), Setting(ONE, seed=2)
    _, (_, first) = 0, _save(cluster, before, tmp_path, steps=1)[0]
    (tmp_path / "whole").mkdir()
    with monkeypatch.context() as patched:
        whole = _steps_of_a_save(patched, at=99)
        _, second = _save(cluster, after, tmp_path / "whole", steps=2)[0]
    assert {"write", "synchronise", "rename", "replace"} <= set(whole)
    for at in range(len(whole)):
        folder = tmp_path / f"killed-{at}"
        shutil.copytree(tmp_path, folder, ignore=shutil.ignore_patterns("whole", "killed-*"))
        with monkeypatch.context() as patched:
            _steps_of_a_save(patched, at=at)
            with pytest.raises(RankFailures, match="_Killed"):
                _save(cluster, after, folder, steps=2)
        ((steps, found),) = _load(cluster, Setting(ONE, seed=3), folder)
        expected = {1: first, 2: second}[steps]
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        _save(cluster, after, folder, steps=3)
        assert not [path for path in folder.glob(".*.partial") if path.is_dir()]
        assert _load(cluster, before, folder)[0][0] == 3


def test_the_same_step_can_be_saved_again(cluster, tmp_path):
    for seed in (1, 2):
        _, expected = _save(cluster, Setting(ONE, seed=seed), tmp_path)[0]
    ((_, found),) = _load(cluster, Setting(ONE, seed=3), tmp_path)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (tmp_path / LATEST).read_text() == "step-00000001-again\n"
    older = _load(cluster, Setting(ONE, seed=3), tmp_path / "step-00000001")
    assert not torch.equal(older[0][1]["layers.0.mlp.fc1.weight"], found["layers.0.mlp.fc1.weight"])


def test_a_folder_is_made_with_those_above_it(cluster, tmp_path):
    folder = tmp_path / "runs" / "one"
    ((_, expected),) = _save(cluster, Setting(ONE), folder)
    ((_, found),) = _load(cluster, Setting(ONE, seed=3), folder)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_folder_that_cannot_be_written_is_one_line_on_every_rank(cluster, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RankFailures) as caught:
        _save(cluster, Setting(TWO), tmp_path / "file")
    assert len(caught.value.failures) == 2
    (text,) = {each.message for each in caught.value.failures}
    assert re.fullmatch(r"checkpoint: .*file: (File exists|Not a directory)", text)


OTHERS = {
    "layers": (Setting(layers=1), "it has .*layers.1.*, one of 36 that this model"),
    "more layers": (Setting(layers=3), "it has no .*layers.2.*, which this model"),
    "hidden": (Setting(hidden=6), r"is \[.*4.*\] float32 in it and \[.*6.*\] float32 here"),
    "heads": (Setting(heads=1), "its model has head_size=2 and this run's 4"),
    "scale": (Setting(scale=0.25), "its model has scale=None and this run's 0.25"),
    "alibi": (Setting(alibi=True), "its model has alibi=False and this run's True"),
    "layer scaling": (Setting(layer_scaling=True), "its model has layer_scaling=False and"),
    "sink": (Setting(sink=True), "it has no .*core.sink, which this model"),
    "tied": (Setting(tied=False), "it has no .*output.weight"),
    "optimizer": (Setting(adam=False), "it has no optimizer.momentum"),
    "dtype": (Setting(bf16=True), "float32 in it and .* bfloat16 here"),
    "schedule": (Setting(lr=0.25), "its schedule has maximum=0.5 and this run's 0.25"),
    "samples": (Setting(order="b"), "its order of samples has data=a and this run's b"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused(cluster, checkpoint, name):
    setting, words = OTHERS[name]
    text = _refusal(cluster, setting, checkpoint)
    assert text.startswith("checkpoint: ")
    assert re.search(words, text), text


def test_a_schedule_can_be_overridden(cluster, checkpoint):
    assert _load(cluster, Setting(lr=0.25), checkpoint, override=True)[0][0] == 3


def _content(path: Path) -> dict:
    return json.loads((path / METADATA).read_text())["content"]


def _largest(path: Path) -> Path:
    return max(path.glob("*.safetensors"), key=lambda each: each.stat().st_size)


def _flip(path: Path) -> None:
    """One bit of the first number behind the header, which is of the model or the optimizer."""
    octets = bytearray(path.read_bytes())
    octets[8 + int.from_bytes(octets[:8], "little")] ^= 1
    path.write_bytes(octets)


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def _rewrite(path: Path, change: Callable[[dict], object]) -> None:
    """Metadata that says something else, with a checksum that is right."""
    document = json.loads((path / METADATA).read_text())
    document["content"] = change(document["content"]) or document["content"]
    text = json.dumps(document["content"], sort_keys=True, separators=(",", ":"))
    (path / METADATA).write_text(json.dumps(document | {"crc32": zlib.crc32(text.encode())}))


def _chunks(content: dict) -> list:
    return content["tensors"]["model.embedding.tokens.weight"]["chunks"]


def _elsewhere(content: dict) -> None:
    chunk = _chunks(content)[0]
    chunk[2] = f"../{chunk[2]}"


DAMAGES = {
    "a part that is left out": (
        lambda p: _rewrite(p, lambda content: _chunks(content).pop() and None),
        "is incomplete in it",
    ),
    "files elsewhere": (lambda p: _rewrite(p, _elsewhere), "names files outside of its folder"),
    "no fields": (lambda p: _rewrite(p, lambda content: [1]), "has not the fields of version 2"),
    "negative steps": (
        lambda p: _rewrite(p, lambda content: content["values"].update(steps=-1)),
        "has steps=-1",
    ),
    "a flipped bit": (lambda p: _flip(_largest(p)), "is damaged"),
    "half a file": (
        lambda p: _largest(p).write_bytes(_largest(p).read_bytes()[:200]),
        "is truncated or damaged",
    ),
    "an empty file": (lambda p: _largest(p).write_bytes(b""), "is truncated or damaged"),
    "no file": (lambda p: _largest(p).unlink(), "is missing"),
    "half of the metadata": (
        lambda p: (p / METADATA).write_text((p / METADATA).read_text()[:300]),
        "is no JSON, or truncated",
    ),
    "other metadata": (lambda p: _edit(p / METADATA, '"steps":3', '"steps":4'), "is damaged"),
    "another version": (
        lambda p: _edit(p / METADATA, '"version": 2', '"version": 3'),
        "has version 3; this program reads 2",
    ),
    "another format": (lambda p: (p / METADATA).write_text("{}"), "is not of a shardproof-"),
    "no metadata": (lambda p: (p / METADATA).unlink(), "there is no such checkpoint"),
    "another pointer": (
        lambda p: (p.parent / LATEST).write_text("../elsewhere"),
        "names '../elsewhere', and there is no such checkpoint",
    ),
    "no pointer": (lambda p: (p.parent / LATEST).unlink(), "has neither latest nor metadata.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_one_line(cluster, checkpoint, tmp_path, name):
    damage, words = DAMAGES[name]
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    damage(folder / "step-00000003")
    text = _refusal(cluster, Setting(ONE), folder)
    assert text.startswith("checkpoint: ")
    assert words in text


def test_what_is_named_is_on_the_disk_before(cluster, tmp_path, monkeypatch):
    done = []
    for module in (folders, storage):
        monkeypatch.setattr(module, "synchronise", lambda path: done.append(path.name))
    for kind in ("rename", "replace"):
        plain = getattr(Path, kind)
        monkeypatch.setattr(
            Path, kind, lambda one, to, plain=plain: done.append(f"{to.name}!") or plain(one, to)
        )
    root = tmp_path / "root"
    _save(cluster, Setting(ONE), root)
    draft = ["rank-00000.safetensors", METADATA, ".step-00000001.partial", "step-00000001!"]
    assert done == [tmp_path.name, *draft, "root", f".{LATEST}.partial", f"{LATEST}!", "root"]


def test_to_synchronise_is_to_flush_to_the_disk(tmp_path, monkeypatch):
    flushed, plain = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda found: flushed.append(os.fstat(found)) or plain(found))
    folders.synchronise(tmp_path)
    assert [each.st_ino for each in flushed] == [tmp_path.stat().st_ino]
    before = _lowest_descriptor()
    folders.synchronise(tmp_path)
    assert _lowest_descriptor() == before


def _lowest_descriptor() -> int:
    """The lowest number of a file that is not open."""
    found = os.dup(0)
    os.close(found)
    return found


def test_no_folder_is_one_line(cluster, tmp_path):
    assert "has neither latest nor metadata.json" in _refusal(
        cluster, Setting(ONE), tmp_path / "nowhere"
    )


def test_what_the_system_says_is_one_line_on_every_rank(cluster, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("no folder")
    with pytest.raises(RankFailures) as caught:
        cluster.run(save, Setting(Layout(dp=2)), str(taken), 3, world_size=2)
    assert [each.rank for each in caught.value.failures] == [0, 1]
    for each in caught.value.failures:
        assert each.message == f"checkpoint: {taken}: File exists"
