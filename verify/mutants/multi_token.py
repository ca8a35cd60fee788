"""Mutants of multi-token prediction: which tokens lie ahead, and what its modules are given."""

from __future__ import annotations

from functools import partial

from verify.mutants.mutant import Mutant

_model = partial(Mutant, family="model", module="impl.model", caught_by=("gpt_training",))
_training = partial(_model, module="impl.training")
_further = partial(_model, module="impl.multi_token")
_ahead = partial(_further, caught_by=("tokens_ahead",))

_NEEDED = "self.config.tied, self.config.tied or self.config.multi_token_layers > 0"
_AHEAD = "yield in_order[..., ahead.clamp(max=length - 1)], ahead < ends"
_ONE_BY_ONE = """h = module(h, embedded, packed=packed)
            states = module.final_norm(h)
            yield states, """
_HANDED_ON = "h = states if self.normalised else h"
_LOOKED_UP = """\
            embedded = embedding(tokens.where(inside, NOTHING))
            if not embedding.scatter_to_sequence:
                embedded = embedded.transpose(0, 1)
"""

MUTANTS = (
    _ahead(
        name="multi-token-one-too-few",
        wrong="Tokens and targets of a depth are those one place nearer.",
        snippet="ahead = mine + k",
        replacement="ahead = mine + k - 1",
    ),
    _ahead(
        name="multi-token-rolled-in-the-chunk",
        wrong="Each rank rolls its own chunks of the sequence.",
        snippet=_AHEAD,
        replacement="yield rows.roll(-k, -1), ahead < ends",
        seen="megatron/core/transformer/multi_token_prediction.py, roll_tensor",
    ),
    _ahead(
        name="multi-token-contiguous",
        wrong="What is gathered of zigzag chunks is taken for the sequence.",
        snippet="gathered[..., torch.cat(order).argsort().to(rows.device)]",
        replacement="gathered",
    ),
    _further(
        name="multi-token-last-counts",
        wrong="The last tokens of a sequence, which nothing follows, are in the loss.",
        snippet="counts * inside",
        replacement="counts",
    ),
    _further(
        name="multi-token-targets-stay",
        wrong="Tokens are those of the depth, targets those of the main loss.",
        snippet="torch.stack([tokens, targets, counts * inside])",
        replacement="torch.stack([tokens, rows[1], counts * inside])",
    ),
    _further(
        name="multi-token-each-of-the-model",
        wrong="Every depth begins with the model's hidden states, not those of the one before.",
        snippet=_ONE_BY_ONE,
        replacement="""states = module.final_norm(module(h, embedded, packed=packed))
            yield states, """,
    ),
    _further(
        name="multi-token-normalised-on",
        wrong="A depth hands on states that are normalised for the logits.",
        snippet=_HANDED_ON,
        replacement="h = states",
    ),
    _model(
        name="multi-token-before-the-norm",
        wrong="The first module is given states before the last norm, whatever it is to be given.",
        snippet="ended if self.config.multi_token_normalised else h,",
        replacement="h,",
    ),
    _further(
        name="multi-token-halves-exchanged",
        wrong="The embedding has the columns of the weight that are for hidden states.",
        snippet="[self.hidden_norm(h), self.embedding_norm(embedded)]",
        replacement="[self.embedding_norm(embedded), self.hidden_norm(h)]",
    ),
    _further(
        name="multi-token-weight-not-marked",
        wrong="The gradient of the weight that joins both is not summed over tp.",
        snippet="2 * config.hidden, init=init, sequence_parallel=parallel, **made",
        replacement="2 * config.hidden, init=init, **made",
    ),
    _further(
        name="multi-token-embedding-not-trained",
        wrong="The embedding gets no gradient of the tokens further on.",
        snippet="            h = module(h, embedded, packed=packed)\n",
        replacement="            h = module(h, embedded.detach(), packed=packed)\n",
    ),
    _further(
        name="multi-token-embedding-not-scattered",
        wrong="Under sequence parallelism modules read the first tokens of an embedding that is not"
        " scattered.",
        snippet=_LOOKED_UP,
        replacement="""\
            scatters, embedding.scatter_to_sequence = embedding.scatter_to_sequence, False
            embedded = embedding(tokens.where(inside, NOTHING)).transpose(0, 1)[: h.shape[0]]
            embedding.scatter_to_sequence = scatters
""",
        seen="SP-10",
    ),
    _ahead(
        name="multi-token-across-sequences",
        wrong="Tokens further on are also those of the next of several packed sequences.",
        snippet="ends = [sum(each) for",
        replacement="ends = [whole.total for",
        seen="megatron/core/transformer/multi_token_prediction.py, roll_tensor",
    ),
    _ahead(
        name="multi-token-padding-follows",
        wrong="What pads a sequence is taken for tokens that follow.",
        snippet="zip(whole.starts, whole.lengths,",
        replacement="zip(whole.starts, whole.padded_lengths,",
    ),
    _further(
        name="multi-token-layers-not-packed",
        wrong="The layers of further tokens take packed sequences for one.",
        snippet="linear(joined, self.weight), packed=packed)",
        replacement="linear(joined, self.weight))",
    ),
    _model(
        name="multi-token-copy-apart",
        wrong="The copy of an embedding that is not tied follows its own gradient.",
        snippet=_NEEDED,
        replacement="self.config.tied, self.config.tied",
    ),
    _training(
        name="multi-token-sum-of-depths",
        wrong="The losses of the depths are added, not averaged.",
        snippet=" / max(self.config.multi_token_layers, 1)",
        replacement="",
    ),
    _training(
        name="multi-token-not-scaled",
        wrong="Further tokens count as much as the next one.",
        snippet="self.config.multi_token_scaling / max",
        replacement="1.0 / max",
    ),
)
