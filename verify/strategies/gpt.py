"""Hypothesis strategies of whole models that are trained: valid cases, and ones to be refused.

All axes at once, and replicas; models small enough for that, of one layer a chunk or two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import lcm

from hypothesis import assume
from hypothesis import strategies as st

from verify.case import DTYPES, Case, Lens, Option
from verify.coverage.steering import CONCEPT, chosen
from verify.layout import Layout
from verify.runner.limits import limits
from verify.strategies.cases import (
    MAX_SEED,
    Choices,
    adversaries,
    can_be_generated,
    contract_or_none,
    with_option,
)
from verify.strategies.context import ALGORITHMS
from verify.strategies.gpt_choices import (
    DOUBLE,
    LATENT,
    MODEL,
    OPTIMIZING,
    PIPELINES,
    ROUTED,
    SCALINGS,
)
from verify.strategies.gpt_layouts import MOST_CHUNKS, SMALL, model_layouts
from verify.strategies.layouts import divisors
from verify.strategies.transformer import grouped_heads
from verify.strategies.transformer import latents as sizes_of_latents


@st.composite
def model_cases(
    draw: st.DrawFn,
    *,
    concept: str = "gpt_training",
    options: Choices = OPTIMIZING,
    model: Choices = MODEL,
    uneven: Sequence[bool] = (False, True),
    experts: Sequence[bool] = (False,),
    steps: Sequence[int] = (1, 1, 2),
    one_padding: bool = False,
    plain: bool = False,
    latent: Sequence[bool] = LATENT,
    anywhere: bool = True,
    sequence_parallel: Sequence[bool] = (False, True),
    min_pp: int = 1,
    chunks: Sequence[int] = (1, 1, 2),
    most_chunks: int = MOST_CHUNKS,
    double: Lens = "fp64",
    dtypes: Sequence[str] = DTYPES,
    worlds: Sequence[int] = SMALL,
) -> Case:
    """Cases of `gpt_training`, or of a concept with its sizes. `options` names some of training and
    the values to draw, `model` some of the model instead of those of `MODEL`; float64 is seen
    through the lens `double`; with `one_padding` the vocabulary is padded to what it would be on
    one rank. A `plain` one has no context parallelism and no padding at all, of latents some
    features with positions; of its experts a token chooses several, as a single share is always 1
    and nothing trains it. `latent` says whether attention is multi-latent. Where experts are that
    are not `anywhere`, `model_layouts` says."""
    chosen(draw, CONCEPT, (concept,))
    dtype, lens = _arithmetic(draw, double, dtypes)
    choices = _Choices(draw, {**MODEL, **model})
    routed = draw(st.sampled_from(list(experts)))
    choices.choose("attention_dropout")
    layout = draw(
        model_layouts(
            min_pp=min_pp,
            chunks=chunks,
            most_chunks=most_chunks,
            experts=routed,
            split=not (plain or choices["attention_dropout"]),
            plain=plain,
            anywhere=anywhere,
            sequence_parallel=sequence_parallel,
            worlds=worlds,
            algorithms=[str(each) for each in choices.values["algorithm"]],
        )
    )
    optimizer = chosen(draw, "optimizer", options["optimizer"]) if "optimizer" in options else None
    algorithm = choices.choose("algorithm", only=None if layout.cp > 1 else ALGORITHMS[:1])
    if algorithm == "hierarchical":
        inner = draw(st.sampled_from(divisors(layout.cp)))
        layout = dataclasses.replace(layout, hierarchical_cp=(inner, layout.cp // inner))
    least = 2 + int(str(choices.choose("multi_token")))
    packed = int(str(choices.choose("packed")))
    placement = str(choices.choose("placement"))
    shape = draw(
        _sizes(
            layout,
            str(algorithm),
            placement,
            routed=routed,
            least=least,
            packed=packed,
            plain=plain,
            latent=latent,
        )
    )
    # A whole step of Adam for a gradient of rounding errors may turn what a router decides next.
    unsure = routed and dtype != "float64"
    shape["steps"] = 1 if unsure and optimizer == "adam" else draw(st.sampled_from(list(steps)))
    case = Case(concept=concept, layout=layout, shape=shape)
    case = choices.given_to(case, adam=optimizer == "adam")
    if plain:
        vocabulary = layout.tp * draw(st.integers(2, 4))
        case = dataclasses.replace(case, shape={**case.shape, "vocabulary": vocabulary})
    else:
        case = draw(_padded(case, one_padding=one_padding))
    if draw(st.sampled_from(list(uneven))):
        case = draw(_uneven(case))
    case = draw(_trained(case, options, optimizer))
    case = draw(_calculated(case, dtype, lens))
    assume(not unsure or can_be_generated(case))
    return case


class _Choices:
    """The options of a model as they are chosen, one after the other; `values` are what each may
    have, its default first."""

    def __init__(self, draw: st.DrawFn, values: Choices) -> None:
        self.draw, self.values = draw, values
        self.made: dict[str, Option] = {}

    def __getitem__(self, name: str) -> Option:
        return self.made[name]

    def choose(self, name: str, *, only: Sequence[Option] | None = None) -> Option:
        """A value, of those of `only` that it may have."""
        values = [each for each in self.values[name] if only is None or each in only]
        self.made[name] = chosen(self.draw, name, values or list(only or ()))
        return self.made[name]

    def given_to(self, case: Case, *, adam: bool) -> Case:
        """The case with all of them, and with those that depend on them."""
        routed = "experts" in case.shape
        pairs = case.shape.get("rope_size", case.shape["head_size"]) // 2
        turned = self.choose("positions", only=None if pairs else ("none", "learned")) == "rotary"
        mask = self.choose("mask")
        rms = self.choose("norm") == "rms"
        possible: dict[str, Sequence[Option] | None] = {
            "activation": ("gelu", "swiglu") if routed else None,
            # A bias of all keys, which a layer norm of heads has, has no gradient but rounding
            # errors, and of those Adam makes steps.
            "qk_norm": None if rms else (False,),
            "bias": (False,) if adam else None,
            **({} if routed else {name: MODEL[name][:1] for name in ROUTED}),
            "interleaved": None if turned else (False,),
            "multi_token_scaling": None if self["multi_token"] else SCALINGS[:1],
            "multi_token_normalised": None if self["multi_token"] else (False,),
            "pipeline": None if case.layout.vpp == 1 else PIPELINES[:1],
        }
        for name in self.values:
            if name not in self.made:
                self.choose(name, only=possible.get(name))
        for name, value in self.made.items():
            case = with_option(case, name, value, default=MODEL[name][0])
        dim = 2 * self.draw(st.integers(1, pairs)) if turned else None
        case = with_option(case, "rotary_dim", dim, default=None)
        return with_option(case, "window", 2 if mask == "sliding_window" else None, default=None)


def _arithmetic(draw: st.DrawFn, double: Lens, dtypes: Sequence[str]) -> tuple[str, Lens]:
    """Dtype and lens, of those that this run has if there are any."""
    lenses: dict[str, Lens] = {n: double if n == "float64" else "native" for n in dtypes}
    wanted = [n for n in dtypes if lenses[n] in limits().lenses] or list(dtypes)
    # Rounded arithmetic takes many runs of the reference: it is offered to one case in four.
    exact = draw(st.sampled_from((True, True, True, False)))
    dtype = chosen(draw, "dtype", [n for n in wanted if (n == "float64") is exact] or wanted)
    return dtype, chosen(draw, "lens", (lenses[dtype],))


@st.composite
def _calculated(draw: st.DrawFn, case: Case, dtype: str, lens: Lens) -> Case:
    """The case with its arithmetic, seed and adversary."""
    seed, hard = draw(st.integers(0, MAX_SEED)), draw(adversaries())
    if hard:
        hard = dataclasses.replace(hard, rendezvous=draw(st.booleans()))
    return dataclasses.replace(case, lens=lens, dtype=dtype, seed=seed, adversary=hard)


@st.composite
def _padded(draw: st.DrawFn, case: Case, *, one_padding: bool) -> Case:
    """The case with what its vocabulary is padded to a multiple of."""
    # A multiple of tp would be padded alike where tp is forgotten.
    multiple = draw(st.sampled_from((1, 1, 2, 3, 3)))
    if one_padding:
        padded = multiple * case.layout.tp * draw(st.integers(1, 3))
        vocabulary = padded - draw(st.integers(0, multiple - 1))
        case = dataclasses.replace(case, shape={**case.shape, "vocabulary": vocabulary})
    return with_option(case, "multiple", multiple, default=1)


@st.composite
def _sizes(
    draw: st.DrawFn,
    layout: Layout,
    algorithm: str,
    placement: str,
    *,
    routed: bool,
    least: int,
    packed: int,
    plain: bool,
    latent: Sequence[bool],
) -> dict[str, int]:
    """Sizes that divide as the layout asks, and no larger than that by much; rows have `least`
    tokens or more, and room for so many `packed` sequences; some have latents, as `latent`
    says."""
    tp, chunks = layout.tp, layout.pp * layout.vpp
    unit = layout.cp * (2 if placement == "zigzag" else 1)
    # Without sequence parallelism, experts share out the tokens of a tp group.
    unit *= tp if layout.sequence_parallel or routed else 1
    grouped = layout.vpp > 1
    microbatches = layout.pp if grouped else draw(st.sampled_from((1, 2, 2, 3)))
    shape = {
        "microbatches": microbatches,
        "sequence": unit * max(draw(st.integers(1, 2)), -(-least // unit), packed + (unit == 1)),
        "batch": layout.dp * draw(st.integers(1, 2)),
        "hidden": draw(st.integers(3, 5)),
        **draw(grouped_heads(layout, algorithm, most=4)),
        "ffn": tp * draw(st.integers(1, 2)),
        "layers": chunks * draw(st.integers(1, 2 if chunks <= 2 else 1)),
        "vocabulary": draw(st.integers(2, 9)),
    }
    if draw(st.sampled_from(latent)):
        shape |= draw(sizes_of_latents(shape["heads"], least=2 if plain else 1))
    if routed:
        shape["ffn"] = lcm(tp, layout.expert_tp) * draw(st.integers(1, 2))
        fewest = 2 if plain else 1
        each = -(-fewest // layout.ep)
        shape["experts"] = layout.ep * draw(st.integers(each, each + 1))
        shape["top_k"] = draw(st.integers(fewest, min(shape["experts"], fewest + 1)))
        if draw(st.booleans()):
            shape["shared_ffn"] = tp * draw(st.integers(1, 2))
    return shape


@st.composite
def _uneven(draw: st.DrawFn, case: Case) -> Case:
    """The case with other numbers of layers on the first stage, the last, or every chunk."""
    layout, chunks = case.layout, case.layout.pp * case.layout.vpp
    if chunks == 1:
        return case
    if draw(st.booleans()):
        ends, most = {0, chunks - 1}, 2 if chunks < 4 else 1
        counts = [draw(st.integers(0 if k in ends else 1, most)) for k in range(chunks)]
        assume(sum(counts))
        shape = {**case.shape, "layers": sum(counts)}
        options = {**case.options, "split": ",".join(map(str, counts))}
        return dataclasses.replace(case, shape=shape, options=options)
    each = case.shape["layers"] // layout.pp
    other = 2 * layout.vpp if each == layout.vpp else layout.vpp
    layers, options = case.shape["layers"], dict(case.options)
    kinds = [{"first": other}, {"last": other}]
    kinds += [{"first": other, "last": each}, {"first": each, "last": other}]
    if layout.pp > 2:
        kinds.append({"first": other, "last": other})
    for name, own in draw(st.sampled_from(kinds)).items():
        layers += own - each
        options[name] = own
    return dataclasses.replace(case, shape={**case.shape, "layers": layers}, options=options)


@st.composite
def _trained(draw: st.DrawFn, case: Case, options: Choices, optimizer: Option) -> Case:
    """The case with options of training, which are checked together; the optimizer is chosen."""
    for name, values in options.items():
        if name == "momentum" and optimizer == "adam":
            values = (0.0,)
        elif name in ("hysteresis", "overflow"):
            values = [value for value in values if _scaled(case, name, value)]
        elif name == "decay" and case.options.get("schedule", "constant") != "constant":
            values = [value for value in values if value is not None]
        value = optimizer if name == "optimizer" else chosen(draw, name, values)
        case = with_option(case, name, value, default=OPTIMIZING[name][0])
    assume(contract_or_none(case) is not None)
    return case


def _scaled(case: Case, name: str, value: Option) -> bool:
    """Whether a case can have a value of an option of its loss scale, which may have none."""
    kind, default = case.options.get("loss_scale", "none"), OPTIMIZING[name][0]
    if name == "overflow":
        fits = kind != "none" and int(str(value)) <= case.shape["steps"]
        return value == default or (fits and case.options.get("frozen") != "embedding")
    return value == default or kind == "dynamic"


@st.composite
def refusable_model_cases(draw: st.DrawFn) -> Case:
    """Cases that are valid but for one size or option."""
    case = draw(
        model_cases(
            options={"optimizer": ("sgd", "adam")},
            uneven=(False,),
            min_pp=2,
            dtypes=DOUBLE,
        )
    )
    chunks = case.layout.pp * case.layout.vpp
    layers = case.shape["layers"]
    faults: list[tuple[dict[str, int], dict[str, Option]]] = [
        ({"layers": layers + draw(st.integers(1, chunks - 1))}, {}),
        ({}, {"first": layers + chunks}),
        ({}, {"split": ",".join(["1"] * (chunks + 1))}),
        (
            {},
            {"split": ",".join([str(layers // chunks)] * chunks), "last": layers // case.layout.pp},
        ),
        ({}, {"split": ",".join(map(str, [layers + 1] * chunks))}),
        ({}, {"pipeline": "dualpipe"}),
        ({}, {"positions": "sinusoidal"}),
        ({}, {"hidden_dropout": 1.0}),
        ({}, {"multiple": -2}),
        ({}, {"every": -1}),
        # There are no experts.
        ({}, {"every": 2}),
        ({}, {"clip": -1.0}),
        ({}, {"multi_token": -2}),
        ({}, {"multi_token_scaling": -0.5}),
    ]
    # More often, as what one stage can see has to end all of them.
    long = 1 if "packed" in case.options else case.shape["sequence"] - 1
    faults += [({}, {"max_sequence": long})] * 4
    if chunks > 2:
        faults.append(({}, {"split": ",".join(map(str, [layers, *[0] * (chunks - 1)]))}))
    if case.layout.pp == 2:
        faults.append(({}, {"first": layers, "last": chunks}))
        # Layers that neither of the two stages has.
        ends = {"first": case.layout.vpp, "last": case.layout.vpp}
        faults.append(({"layers": layers + chunks}, {**ends}))
    if case.layout.vpp > 1:
        faults.append(({"microbatches": case.layout.pp * 2 + 1}, {}))
        faults.append(({}, {"pipeline": "1f1b"}))
    shape, options = draw(st.sampled_from(faults))
    return dataclasses.replace(
        case,
        shape={**case.shape, **shape},
        options={**case.options, **options},
        seed=draw(st.integers(0, MAX_SEED)),
    )
