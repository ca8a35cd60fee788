"""Mutants of pipeline parallelism: schedules, where their transfers go, messages, the executor, and
weight passes."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_table = partial(
    Mutant,
    family="pipeline",
    module="impl.pipeline.schedules",
    caught_by=("pipeline_schedule",),
)
_timed = partial(_table, module="impl.pipeline.timeline")
_refused = partial(_table, caught_by=("pipeline",))
_message = partial(_refused, module="impl.pipeline.p2p")
_run = partial(_refused, module="impl.pipeline.executor")
_late = partial(_refused, module="impl.weight_pass")

_WARMUP = "warmup=pp - stage - 1, forward"
_LOOPED = "warmup = 2 * (pp - stage - 1) + (vpp - 1) * pp"
_PUT_OFF = "    for action in _one_forward_one_backward(stage, pp, vpp, microbatches):"
_COMPLETING = 'completing = ("backward", "weight")'
_SCALED = "torch.full_like(self.outcome.losses[m], self.scale)"
_OWN_CHUNK = "return (transfer.chunk * self.schedule.pp + transfer.peer + step)"
_BEGUN = "return dist.batch_isend_irecv(list(operations)) if operations else []"
_STARTED = "index, chunks = self.link.stage, range(self.schedule.vpp)"

_ADDED = "total = compute() if total is None else total + compute()"
_SUMMED = f"""\
            for compute in left.pop(parameter, []):
                {_ADDED}
            if parameter in found:
                own = found.pop(parameter)
                total = own if total is None else total + own
            torch.autograd.backward([parameter], [total])
"""

TABLES = (
    _table(
        name="schedule-warmup-too-short",
        wrong="A stage of 1f1b does one forward less before its first backward.",
        snippet=_WARMUP,
        replacement="warmup=max(pp - stage - 2, 0), forward",
    ),
    _table(
        name="schedule-warmup-too-long",
        wrong="A stage of 1f1b does one forward more before its first backward, and keeps it.",
        snippet=_WARMUP,
        replacement="warmup=pp - stage, forward",
    ),
    _table(
        name="schedule-interleaved-warmup-not-doubled",
        wrong="The warm-up of interleaved has one forward for each later stage instead of two.",
        snippet=_LOOPED,
        replacement="warmup = (pp - stage - 1) + (vpp - 1) * pp",
    ),
    _table(
        name="schedule-interleaved-warms-up-everything",
        wrong="Interleaved does all forwards first, as Megatron once did for microbatches = pp.",
        snippet=_LOOPED,
        replacement="warmup = microbatches * vpp",
        seen="megatron/core/pipeline_parallel/schedules.py, all_warmup_microbatches",
    ),
    _table(
        name="schedule-chunks-back-in-forward-order",
        wrong="Interleaved goes back through the chunks from the first to the last.",
        snippet="return microbatch, vpp - 1 - chunk",
        replacement="return microbatch, chunk",
    ),
    _table(
        name="schedule-depth-first",
        wrong="A microbatch goes through all chunks of a stage before the next one comes.",
        snippet="return group * pp + within % pp, within // pp",
        replacement="return group * pp + within // vpp, within % vpp",
    ),
    _table(
        name="schedule-weights-at-once",
        wrong="Zero-bubble computes every weight gradient right after the input's.",
        snippet=_PUT_OFF,
        replacement=_PUT_OFF.replace("stage,", "own,").replace(
            "    for", "    own, stage = stage, 0\n    for"
        ),
    ),
    _table(
        name="schedule-weights-at-the-end",
        wrong="Zero-bubble puts off all weight gradients to the end, and keeps all microbatches.",
        snippet=_PUT_OFF,
        replacement=_PUT_OFF.replace("stage,", "own,").replace(
            "    for", "    own, stage = stage, microbatches\n    for"
        ),
    ),
    _table(
        name="schedule-last-weights-forgotten",
        wrong="Zero-bubble leaves out the weight gradients that are put off to the end.",
        snippet="for microbatch in range(max(microbatches - stage, 0), microbatches):",
        replacement="for microbatch in range(microbatches, microbatches):",
    ),
    _table(
        name="schedule-last-backward-forgotten",
        wrong="As many backwards are left out as there were forwards to warm up.",
        snippet="for turn in range(turns + warmup):",
        replacement="for turn in range(turns):",
    ),
    _timed(
        name="schedule-received-too-late",
        wrong="A tensor that arrives when its work begins is received after it.",
        snippet="if time <= start]",
        replacement="if time < start]",
    ),
    _timed(
        name="schedule-batches-in-reverse",
        wrong="The transfers of a batch are in reverse, on ends that batch them differently.",
        snippet="steps.append(Exchange(tuple(now)))",
        replacement="steps.append(Exchange(tuple(reversed(now))))",
    ),
    _timed(
        name="schedule-received-where-it-is-needed",
        wrong="Every receive waits in a batch of its own until the batch of sends is done.",
        snippet="            steps.append(Exchange(tuple(now)))\n",
        replacement=(
            '            for way in ("send", "recv"):\n'
            "                if part := [t for t in now if t.way == way]:\n"
            "                    steps.append(Exchange(tuple(part)))\n"
        ),
    ),
    _timed(
        name="schedule-no-wrap-around",
        wrong="The last stage has nothing to send to the first one's next chunk.",
        snippet="if not 0 <= target <= last:",
        replacement="if not 0 <= target <= last or (forward and place % pp == pp - 1):",
    ),
    _refused(
        name="schedule-remainder-dropped",
        wrong="Interleaved leaves out the microbatches that it cannot group by pp.",
        snippet="""\
    if kind == "interleaved" and microbatches % pp:
        raise ValueError(
            f"microbatches: {microbatches} is no multiple of pp={pp}, which schedule interleaved"
            f" needs; give a multiple of {pp}, or take 1f1b"
        )
    order = KINDS[kind]
    orders = [tuple(order(stage, pp, vpp, microbatches)) for stage in range(pp)]
