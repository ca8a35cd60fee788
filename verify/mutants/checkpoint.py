"""Mutants of checkpoints: where pieces lie, what is saved, and what is restored."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_of = partial(Mutant, family="checkpoint", caught_by=("checkpoint",))
_pieces = partial(_of, module="impl.checkpoint.pieces")
_planner = partial(_of, module="impl.checkpoint.planner")
_folder = partial(_of, module="impl.checkpoint.folder")
_saved = partial(_folder, caught_by=("interrupted_save",))
_storage = partial(_of, module="impl.checkpoint.storage")
_model = partial(_of, module="impl.checkpoint.model")
_run = partial(_of, module="impl.checkpoint.training")

_BOXES = """\
    for number, chunk in enumerate(saved.chunks):
        there = Box(tuple(chunk.offsets), tuple(chunk.sizes))
        if (common := overlap(box, there)) is not None:
            found.append(
                ReadItem(
                    type=LoadItemType.TENSOR,
                    dest_index=MetadataIndex(key, box.offsets),
                    dest_offsets=_from(common, box),
                    storage_index=MetadataIndex(key, chunk.offsets, number),
"""
_BOXES_BY_NAME = _BOXES.replace(
    "    for number, chunk in enumerate(saved.chunks):\n",
    """\
    in_order = sorted(saved.chunks, key=lambda each: tuple(each.offsets))
    by_name = sorted(saved.chunks, key=lambda each: ",".join(map(str, each.offsets)))
    for chunk, named in zip(in_order, by_name, strict=True):
""",
).replace("chunk.offsets, number", "named.offsets")
_LOADED = """\
    pieces = _pieces(training) | {f"random.{name}": each for name, (_, each) in states.items()}
"""

_PLACES = (
    _pieces(
        name="checkpoint-share-at-start",
        wrong="The share of a distributed optimizer is taken for the beginning of its parameter.",
        snippet="in run_of(parameter.shape, start, start + flat.numel()):",
        replacement="in run_of(parameter.shape, 0, flat.numel()):",
    ),
    _pieces(
        name="checkpoint-rest-of-a-row",
        wrong="The rest of a row, with which a share begins, is taken for the row's beginning.",
        snippet="run_of(shape[1:], start - index * row, end))",
        replacement="run_of(shape[1:], 0, end - (start - index * row)))",
    ),
    _pieces(
        name="checkpoint-blocks-by-rank",
        wrong="The blocks of a gated weight lie rank by rank, as if it had not been cut by blocks.",
        snippet="there = (block * split.parts + split.part) * length + within",
        replacement="there = (split.part * split.blocks + block) * length + within",
    ),
    _pieces(
        name="checkpoint-experts-reversed",
        wrong="The first rank of experts has the last ones.",
        snippet="Split(0, 1, dist.get_rank(groups.ep), dist.get_world_size(groups.ep))",
        replacement="Split(0, 1, groups.size('ep') - 1 - groups.rank('ep'), groups.size('ep'))",
    ),
    _pieces(
        name="checkpoint-experts-by-tp",
        wrong="Shards of experts are those of the tensor-parallel ranks of all other layers.",
        snippet="group = groups.etp if expert else groups.tp",
        replacement="group = groups.tp",
    ),
    _pieces(
        name="checkpoint-padding-saved",
        wrong="Rows of padding, which depend on the layout, are saved as a part of the vocabulary.",
        snippet="size[0] = size[0] if rows is None else min(rows, size[0])",
        replacement="size[0] = size[0]",
        caught_by=("checkpoint", "resumed_training"),
    ),
    _planner(
        name="checkpoint-read-to-start",
        wrong="What is read of a box goes to the beginning of the piece that needs it.",
        snippet="dest_offsets=_from(common, box),",
        replacement="dest_offsets=torch.Size(0 for _ in box.sizes),",
    ),
    _storage(
        name="checkpoint-read-from-start",
        wrong="Of a box that is needed in part, the beginning is read.",
        snippet="values = values.narrow(dim, offset, length)",
        replacement="values = values.narrow(dim, 0, length)",
    ),
    _planner(
        name="checkpoint-boxes-by-name",
        wrong="Boxes of a tensor are taken in the order of their names, where 10 is before 2.",
        snippet=_BOXES,
        replacement=_BOXES_BY_NAME,
        seen="CK-04",
    ),
    _model(
        name="checkpoint-layers-by-stage",
        wrong="Layers are numbered stage by stage, whatever chunks they are in.",
        snippet="    parameters = model_parameters(chunks)\n",
        replacement="""    named = model_parameters(chunks)
    own = sorted({int(name.split(".")[1]) for name in named if name.startswith("layers.")})
    first = groups.rank("pp") * len(own)
    parameters = {
        ".".join(["layers", str(first + own.index(int(name.split(".")[1]))), *name.split(".")[2:]])
        if name.startswith("layers.")
        else name: each
        for name, each in named.items()
    }
""",
    ),
    _model(
        name="checkpoint-tied-copy-unnamed",
        wrong="The copy of a tied embedding is taken for a weight of the logits' own.",
        snippet='if getattr(p, "shared", False)}',
        replacement="if p.dim() < 0}",
        seen="CK-09",
    ),
)
_STATES = (
    _run(
        name="checkpoint-tied-copy-stale",
        wrong="The copy of a tied embedding on the last stage is not loaded.",
        snippet='        found[f"{key}.{original or name}"] = piece\n',
        replacement='        if original is None:\n            found[f"{key}.{name}"] = piece\n',
        seen="CK-09",
    ),
    _run(
        name="checkpoint-states-lost",
        wrong="The states of the optimizer are not saved.",
        snippet="kept = dict(slot.state)",
        replacement="kept = {}",
    ),
    _run(
        name="checkpoint-states-behind-padding",
        wrong="Where states are read from is counted with the padding of the buckets before them,"
        " which is not saved.",
        snippet=_LOADED,
        replacement=f"""\
    slots = training.optimizer.slots
    training.optimizer.slots = []
    for slot in slots:
        share, padding = slot.share, 0
        for buffer in training.optimizer.data_parallel.buffers:
            for index, parameter in enumerate(buffer.parameters):
                if parameter is share.parameter:
                    before = buffer.buckets[: buffer.bucket_of[index]]
                    padding = sum(each.stop - each.spans[-1].stop for each in before)
        last = share.parameter.numel() - share.values.numel()
        moved = dataclasses.replace(share, start=min(share.start + padding, last))
        training.optimizer.slots.append(dataclasses.replace(slot, share=moved))
{_LOADED}    training.optimizer.slots = slots
""",
        seen="CK-01",
    ),
    _run(
        name="checkpoint-main-left-out",
        wrong="Main parameters are not saved: after loading they are those of the new run, and the"
        " first update puts them in the place of what was loaded.",
        snippet="if slot.main is not share.values:",
        replacement="if slot.main is None:",
        caught_by=("resumed_training",),
    ),
    _run(
        name="checkpoint-before-parameters-arrive",
        wrong="What other ranks have updated is saved while it is on its way.",
        snippet="""\
    training.optimizer.data_parallel.finish_parameters()
    name =""",
        replacement="    name =",
        caught_by=("resumed_training",),
    ),
    _run(
        name="checkpoint-updates-lost",
        wrong="Adam and the schedule count updates from the beginning.",
        snippet='optimizer.updates = values["updates"]',
        replacement="optimizer.updates = 0",
    ),
    _run(
        name="checkpoint-updates-are-steps",
        wrong="Steps that were skipped count as updates.",
        snippet='optimizer.updates = values["updates"]',
        replacement='optimizer.updates = values["steps"]',
    ),
    _run(
        name="checkpoint-scale-from-start",
        wrong="The loss scale begins anew.",
        snippet="        setattr(optimizer.loss_scale, name, value)\n",
        replacement="        getattr(optimizer.loss_scale, name)\n",
    ),
    _run(
        name="checkpoint-scale-history-lost",
        wrong="Of the loss scale the value is restored, and not what it counts.",
        snippet='for n in ("value", "steps", "overflows") if',
        replacement='for n in ("value",) if',
    ),
    _run(
        name="checkpoint-consumed-lost",
        wrong="Samples are those of the first steps again.",
        snippet='Progress(values["steps"], values["consumed"])',
        replacement='Progress(values["steps"], 0)',
    ),
    _run(
        name="checkpoint-random-lost",
        wrong="Random streams are what they are at the beginning of a run.",
        snippet="training.tracker.set_states({name: state for name, (state, _) in states.items()})",
        replacement="training.tracker.set_states(training.tracker.states())",
    ),
    _run(
        name="checkpoint-random-anew",
        wrong="Random streams are seeded anew, also where they could go on.",
        snippet="        if there is None or row is None or there.size[1:] != state.shape:\n",
        replacement="        if there is None or rank >= 0:\n",
    ),
    _of(
        name="checkpoint-random-by-rank",
        module="impl.checkpoint.streams",
        wrong="A rank goes on with the numbers of the rank of its number, wherever that was.",
        snippet="            return other\n",
        replacement="            return rank\n",
    ),
    _folder(
        name="checkpoint-last-by-name",
        wrong="The newest checkpoint is the one whose name comes first, not what was saved last.",
        snippet="    return folder / name\n",
        replacement="    return min(each for each in folder.iterdir() if each.is_dir())\n",
    ),
    _folder(
        name="checkpoint-most-steps",
        wrong="The newest checkpoint is the one after most steps, not what was saved last.",
        snippet="    return folder / name\n",
        replacement="    return max(each for each in folder.iterdir() if each.is_dir())\n",
    ),
    _folder(
        name="checkpoint-newest-for-named",
        wrong="The newest checkpoint is loaded, also where another one is named.",
        snippet="        return folder\n",
        replacement="        return find(folder.parent)\n",
    ),
)
_REFUSALS = (
    _run(
        name="checkpoint-of-another-model",
        wrong="A model of other choices that has parameters of the same sizes is loaded into.",
        snippet='        if values["model"].get(name) != training.model.get(name):\n',
        replacement='        if (name in values["model"]) != (name in training.model):\n',
    ),
    _run(
        name="checkpoint-of-another-schedule",
        wrong="A schedule that was not saved goes on, although nobody asked for it.",
        snippet='if values["schedule"][name] != value and not override_schedule:',
        replacement='if name not in values["schedule"]:',
    ),
    _run(
        name="checkpoint-of-another-loss-scale",
        wrong="A constant loss scale goes on from a dynamic one.",
        snippet="(None if given is None else set(given))",
        replacement="(None if given is None else set(saved or ()))",
    ),
    _planner(
        name="checkpoint-rest-not-loaded",
        wrong="What is saved and has no place in the model is left out.",
        snippet="        if rest:\n",
        replacement="        if rest and not read:\n",
    ),
    _planner(
        name="checkpoint-rows-cut-off",
        wrong="Of a larger tensor is loaded what fits.",
        snippet="if (tuple(found.size), found.properties.dtype) != (pieces.size, pieces.dtype):",
        replacement="if found.properties.dtype != pieces.dtype:",
    ),
    _run(
        name="checkpoint-none-is-a-beginning",
        wrong="Where there is no checkpoint to load, training begins anew and says nothing.",
        snippet="    found, text = _on_first_rank(lambda: _read(folder), folder)\n",
        replacement="""\
    try:
        found, text = _on_first_rank(lambda: _read(folder), folder)
    except CheckpointError:
        return Progress(0, 0)
""",
    ),
    _storage(
        name="checkpoint-missing-file-left-out",
        wrong="What a file had that is missing stays what it was before.",
        snippet="""\
            raise ValueError(f"{file} is missing; take another checkpoint") from error
""",
        replacement="            return\n",
    ),
    _storage(
        name="checkpoint-damage-loaded",
        wrong="Values are loaded whatever their checksum.",
        snippet="if _checksum(values) != self.contents.places[index][1]:",
        replacement="if False:",
    ),
    _storage(
        name="checkpoint-metadata-believed",
        wrong="Metadata is believed whatever its checksum.",
        snippet='if _crc(_canonical(content)) != document.get("crc32"):',
        replacement="if False:",
    ),
)
_INTERRUPTED = (
    _saved(
        name="checkpoint-named-before-it-is-whole",
        wrong="The newest checkpoint is named when its files begin to be written.",
        snippet="""\
    draft = Draft(root, name)
    draft.folder.mkdir()
""",
        replacement="""\
    draft = Draft(root, name)
    draft.folder.mkdir()
    (root / LATEST).write_text(name)
""",
    ),
    _saved(
        name="checkpoint-pointer-written-in-place",
        wrong="The name of the newest checkpoint is written into the file that has the one before.",
        snippet="        pointer.replace(self.root / LATEST)\n",
        replacement="        (self.root / LATEST).write_text(pointer.read_text())\n"
        "        synchronise(self.root / LATEST)\n",
    ),
    _saved(
        name="checkpoint-before-is-removed-first",
        wrong="Earlier checkpoints are removed when a new one begins to be written, for its room.",
        snippet='    for left in root.glob(".step-*.partial"):\n',
        replacement="""\
    for left in (*root.glob(".step-*.partial"), *root.glob("step-*")):
""",
    ),
    _saved(
        name="checkpoint-draft-in-the-way",
        wrong="A draft that was never finished stays, and nothing of its name can be saved.",
        snippet="        shutil.rmtree(left)\n",
        replacement="        left.exists()\n",
    ),
    _saved(
        name="checkpoint-names-not-flushed",
        wrong="Files are flushed to the disk, and the folders with their names are not.",
        snippet="        os.fsync(descriptor)\n",
        replacement="        if path.is_file():\n            os.fsync(descriptor)\n",
    ),
    _saved(
        name="checkpoint-new-folder-not-flushed",
        wrong="Of a folder that is made to save to, the name is not flushed to the disk.",
        snippet="    folder.mkdir(exist_ok=True)\n    synchronise(folder.parent)\n",
        replacement="    folder.mkdir(exist_ok=True)\n",
    ),
    _saved(
        name="checkpoint-folder-there-not-flushed",
        wrong="Of a folder that is there its name is taken to be on the disk, whoever has just made"
        " it.",
        snippet="    folder.mkdir(exist_ok=True)\n",
        replacement="""\
    if folder.is_dir():
        return
    folder.mkdir()
""",
    ),
    _saved(
        name="checkpoint-named-before-it-is-flushed",
        wrong="That a checkpoint is there is flushed to the disk with the name of the newest one,"
        " which may come first.",
        snippet="""\
        self.folder.rename(self.published)
        synchronise(self.root)
""",
        replacement="        self.folder.rename(self.published)\n",
    ),
    _saved(
        name="checkpoint-left-open",
        wrong="What is flushed to the disk is not closed.",
        snippet="        os.close(descriptor)\n",
        replacement="        os.fstat(descriptor)\n",
    ),
    _storage(
        name="checkpoint-values-not-flushed",
        wrong="What ranks write is flushed to the disk some time after the checkpoint is named.",
        snippet="            synchronise(path)\n",
        replacement="            path.stat()\n",
        caught_by=("interrupted_save",),
    ),
)
MUTANTS = (*_PLACES, *_STATES, *_REFUSALS, *_INTERRUPTED)
