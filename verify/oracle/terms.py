"""The terms of a case as its contract reads them: sizes and options, each checked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from verify.case import HARNESS_OPTIONS, Case, Option
from verify.errors import BadArgument


def sizes(case: Case, *names: str, optional: tuple[str, ...] = ()) -> tuple[int, ...]:
    """The sizes of `case.shape` in this order, without those that are optional.

    Raises BadArgument for a size that is missing, unknown or no whole number from 1 up.
    """
    missing = [name for name in names if name not in case.shape]
    foreign = sorted(set(case.shape) - {*names, *optional})
    if missing or foreign:
        raise BadArgument(
            f"case.shape: {case.concept} has {', '.join((*names, *optional))}"
            + f"; missing {', '.join(missing)}" * bool(missing)
            + f"; unknown {', '.join(foreign)}" * bool(foreign)
        )
    for name, size in case.shape.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise BadArgument(f"case.shape.{name}: {size!r} is no size; give a whole number from 1")
    return tuple(case.shape[name] for name in names)


def switches(case: Case, defaults: Mapping[str, bool]) -> dict[str, bool]:
    """Options that are on or off, by name, with the default of each that the case leaves out.

    Raises BadArgument for a value that is neither True nor False.
    """
    found = {name: case.options.get(name, default) for name, default in defaults.items()}
    for name, value in found.items():
        if not isinstance(value, bool):
            raise BadArgument(f"case.options.{name}: {value!r} is not one of True, False")
    return {name: bool(value) for name, value in found.items()}


def in_training(case: Case) -> bool:
    """The option `training`, on unless the case says otherwise: without it nothing is dropped."""
    return switches(case, {"training": True})["training"]


def whole_number(case: Case, name: str, *, least: int) -> int | None:
    """An option that is a whole number from `least` up, or None where the case leaves it out.

    Raises BadArgument for anything else.
    """
    value = case.options.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise BadArgument(f"case.options.{name}: {value!r} is no whole number from {least} up")
    return value


def fit(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError for a tensor of another shape, which torch might broadcast."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: {list(tensor.shape)} is not {list(shape)}")


def number(case: Case, name: str, *, least: float, below: float | None = None) -> float | None:
    """An option that is a number from `least` to below `below`, or None where it is left out.

    Raises BadArgument for anything else.
    """
    value = case.options.get(name)
    if value is None:
        return None
    allowed = f"a number from {least}" + ("" if below is None else f" to below {below}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadArgument(f"case.options.{name}: {value!r} is not {allowed}")
    if not least <= value or (below is not None and value >= below):
        raise BadArgument(f"case.options.{name}: {value!r} is not {allowed}")
    return float(value)


def one_of(case: Case, option: str, allowed: tuple[str, ...]) -> str:
    """An option that names one of several; the first is the default.

    Raises BadArgument for another name.
    """
    value = case.options.get(option, allowed[0])
    if value not in allowed:
        raise BadArgument(f"case.options.{option}: {value!r} is not one of {', '.join(allowed)}")
    return str(value)


def known_options(case: Case, *names: str) -> None:
    """Raise BadArgument for an option that is neither of these nor the harness's own."""
    if foreign := sorted(set(case.options) - {*names, *HARNESS_OPTIONS}):
        raise BadArgument(
            f"case.options: {case.concept} has no option {', '.join(foreign)}; allowed are"
            f" {', '.join((*names, *HARNESS_OPTIONS))}"
        )


def exclude(case: Case, option: str, value: Option, *, why: str) -> None:
    """Refuse `option` at `value`, in one line that says what it does not go with."""
    raise BadArgument(f"case.options.{option}: {value!r} on {case.layout}: {why}")
