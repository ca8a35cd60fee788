"""What tells a transformer where a token is: rotary and learned positions.

Both depend on a token's position in the whole sequence, wherever its chunk lies, and in packed
sequences on that in its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verify.case import Case
from verify.errors import BadArgument
from verify.oracle.context import PLACEMENTS, Sequences, sequences_of
from verify.oracle.contract import Contract, Step, Tensors, TensorSpec
from verify.oracle.terms import fit, known_options, number, one_of, sizes, switches, whole_number
from verify.placement import Placements, Replicate, Shard

BASE = 10000.0


def positions_of(sequences: Sequences) -> Tensor:
    """The position of every place, float64."""
    return torch.cat([torch.arange(n, dtype=torch.float64) for n in sequences.padded])


def rotated(
    x: Tensor, positions: Tensor, *, dim: int | None, base: float, interleaved: bool
) -> Tensor:
    """`x` [sequence, batch, heads, features], the first `dim` features of which (None: all), as
    complex numbers, are multiplied by exp(i position base^(-2 j / dim)); pair j is of neighbours if
    interleaved, else of the two halves."""
    dim = x.shape[-1] if dim is None else dim
    fit("x", x, (*positions.shape, *x.shape[1:3], x.shape[-1]))
    wide = x[..., :dim].to(torch.promote_types(x.dtype, torch.float32))
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turns = torch.polar(torch.ones(()).double(), torch.outer(positions, frequencies))
    turns = turns.to(torch.promote_types(wide.dtype, torch.complex64))[:, None, None, :]
    by_pair = wide.unflatten(-1, (dim // 2, 2) if interleaved else (2, dim // 2))
    by_pair = by_pair if interleaved else by_pair.transpose(-1, -2)
    # Parts of other tensors, as x and gradients may be, may begin at an odd element, where no
    # complex number does.
    by_pair = by_pair.clone(memory_format=torch.contiguous_format)
    product = torch.view_as_complex(by_pair) * turns
    turned = torch.stack((product.real, product.imag), -1)
    turned = turned if interleaved else turned.transpose(-1, -2)
    return torch.cat((turned.flatten(-2).to(x.dtype), x[..., dim:]), -1)


def rotary(case: Case) -> Contract:
    """x, y [sequence, batch, heads, head_size] and gradients ZigzagShard(0) or Shard(0) over cp and
    Shard(2) over tp. Communicates nothing and keeps nothing of x.

    Options: `rotary_dim`, all features unless given; `base`; `interleaved`; placement and packed as
    of `context_split`. Raises BadArgument for a rotary_dim that is odd or exceeds the head, and a
    base that is not positive.
    """
    known_options(case, "rotary_dim", "base", "interleaved", "placement", "packed")
    sequence, batch, heads, size = sizes(case, "sequence", "batch", "heads", "head_size")
    dim = whole_number(case, "rotary_dim", least=2)
    if (size if dim is None else dim) % 2 or (dim or 0) > size:
        raise BadArgument(
            f"case.options.rotary_dim: {dim or size} of {size} features; give an even number"
        )
    base = number(case, "base", least=1e-3) or BASE
    interleaved = switches(case, {"interleaved": False})["interleaved"]
    placement = one_of(case, "placement", PLACEMENTS)
    sequences = sequences_of(case, sequence, placement)
    placed: Placements = {"cp": sequences.cut(placement), "tp": Shard(2)}
    spec = TensorSpec((sequence, batch, heads, size), placed, placed)
    positions = positions_of(sequences)

    def reference(inputs: Tensors, parameters: Tensors) -> Tensors:
        x = inputs["x"]
        sequences.check(inputs)
        return {"y": rotated(x, positions, dim=dim or size, base=base, interleaved=interleaved)}

    return Contract(
        axes=("tp", "cp"),
        inputs={"x": spec, **sequences.inputs},
        parameters={},
        outputs={"y": spec},
        reference=reference,
        forward=(),
        backward=(),
        finish=(),
        kept=2 * (sequence // case.layout.cp) * ((dim or size) // 2),
    )


def position_embedding(case: Case) -> Contract:
    """y = x + weight[position], x, y [sequence, batch, hidden] and gradients ZigzagShard(0) or
    Shard(0) over cp, and over tp Replicate, or Shard(0) of what a rank of cp has with sequence
    parallelism. weight [max_positions, hidden] Replicate, its gradient complete after
    finish_gradients.

    Options placement and packed as of `context_split`. The reference raises BadArgument for a
    sequence that is longer than there are positions.
    """
    known_options(case, "placement", "packed")
    sequence, batch, hidden, most = sizes(case, "sequence", "batch", "hidden", "max_positions")
    placement, parallel = one_of(case, "placement", PLACEMENTS), case.layout.sequence_parallel
    sequences = sequences_of(case, sequence, placement)
    placed: Placements = {
        "cp": sequences.cut(placement),
        "tp": Shard(0) if parallel else Replicate(),
    }
    spec = TensorSpec((sequence, batch, hidden), placed, placed)
    positions = positions_of(sequences).long()
    sums = [Step("all_reduce", "cp", most * hidden)]
    sums += [Step("all_reduce", "tp", most * hidden)] if parallel else []

    def reference(inputs: Tensors, parameters: Tensors) -> Tensors:
        if int(positions.max()) >= most:
            raise BadArgument(
                f"case.shape.max_positions: {most} are fewer than the positions of a sequence of"
                f" {max(sequences.padded)}"
            )
        x = inputs["x"]
        sequences.check(inputs)
        # One sequence may have any length.
        where = positions if sequences.packed else torch.arange(x.shape[0])
        fit("x", x, (len(where), *x.shape[1:2], hidden))
        return {"y": x + parameters["weight"][where][:, None]}

    return Contract(
        axes=("tp", "cp"),
        inputs={"x": spec, **sequences.inputs},
        parameters={"weight": (most, hidden)},
        outputs={"y": spec},
        reference=reference,
        linear=True,
        forward=(),
        backward=(),
        finish=tuple(sums),
    )
