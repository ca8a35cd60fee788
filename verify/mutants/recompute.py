"""Mutants of recomputation."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_mutant = partial(
    Mutant, family="recompute", module="impl.recompute", caught_by=("recomputed_block",)
)

_function = partial(_mutant, caught_by=("recomputed_function",))

_COUNTED = """\
        if len(found) != len(self._saved):
            raise RuntimeError(
                f"recompute: the function saves {len(found)} tensors for backward and saved"
                f" {len(self._saved)} in forward; it must do the same both times"
            )
        for reference, tensor in zip(self._saved, found, strict=True):
"""
_REPLAY = "        with self._tracker.replaying(self._snapshot):\n"
_RUN = """\
    with saved_tensors_hooks(frame.pack, _unpack):
        return function(x, *args)
"""
_SPLIT = "part = x if group is None else split(x.detach().reshape(-1), dim=0, group=group)"

MUTANTS = (
    _mutant(
        name="recompute-new-numbers",
        wrong="Backward draws new masks, so that gradients belong to another sample.",
        snippet=_REPLAY,
        replacement="        with ExitStack():\n",
        seen="REC-02",
    ),
    _mutant(
        name="recompute-default-stream-only",
        wrong="Only the default generator is put back, not the other streams.",
        snippet=_REPLAY,
        replacement=(
            "        states = self._tracker.states()\n"
            '        states["default"] = self._snapshot.states["default"]\n'
            "        with self._tracker.replaying(type(self._snapshot)(states, 'default')):\n"
        ),
        seen="REC-02",
    ),
    _mutant(
        name="recompute-streams-without-default",
        wrong="Only the tracker's own streams are put back, not the default generator.",
        snippet=_REPLAY,
        replacement=(
            "        states = dict(self._snapshot.states)\n"
            '        states["default"] = self._tracker.states()["default"]\n'
            "        with self._tracker.replaying(type(self._snapshot)(states, 'default')):\n"
        ),
        seen="REC-02",
    ),
    _mutant(
        name="recompute-streams-left",
        wrong="After backward the streams are where recomputation left them.",
        module="impl.random",
        snippet="            self._restore(before)",
        replacement="            self._current = before.current",
    ),
    _mutant(
        name="recompute-goes-on-from-forward",
        wrong="The states of forward are put back, and the later ones not, once backward is done.",
        snippet=_REPLAY,
        replacement=(
            "        self._tracker.set_states(self._snapshot.states)\n        with ExitStack():\n"
        ),
        caught_by=("recomputed_block", "transformer_layer"),
        seen="REC-02",
    ),
    _mutant(
        name="recompute-first-numbers-again",
        wrong="Whatever is computed again draws the numbers that the first to be so drew.",
        snippet="        with self._tracker.replaying(self._snapshot):\n",
        replacement=(
            "        snapshot = getattr(self._tracker, 'used', None) or self._snapshot\n"
            "        self._tracker.used = snapshot\n"
            "        with self._tracker.replaying(snapshot):\n"
        ),
        caught_by=("recomputed_block",),
    ),
    _mutant(
        name="recompute-states-after-forward",
        wrong="The states that are put back are those at the start of backward.",
        snippet=_REPLAY,
        replacement="        with self._tracker.replaying(self._tracker.snapshot()):\n",
        seen="REC-02",
    ),
    _mutant(
        name="recompute-keeps-all",
        wrong="What autograd saves inside is kept, and nothing computed again.",
        snippet=_RUN,
        replacement="    return function(x, *args) if frame else None\n",
    ),
    _mutant(
        name="recompute-keeps-the-whole-input",
        wrong="Each rank keeps all of an input that is distributed.",
        snippet=_SPLIT,
        replacement="part, self._group = x.detach().clone(), None",
    ),
    _mutant(
        name="recompute-keeps-a-view",
        wrong="The part that a rank keeps is a view, which keeps the whole in memory.",
        snippet=_SPLIT,
        replacement=(
            "part = (\n"
            "            x\n"
            "            if group is None\n"
            "            else x.detach().reshape(-1).chunk(group.size())[group.rank()]\n"
            "        )"
        ),
    ),
    _mutant(
        name="recompute-gathers-in-another-order",
        wrong="The parts of a distributed input are put together in the reverse order.",
        snippet="self._whole(all_gather(x, dim=0, group=self._group))",
        replacement=(
            "self._whole(torch.cat(all_gather(x, dim=0, group=self._group)"
            ".chunk(self._group.size())[::-1]))"
        ),
    ),
    _mutant(
        name="recompute-inputs-without-gradient",
        wrong="Nothing that needs the gradient of an input is computed again.",
        snippet="tensor.requires_grad_(needs)",
        replacement="pass",
    ),
    _mutant(
        name="recompute-last-run-left-out",
        wrong="Layers beyond a multiple of num_layers are left out.",
        snippet='    recomputed = len(layers) if method == "uniform" else num_layers\n',
        replacement=(
            "    if method == 'uniform':\n"
            "        layers = layers[: len(layers) // num_layers * num_layers]\n"
            '    recomputed = len(layers) if method == "uniform" else num_layers\n'
        ),
        seen="REC-05",
    ),
    _mutant(
        name="recompute-runs-overlap",
        wrong="Runs of layers begin at every layer, so that some run twice.",
        snippet="for start in range(0, recomputed, length):",
        replacement="for start in range(0, recomputed, 1):",
        seen="REC-05",
    ),
    _mutant(
        name="recompute-block-is-uniform",
        wrong="A block of layers is recomputed at once, from the input of its first.",
        snippet='length = num_layers if method == "uniform" else 1',
        replacement="length = num_layers",
    ),
    _mutant(
        name="recompute-rest-left-out",
        wrong="Layers that are not computed again are left out.",
        snippet="    return _Run(layers[recomputed:])(x)",
        replacement="    return x",
    ),
    _mutant(
        name="recompute-runs-twice",
        wrong="Forward runs the function twice, as if to be sure.",
        snippet=_RUN,
        replacement=("    with torch.no_grad():\n        function(x, *args)\n" + _RUN),
    ),
    _mutant(
        name="recompute-any-number-of-layers",
        wrong="More layers than there are are accepted.",
        snippet="if not 1 <= num_layers <= len(layers):",
        replacement="if num_layers < 1:",
    ),
    _mutant(
        name="recompute-distributes-what-is-split",
        wrong="Inputs that sequence parallelism splits are distributed, and mixed up.",
        snippet="if group is not None and sequence_parallel:",
        replacement="if group is not None and sequence_parallel and not layers:",
    ),
    _function(
        name="recompute-without-autocast",
        wrong="What is computed again runs under the autocast of backward, as a rule none.",
        snippet="stack.enter_context(autocast.again())",
        replacement="del autocast",
        seen="megatron-core 0.16.1's CheckpointFunction",
    ),
    _function(
        name="recompute-autocast-if-on",
        wrong="Autocast is put back where it was on, and not turned off where it was off.",
        snippet="for autocast in self._autocasts:",
        replacement="for autocast in (each for each in self._autocasts if each.enabled):",
    ),
    _function(
        name="recompute-autocast-of-the-usual-dtype",
        wrong="Autocast is put back without its dtype.",
        snippet="self.device, dtype=self.dtype, enabled",
        replacement="self.device, enabled",
    ),
    _function(
        name="recompute-packed-input",
        wrong="A distributed input comes back packed, however it lay in memory.",
        snippet="return full.new_empty_strided(self._shape, self._strides).copy_(full)",
        replacement="return full",
        seen="megatron-core 0.16.1, which views it as flat",
    ),
    _function(
        name="recompute-tensors-of-any-shape",
        wrong="A function may save tensors of other shapes the second time.",
        snippet="if _likeness(tensor) != saved.like:",
        replacement="if _likeness(tensor)[1:] != saved.like[1:]:",
    ),
    _function(
        name="recompute-as-many-as-fit",
        wrong="A function may save more tensors the second time, or fewer.",
        snippet=_COUNTED,
        replacement=_COUNTED.replace("len(found) != len(self._saved)", "not found").replace(
            "strict=True", "strict=False"
        ),
    ),
    _function(
        name="recompute-keeps-the-second-run",
        wrong="What was computed again stays in memory with its graph.",
        snippet="found.append(tensor.detach())",
        replacement="found.append(tensor)",
    ),
)
