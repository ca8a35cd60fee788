"""The output linear and its cross entropy in one, the logits for some rows of the sequence at a
time: the loss of `vocab_cross_entropy` of hidden weight^T, which is nowhere whole.
"""

from __future__ import annotations

from torch.nn import functional as F

from verify.case import Case
from verify.oracle.contract import Contract, Step, Tensors, TensorSpec
from verify.oracle.cross_entropy import OPTIONS as _OF_THE_LOSS
from verify.oracle.cross_entropy import losses_of
from verify.oracle.terms import fit, known_options, sizes, switches, whole_number
from verify.placement import Placements, Replicate, Shard

OPTIONS = (*_OF_THE_LOSS, "chunk", "loss_mask")


def linear_cross_entropy(case: Case) -> Contract:
    """hidden [sequence, batch, hidden] and its gradient Replicate over tp, or Shard(0) with
    sequence parallelism; weight [vocabulary, hidden] Shard(0); targets and loss [sequence, batch]
    Replicate.

    Options: those of `vocab_cross_entropy`; `chunk`, so many rows of the sequence at a time (1);
    `loss_mask`, an input [sequence, batch] that multiplies the loss.

    Communicates, for each chunk, the maximum, and the sums of the loss; of hidden states what a
    column linear does. Keeps the hidden states, and three numbers a token, with a mask four.
    """
    known_options(case, *OPTIONS)
    names = ("sequence", "batch", "hidden", "vocabulary")
    sequence, batch, hidden, vocabulary = sizes(case, *names, optional=("real_vocabulary",))
    real, losses = losses_of(case)
    chunk = whole_number(case, "chunk", least=1) or 1
    masked = switches(case, {"loss_mask": False})["loss_mask"]
    parallel, tp = case.layout.sequence_parallel, case.layout.tp
    placed: Placements = {"tp": Shard(0) if parallel else Replicate()}
    alike: Placements = {"tp": Replicate()}
    elements = sequence * batch * hidden

    def reference(inputs: Tensors, parameters: Tensors) -> Tensors:
        logits = F.linear(inputs["hidden"], parameters["weight"])
        loss = losses(logits, inputs["targets"])
        if not masked:
            return {"loss": loss}
        fit("loss_mask", inputs["loss_mask"], loss.shape)
        return {"loss": loss * inputs["loss_mask"]}

    tokens, terms = (sequence, batch), 3 if case.options.get("label_smoothing") else 2
    inputs = {
        "hidden": TensorSpec((*tokens, hidden), placed, placed, terms=1.0),
        "targets": TensorSpec(tokens, grad_placements=None, high=real),
    }
    inputs |= {"loss_mask": TensorSpec(tokens, grad_placements=None)} if masked else {}
    rows = [min(chunk, sequence - start) * batch for start in range(0, sequence, chunk)]
    forward = [Step("all_reduce", "tp", count * n) for n in rows for count in (1, terms)]
    backward = [Step("all_reduce", "tp", elements)]
    if parallel:
        gather = Step("all_gather", "tp", elements // tp)
        forward = [gather, *forward]
        backward = [gather, Step("reduce_scatter", "tp", elements)]
    return Contract(
        inputs=inputs,
        parameters={"weight": (vocabulary, hidden)},
        outputs={"loss": TensorSpec(tokens, alike, alike, terms=1.0)},
        reference=reference,
        divided={"vocabulary": vocabulary},
        # A token takes from the row of its target what it adds to all, which may be the same one.
        terms={"weight": (elements / real) ** 0.5},
        forward=tuple(forward),
        backward=tuple(backward),
        finish=(),
        kept=elements // (tp if parallel else 1) + sequence * batch * (4 if masked else 3),
    )
