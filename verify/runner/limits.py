"""What this run can check: how large a world may be, and which lenses are wanted.

Strategies read it while they draw, so that what cannot run is not drawn in the first place. The
pytest plugin sets it before any property is imported; without one, nothing is limited but by the
strategies themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from verify.case import LENSES, Case, Lens


@dataclass(frozen=True)
class Limits:
    """The largest world of the cluster (None: whatever is drawn), the wanted lenses, and whether
    cases have an adversary, or a machine that stops."""

    max_world_size: int | None = None
    lenses: tuple[Lens, ...] = LENSES
    adversaries: bool = True

    def world_size(self, wanted: int) -> int:
        """The largest world to draw where a property wants worlds of up to `wanted`."""
        return wanted if self.max_world_size is None else min(wanted, self.max_world_size)

    def excludes(self, case: Case) -> str | None:
        """Why the case is none for this run; None where it is one."""
        size = case.layout.world_size
        if self.world_size(size) < size:
            return f"it needs more than the {self.max_world_size} ranks of this run"
        if case.lens not in self.lenses:
            return f"the lens {case.lens} is not one of --lens {','.join(self.lenses)}"
        if case.adversary and not self.adversaries:
            return "this run has no adversary"
        # What all ranks flush is seen in one process only. A known case may ask for it elsewhere.
        if case.options.get("stopped") == "machine" and not self.adversaries:
            return "no machine stops in this run: that is for the cluster sim with an adversary"
        return None


class _Present:
    """The limits of this process."""

    limits = Limits()


def limits() -> Limits:
    """The limits of the run in this process."""
    return _Present.limits


def set_limits(given: Limits) -> None:
    """Change the limits of this process."""
    _Present.limits = given
