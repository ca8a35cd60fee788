"""Spreads units over the workers of a Ray cluster, embedded where no address is given."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from verify.campaign.plan import Unit
from verify.errors import BadArgument

ATTEMPTS = 3
_STORE_BYTES = 100 * 2**20
_TICK_SECONDS = 0.5
# Ray's workers yield to all others by default, and a campaign on a busy machine would stand still.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
}


@dataclass(frozen=True)
class Outcome:
    """How an attempt at a unit ended: with the run's `document` and the failing `examples` that are
    new, or without a document, `lost` says why, and `retried` whether there is another attempt."""

    unit: Unit
    document: dict[str, Any] | None
    examples: Mapping[str, str]
    lost: str = ""
    retried: bool = False


class Engine:
    """A Ray cluster that has units in flight for at most `workers` workers."""

    def __init__(self, ray: Any, workers: int, work: Callable[..., str]) -> None:
        self.workers, self._ray = workers, ray
        # Lost workers are counted here, so that the campaign can say so.
        self._work = ray.remote(num_cpus=1, max_retries=0)(work)

    def outcomes(
        self, units: Sequence[Unit], arguments: Callable[[Unit], tuple[Any, ...]]
    ) -> Iterator[Outcome | None]:
        """Every attempt as it ends, in any order; None when there is time to draw. A unit whose
        worker is lost, or that ends without a report, is tried `ATTEMPTS` times."""
        waiting, attempts = deque(units), Counter[Unit]()
        flying: dict[Any, Unit] = {}
        while waiting or flying:
            while waiting and len(flying) < self.workers:
                unit = waiting.popleft()
                attempts[unit] += 1
                flying[self._work.remote(*arguments(unit))] = unit
            ready, _ = self._ray.wait(list(flying), num_returns=1, timeout=_TICK_SECONDS)
            if not ready:
                yield None
            for each in ready:
                outcome = self._outcome(each, flying.pop(each))
                if outcome.document is None and attempts[outcome.unit] < ATTEMPTS:
                    waiting.append(outcome.unit)
                    outcome = replace(outcome, retried=True)
                yield outcome

    def _outcome(self, reference: Any, unit: Unit) -> Outcome:
        try:
            answer = json.loads(self._ray.get(reference))
        except self._ray.exceptions.RayError as error:
            said = str(error).strip().splitlines()
            return Outcome(unit, None, {}, f"{type(error).__name__}: {said[-1] if said else ''}")
        lost = "" if answer["document"] else f"no report: {answer['said']}"
        return Outcome(unit, answer["document"], answer["examples"], lost)


@contextmanager
def engine(address: str | None, workers: int | None, work: Callable[..., str]) -> Iterator[Engine]:
    """A connection to the Ray cluster at `address`, or one of this machine with `workers` workers.

    Raises BadArgument where Ray is not installed or the address does not answer.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise BadArgument("campaign: Ray is not installed; install shardproof[campaign]") from None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    try:
        if address is None:
            ray.init(
                num_cpus=workers or os.cpu_count(),
                include_dashboard=False,
                object_store_memory=_STORE_BYTES,
                **quiet,
            )
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = "started here" if address is None else f"at {address}"
        raise BadArgument(f"--address: no Ray cluster {where}: {error}") from error
    try:
        yield Engine(ray, workers or max(1, int(ray.cluster_resources().get("CPU", 1))), work)
    finally:
        ray.shutdown()
