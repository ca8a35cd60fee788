"""The key-value store of a simulated world, whose waits the scheduler sees."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from verify.cluster.sim.scheduler import Run


class SimStore(dist.Store):
    """A torch.distributed store shared by the ranks of one run. A blocking `get` or `wait` hands
    over to the other ranks; when none of them can go on, it is reported as a deadlock."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: Any) -> None:
        self._values[key] = value.encode() if isinstance(value, str) else bytes(value)
        self._run.progress()

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def add(self, key: str, amount: int) -> int:
        total = int(self._values.get(key, b"0")) + amount
        self.set(key, str(total))
        return total

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        old = self._values.get(key)
        wanted = expected.encode() if isinstance(expected, str) else bytes(expected)
        if (old is None and not wanted) or old == wanted:
            self.set(key, desired)
        return self._values.get(key, wanted)

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are set. A program may poll, so others get their turn."""
        if not self._has(keys):
            self._run.give_way()
        return self._has(keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._run.wait_for(lambda: self._has(keys), f"store keys {', '.join(keys)}")

    def delete_key(self, key: str) -> bool:
        return self._values.pop(key, None) is not None

    def num_keys(self) -> int:
        return len(self._values)

    def _has(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def set_timeout(self, timeout: timedelta) -> None:
        """Has no effect: a wait that cannot end is known at once and needs no timeout."""
