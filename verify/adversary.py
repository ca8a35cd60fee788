"""What the `sim` cluster does to a program besides running it: the settings. Needs no torch.

A program that is right on every real cluster computes the same under any adversary without faults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from verify.errors import BadArgument

FaultKind = Literal["die", "flip", "drop", "duplicate"]
FAULTS = get_args(FaultKind)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens at the `number`-th communication (from 1) of global rank `rank`.

    `die`: the rank is gone instead of communicating. `flip`: one bit of what it sends is wrong.
    `drop`: the others never see the call, and this rank goes on as if it were done. `duplicate`: it
    is issued twice. Raises BadArgument for another kind, a negative rank or a number below 1.
    """

    kind: FaultKind
    rank: int
    number: int

    def __post_init__(self) -> None:
        if self.kind not in FAULTS:
            raise BadArgument(f"fault.kind: {self.kind!r} is not one of {', '.join(FAULTS)}")
        for name, least in (("rank", 0), ("number", 1)):
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, int) or given < least:
                raise BadArgument(f"fault.{name}: {given!r} is not a whole number from {least} up")

    def __str__(self) -> str:
        return f"{self.kind} at communication {self.number} of rank {self.rank}"


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """How a run is made hard, all off by default.

    `late`: an asynchronous operation writes its outputs only when the program waits for it; until
    then they are poisoned, and neither they nor what is sent may be written. `rendezvous`: a send
    is done only when it is received, as with NCCL. `schedule`: the ranks take turns at every
    communication in an order drawn from this seed, instead of each running until it has to wait.
    """

    late: bool = False
    rendezvous: bool = False
    schedule: int | None = None
    faults: tuple[Fault, ...] = ()

    def __bool__(self) -> bool:
        return self != NONE

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON types from which `from_json` makes an equal adversary."""
        return {**asdict(self), "faults": [asdict(fault) for fault in self.faults]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Adversary:
        """The adversary that `to_json` described; what is left out is off. Raises BadArgument."""
        if not isinstance(data, Mapping):
            raise BadArgument(f"adversary: expected an object, got {type(data).__name__}")
        allowed = tuple(Adversary.__dataclass_fields__)
        if foreign := sorted(set(data) - set(allowed)):
            raise BadArgument(
                f"adversary: unknown fields {foreign}; allowed are {', '.join(allowed)}"
            )
        try:
            faults = tuple(Fault(**each) for each in data.get("faults", ()))
        except TypeError as error:
            raise BadArgument(f"adversary.faults: {error}") from error
        return Adversary(**{**data, "faults": faults})

    def __str__(self) -> str:
        words = [name for name in ("late", "rendezvous") if getattr(self, name)]
        words += [] if self.schedule is None else [f"schedule={self.schedule}"]
        return " ".join([*words, *map(str, self.faults)]) or "none"


NONE = Adversary()
