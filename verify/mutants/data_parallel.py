"""Mutants of data parallelism: buffers, reductions, the weight of tokens, and shards."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_of = partial(Mutant, family="data parallelism", caught_by=("training_steps",))
_buffer = partial(_of, module="impl.data_parallel")
_shard = partial(_of, module="impl.optimizer.distributed")
_finish = partial(_of, module="impl.gradients")

_FINISH = """    data_parallel.finish()
    finish_sequence_parallel_gradients(data_parallel.parameters, group=tp_group)
    finish_tied_gradients(data_parallel.parameters, group=embedding_group)
    data_parallel.scale(1.0 / tokens.clamp_min(1))
"""

_BUFFERS = (
    _of(
        name="bucket-not-padded",
        module="impl.buckets",
        wrong="Buckets end where their last tensor ends.",
        snippet="end += -(end - start) % parts",
        replacement="end += 0",
        seen="EMB-02",
    ),
    _of(
        name="bucket-of-everything",
        module="impl.buckets",
        wrong="A bucket never ends, whatever its size is to be.",
        snippet="if index == 0 or (bucket_size is not None and end - start >= bucket_size):",
        replacement="if index == 0:",
    ),
    _of(
        name="bucket-of-each-parameter",
        module="impl.buckets",
        wrong="Every parameter is a bucket, whatever its size is to be.",
        snippet="if index == 0 or (bucket_size is not None and end - start >= bucket_size):",
        replacement="if True:",
    ),
    _of(
        name="bucket-shards-overlap",
        module="impl.buckets",
        wrong="Shards begin at their rank, as if they had one element.",
        snippet="range(self.start + part * length, self.start + (part + 1) * length)",
        replacement="range(self.start + part, self.start + part + length)",
    ),
    _of(
        name="bucket-shards-of-true-length",
        module="impl.buckets",
        wrong="Shards are as long as with padding, and begin where they would without.",
        snippet="return range(self.start + part * length, self.start + (part + 1) * length)",
        replacement="""first = self.start + part * ((self.spans[-1].stop - self.start) // parts)
        return range(first, first + length)""",
        seen="DO-04",
    ),
    _buffer(
        name="buffer-zeroed-in-part",
        wrong="A step begins with the last step's gradients in all buckets but the first.",
        snippet="self.data.zero_()",
        replacement="self.data[: self.buckets[0].stop].zero_()",
        seen="DO-02",
    ),
    _buffer(
        name="buffer-last-round-only",
        wrong="Each backward overwrites what those before it gave.",
        snippet="parameter.main_grad.add_(parameter.grad)",
        replacement="parameter.main_grad.copy_(parameter.grad)",
        seen="LS-08",
    ),
    _buffer(
        name="buffer-gradient-kept",
        wrong="A gradient that was added stays, and is added again with the next.",
        snippet="        parameter.grad = None\n",
        replacement="",
        seen="LS-09",
    ),
    _buffer(
        name="buffer-in-low-precision",
        wrong="Gradients add up in the dtype of their parameters.",
        snippet="dtype = torch.promote_types(first.dtype, torch.float32)",
        replacement="dtype = first.dtype",
        seen="FP8-04",
    ),
    _buffer(
        name="buffer-shares-backwards",
        wrong="Shares of the buffer are taken for those of parameters in the order of the model.",
        snippet="yield Share(parameter, start - span.start, values, self.data[start:stop])",
        replacement="""parameter = self.parameters[-1 - span.index]
                yield Share(parameter, start - span.start, values, self.data[start:stop])""",
        seen="DO-01",
    ),
    _buffer(
        name="buffer-shard-at-the-front",
        wrong="A reduced shard is written where the first rank has its own.",
        snippet="self.data[mine.start : mine.stop].copy_(reduced)",
        replacement="self.data[bucket.start : bucket.start + len(mine)].copy_(reduced)",
    ),
)
_REDUCTIONS = (
    _buffer(
        name="reduction-without-cp",
        wrong="Gradients are summed over dp, not over parts of the sequence.",
        snippet="groups.edp if expert else groups.dp_cp",
        replacement="groups.edp if expert else groups.dp",
    ),
    _buffer(
        name="reduction-of-experts-over-dp",
        wrong="Gradients of experts are summed over ranks that have other experts.",
        snippet="groups.edp if expert else groups.dp_cp",
        replacement="groups.dp_cp",
    ),
    _buffer(
        name="reduction-in-every-round",
        wrong="Buckets are on their way from the first round on.",
        snippet="if self.overlap and self._synchronizes:",
        replacement="if self.overlap:",
    ),
    _buffer(
        name="reduction-at-first-gradient",
        wrong="A bucket is on its way when the first of its gradients is there.",
        snippet="and not self._missing[len(self._pending)]",
        replacement="and len(self._pending) <= number",
    ),
    _buffer(
        name="reduction-not-waited-for",
        wrong="Reductions are taken to be done when they begin.",
        snippet="reduced = pending.wait()",
        replacement="reduced = pending.result",
        seen="DP-02",
    ),
    _finish(
        name="reduction-scaled-in-flight",
        wrong="Buckets are scaled while they are on their way.",
        snippet=_FINISH,
        replacement="""    data_parallel.scale(1.0 / tokens.clamp_min(1))
    data_parallel.finish()
    finish_sequence_parallel_gradients(data_parallel.parameters, group=tp_group)
    finish_tied_gradients(data_parallel.parameters, group=embedding_group)
""",
        seen="DP-02",
    ),
    _finish(
        name="reduction-scaled-where-it-was",
        wrong="Buckets are scaled where they were reduced from, not where the result goes.",
        snippet=_FINISH,
        replacement="""    for buffer in data_parallel.buffers:
        while len(buffer._pending) < len(buffer.buckets):
            buffer._start()
    data_parallel.scale(1.0 / tokens.clamp_min(1))
    data_parallel.finish()
    finish_sequence_parallel_gradients(data_parallel.parameters, group=tp_group)
    finish_tied_gradients(data_parallel.parameters, group=embedding_group)
""",
        seen="DO-06",
    ),
    _buffer(
        name="bucket-begun-is-all",
        wrong="What the last backward does not reach is not reduced where it is overlapped.",
        snippet="""        while len(self._pending) < len(self.buckets):
            self._start()
        for bucket, pending in zip(self.buckets, self._pending, strict=True):
""",
        replacement="""        spans = [len(bucket.spans) for bucket in self.buckets]
        begun = spans != [len(missing) for missing in self._missing]
        while len(self._pending) < len(self.buckets) and not begun:
            self._start()
        for bucket, pending in zip(self.buckets, self._pending):
""",
    ),
    _finish(
        name="gradients-of-another-buffer",
        wrong="Gradients that are Partial over tp are summed where the optimizer does not look.",
        snippet='getattr(parameter, "main_grad", parameter.grad)',
        replacement="parameter.grad",
        seen="LS-11",
    ),
    _finish(
        name="gradients-divided-by-tp",
        wrong="The mean is over tokens and over the ranks of tp.",
        snippet="data_parallel.scale(1.0 / tokens.clamp_min(1))",
        replacement="data_parallel.scale(1.0 / tokens.clamp_min(1) / tp_group.size())",
        seen="LS-06",
    ),
    _buffer(
        name="tokens-of-own-rank",
        wrong="Every rank divides by its own number of tokens.",
        snippet="total, count = all_reduce(both, group=group)",
        replacement="total, count = all_reduce(both, group=group)[0], both[1]",
        seen="LS-01",
    ),
    _buffer(
        name="tokens-loss-of-own-rank",
        wrong="The loss that is told is that of one rank's tokens.",
        snippet="total, count = all_reduce(both, group=group)",
        replacement="total, count = both[0], all_reduce(both, group=group)[1]",
        seen="LS-13",
    ),
)
_TIMES = (
    _buffer(
        name="reductions-after-backward",
        wrong="With overlap, buckets are reduced when backward has ended, as without.",
        snippet="""        if self.overlap and self._synchronizes:
            buffer.ready(index)
""",
        replacement="",
    ),
    _buffer(
        name="reductions-after-backward-later-on",
        wrong="With overlap, only the first step reduces within backward.",
        snippet="""are updated.
        self.finish_parameters()
""",
        replacement="""are updated.
        self.finish_parameters()
        self.overlap = False
""",
    ),
)
_GATHERS = (
    _shard(
        name="parameters-not-waited-for",
        wrong="Parameters are used before they are gathered.",
        snippet="""        if pending is not None:
            pending.wait()
""",
        replacement="",
        seen="DO-07",
    ),
    _shard(
        name="parameters-of-the-last-bucket",
        wrong="The last bucket of parameters is never gathered.",
        snippet="""        for number in reversed(range(len(self.buckets))):
            bucket""",
        replacement="""        for number in reversed(range(len(self.buckets) - 1)):
            bucket""",
    ),
    _buffer(
        name="parameters-of-one-copy-not-updated",
        wrong="Where the optimizer is distributed, what has one copy only is not updated.",
        snippet="return [share for buffer in self.buffers for share in buffer.shares()]",
        replacement="""several = [b for b in self.buffers if b.group.size() > 1 or not b.scatter]
        return [share for buffer in several for share in buffer.shares()]""",
        seen="DO-09",
    ),
    _buffer(
        name="parameters-unread-not-waited-for",
        wrong="What no forward pass reads is updated before the gather of the last update ended,"
        " which then undoes it.",
        snippet="""        # Those too that no forward pass has waited for, before they are updated.
        self.finish_parameters()
""",
        replacement="",
        seen="impl 0.1.0, mended since",
    ),
)
MUTANTS = (*_BUFFERS, *_REDUCTIONS, *_TIMES, *_GATHERS)