""",
        replacement="""\
    order, grouped = KINDS[kind], microbatches
    if kind == "interleaved" and microbatches > pp:
        grouped -= microbatches % pp
    orders = [tuple(order(stage, pp, vpp, grouped)) for stage in range(pp)]
""",
    ),
    _refused(
        name="schedule-further-chunks-dropped",
        wrong="A schedule of one chunk a stage takes several, and computes the first of them.",
        snippet='if vpp > 1 and kind != "interleaved":',
        replacement='if vpp > 1 and kind != "interleaved" and microbatches == -1:',
    ),
)

RUNS = (
    _refused(
        name="pipeline-complete-before-weights",
        wrong="A chunk's gradients are called complete when its last input gradient is.",
        snippet=_COMPLETING,
        replacement='completing = ("backward", "input")',
    ),
    _refused(
        name="pipeline-complete-after-first-backward",
        wrong="A chunk's gradients are called complete after its first backward.",
        snippet="for action in reversed(self.actions(stage))",
        replacement="for action in self.actions(stage)",
    ),
    _refused(
        name="pipeline-complete-after-as-many-as-microbatches",
        wrong="A chunk's gradients are called complete when its stage has done as many backwards as"
        " there are microbatches, of whatever chunk.",
        snippet="""\
        return next(
            action
            for action in reversed(self.actions(stage))
            if action.chunk == chunk and action.work in completing
        )
""",
        replacement="""\
        done = [action for action in self.actions(stage) if action.work in completing]
        return next(each for each in done[self.microbatches - 1 :] if each.chunk == chunk)
