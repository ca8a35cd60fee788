"""Mutants of multi-latent attention: the shared key, the narrow weights, the parts of heads."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_latent = partial(
    Mutant, family="attention", module="impl.latent_attention", caught_by=("latent_attention",)
)

_MARK = """\
            init=init,
            sequence_parallel=sequence_parallel,
"""
_SHARED = "shared = gather_from_sequence_parallel_region(shared, group=self.group)"
_COPIED = "shared = copy_to_tensor_parallel_region(shared, group=self.group)"

MUTANTS = (
    _latent(
        name="latent-shared-key-not-summed",
        wrong="The gradient of the shared key is of one rank's heads.",
        snippet=_COPIED,
        replacement="shared = shared.clone()",
        caught_by=("latent_attention", "gpt_training"),
    ),
    _latent(
        name="latent-shared-key-summed-twice",
        wrong="The gradient of the shared key is summed over the ranks, and once more.",
        snippet=_COPIED,
        replacement=_COPIED + f"\n            {_COPIED}",
    ),
    _latent(
        name="latent-shared-key-split-gradient",
        wrong="Under sequence parallelism the gradient of the shared key is cut and not summed.",
        snippet=_SHARED,
        replacement=_SHARED.replace(")", ", tensor_parallel_output_grad=False)"),
    ),
    _latent(
        name="latent-shared-key-not-gathered",
        wrong="Under sequence parallelism latents are gathered, and the shared key is of own"
        " tokens, repeated.",
        snippet=_SHARED,
        replacement=_COPIED + ".repeat(self.group.size(), 1, 1)",
        seen="TPL-05",
    ),
    _latent(
        name="latent-narrow-weights-not-marked",
        wrong="Under sequence parallelism gradients of narrow weights are of this rank's tokens.",
        snippet=_MARK,
        replacement=_MARK.replace("=sequence_parallel", "=False"),
    ),
    _latent(
        name="latent-narrow-weights-always-marked",
        wrong="Gradients of narrow weights are summed without sequence parallelism too.",
        snippet=_MARK,
        replacement=_MARK.replace("=sequence_parallel", "=True"),
    ),
    _latent(
        name="latent-shared-key-first",
        wrong="The first rows of the narrow projection are taken for the shared key.",
        snippet="latent, shared = self.kv_down(x).split((self.latent_size, self.rope_size)",
        replacement="shared, latent = self.kv_down(x).split((self.rope_size, self.latent_size)",
    ),
    _latent(
        name="latent-values-first",
        wrong="A head's rows of keys and values are read as its value and then its key.",
        snippet="k, v = key_and_value.split((self.head_size, value_size), dim=-1)",
        replacement="v, k = key_and_value.split((value_size, self.head_size), dim=-1)",
    ),
    _latent(
        name="latent-keys-shared-part-first",
        wrong="In keys the shared part comes first, in queries last.",
        snippet="k = torch.cat((k, shared.expand(-1, -1, self.heads, -1)), -1)",
        replacement="k = torch.cat((shared.expand(-1, -1, self.heads, -1), k), -1)",
    ),
    _latent(
        name="latent-turns-first-features",
        wrong="Of queries the first features are turned by position, of keys the shared ones.",
        snippet="q, shared = torch.cat((plain, rotary(positioned)), -1), rotary(shared)",
        replacement="q, shared = rotary(q), rotary(shared)",
    ),
    _latent(
        name="latent-shared-key-not-turned",
        wrong="The shared part of the keys is not turned by position.",
        snippet="q, shared = torch.cat((plain, rotary(positioned)), -1), rotary(shared)",
        replacement="q = torch.cat((plain, rotary(positioned)), -1)",
    ),
    _latent(
        name="latent-not-normalised",
        wrong="The latent of keys and values is normalised only if that of queries is not.",
        snippet="latent if self.kv_norm is None else self.kv_norm(latent)",
        replacement=(
            "latent if self.kv_norm is None or self.query_norm is not None"
            " else self.kv_norm(latent)"
        ),
    ),
)