""",
        seen="PP-06",
    ),
    _run(
        name="pipeline-scales-earlier-rounds",
        wrong="What earlier rounds accumulated is scaled again in every round.",
        snippet=_STARTED,
        replacement=(
            f"{_STARTED}\n"
            "        for each in (each for own in self.stage.parameters for each in own):\n"
            "            if each.grad is not None:\n"
            "                each.grad.mul_(self.scale)"
        ),
        seen="PP-04",
    ),
    _run(
        name="pipeline-losses-summed",
        wrong="The gradients are those of the sum of the losses, not of their mean.",
        snippet=_SCALED,
        replacement="torch.ones_like(self.outcome.losses[m])",
    ),
    _run(
        name="pipeline-mean-of-one-round",
        wrong="The gradients are of the mean over one round's microbatches only.",
        snippet=_SCALED,
        replacement="torch.full_like(self.outcome.losses[m], 1 / self.schedule.microbatches)",
    ),
    _run(
        name="pipeline-losses-told-scaled",
        wrong="The losses are handed out scaled.",
        snippet="self.outcome.losses[m] = y.detach()",
        replacement="self.outcome.losses[m] = y.detach() * self.scale",
    ),
    _run(
        name="pipeline-chunk-of-the-peer",
        wrong="What a stage sends is looked up under the chunk that receives it.",
        snippet=_OWN_CHUNK,
        replacement="return transfer.chunk * self.schedule.pp",
    ),
    _run(
        name="pipeline-length-of-the-first",
        wrong="Every activation is received into a buffer of the first microbatch's shape.",
        snippet="known = self.shape if activation else",
        replacement="known = tuple(self.inputs[0].shape) if activation else",
    ),
    _run(
        name="pipeline-arrivals-forgotten",
        wrong="What travels is forgotten when the next exchange begins.",
        snippet="        self._arrived()\n        begun:",
        replacement="        begun:",
    ),
    _run(
        name="pipeline-barrier-by-microbatch",
        wrong="A barrier is reached by the stages only that have a microbatch of their number.",
        snippet=_STARTED,
        replacement=(
            f"{_STARTED}\n"
            "        if index < self.schedule.microbatches:\n"
            "            torch.distributed.barrier(self.link.group)"
        ),
        seen="HANG-04",
    ),
    _message(
        name="pipeline-stage-as-global-rank",
        wrong="A stage's number is taken for the global rank of its peer.",
        snippet="dist.get_global_rank(self.group, stage)",
        replacement="stage",
        seen="GRP-04",
    ),
    _message(
        name="pipeline-receive-not-waited-for",
        wrong="What is received is read before it is there.",
        snippet="            work.wait()",
        replacement="            del work",
    ),
    _message(
        name="pipeline-sends-one-by-one",
        wrong="Each send and receive is waited for before the next, although both ends send first.",
        snippet=_BEGUN,
        replacement=(
            "for each in sorted(operations, key=lambda each: each.op is dist.irecv):\n"
            "        each.op(each.tensor, each.peer, each.group).wait()\n"
            "    return []"
        ),
    ),
    _message(
        name="pipeline-freed-in-flight",
        wrong="The memory of what is sent is given up before the send is done.",
        snippet="        return Pending(tuple(received), tuple(sent), _begun(operations))",
        replacement=(
            "        pending = Pending(tuple(received), tuple(sent), _begun(operations))\n"
            "        for tensor in sent:\n"
            "            tensor.data = torch.empty(1, dtype=tensor.dtype)\n"
            "        return pending"
        ),
    ),
    _message(
        name="pipeline-announced-too-late",
        wrong="The shape of a tensor is sent after it.",
        snippet="return [self._announcement(tensor), *values]",
        replacement="return [*values, self._announcement(tensor)]",
    ),
    _message(
        name="pipeline-always-announced",
        wrong="A message of sizes goes ahead of every activation, although all have one shape.",
        snippet="if outgoing.announced else values",
        replacement="if outgoing.announced or values else values",
    ),
)

WAITS = (
    _run(
        name="pipeline-last-send-not-waited-for",
        wrong="A stage ends while what it sent last is on its way.",
        snippet="        self._arrived()\n        return self.outcome",
        replacement="        return self.outcome",
    ),
)

WEIGHTS = (
    _run(
        name="weight-pass-left-out",
        wrong="The weight pass of the first microbatch is left out.",
        snippet="        self._late.pop((action.microbatch, action.chunk)).run()",
        replacement=(
            "        if action.microbatch:\n"
            "            self._late.pop((action.microbatch, action.chunk)).run()"
        ),
    ),
    _run(
        name="weight-pass-thaws",
        wrong="Parameters that are frozen are trained from the first backward on.",
        snippet="WeightPass(self._trained(chunk))",
        replacement=(
            "WeightPass([each.requires_grad_() for each in self.stage.parameters[chunk]])"
        ),
    ),
    _late(
        name="weight-pass-done-twice",
        wrong="A weight pass adds its gradients twice.",
        snippet="torch.autograd.backward([parameter], [total])",
        replacement="torch.autograd.backward([parameter, parameter], [total, total])",
    ),
    _late(
        name="weight-pass-for-each-use",
        wrong="A weight that is used twice gets the sum of both gradients twice.",
        snippet=_SUMMED,
        replacement=_SUMMED.replace(
            "for compute in left.pop(parameter, []):",
            "uses = left.pop(parameter, [])\n            for compute in uses:",
        )
        .replace("own = found.pop(parameter)", "uses, own = [*uses, None], found.pop(parameter)")
        .replace("torch.autograd", "for _ in uses:\n                torch.autograd"),
        caught_by=("pipeline", "gpt_training"),
        seen="EMB-06",
    ),
    _late(
        name="weight-pass-complete-at-first-use",
        wrong="The gradient of a weight that is used twice is called complete at the first.",
        snippet=_ADDED,
        replacement="""\
if total is not None:
                    torch.autograd.backward([parameter], [total])
                total = compute()""",
        caught_by=("gpt_training",),
        seen="EMB-07",
    ),
    _late(
        name="weight-pass-to-no-gradient-only",
        wrong="A weight pass gives nothing to a parameter that has a gradient already.",
        snippet="            torch.autograd.backward([parameter], [total])\n",
        replacement=(
            "            if parameter.grad is None:\n"
            "                torch.autograd.backward([parameter], [total])\n"
        ),
        seen="DP-03",
    ),
    _late(
        name="weight-pass-of-a-later-input",
        wrong="A product takes the input that its layer has when the weight pass comes: that of the"
        " last microbatch that went back.",
        snippet="of_weight = now_or_later(ctx.weight, partial(weight_product, gradient, x))",
        replacement=(
            "ctx.weight.x = x\n"
            "            of_weight = now_or_later(\n"
            "                ctx.weight, lambda: weight_product(gradient, ctx.weight.x)\n"
            "            )"
        ),
    ),
    _late(
        name="weight-pass-of-products-only",
        wrong="Gradients that are found on the way are forgotten.",
        snippet="each: gradient for each, gradient in own if gradient is not None}",
        replacement="each: gradient for each, gradient in own if each in self._left}",
    ),
    _late(
        name="weight-pass-of-all-but-products",
        wrong="Of a weight whose gradient comes from elsewhere too, that alone is added.",
        snippet="total = own if total is None else total + own",
        replacement="total = own",
    ),
)
MUTANTS = (*TABLES, *RUNS, *WAITS, *WEIGHTS)
