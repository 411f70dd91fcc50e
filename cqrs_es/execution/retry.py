"""Trying again: how long to wait before it, and waiting for a store that is away."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, TypeVar

import structlog

from cqrs_es import errors
from cqrs_es.telemetry.metrics import NO_METER, Meter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cqrs_es.ports.clock import Clock

T = TypeVar("T")
log = structlog.get_logger("cqrs_es.execution")


def with_jitter(seconds: float) -> float:
    """Spread a wait over 75–125 %, so that those who failed together don't return together."""
    return seconds * random.uniform(0.75, 1.25)  # noqa: S311 - nothing secret about it


def backoff(attempt: int, *, first: float = 0.05, most: float = 5.0) -> float:
    """Return the wait before attempt 1, 2, 3 …: doubling, bounded, with jitter."""
    return with_jitter(min(most, first * 2 ** min(attempt - 1, 16)))


class Outage:
    """Counts how long a store has been away, and waits ever longer between probes."""

    def __init__(self, clock: Clock, patience: float | None, meter: Meter = NO_METER) -> None:
        self._clock = clock
        self._meter = meter
        self._patience = patience
        self._since: float | None = None
        self._probes = 0
        self.reason: str | None = None

    async def wait_out(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call that changes nothing, again and again until the store answers.

        Raises the last `StoreUnavailable` when patience is spent.
        """
        while True:
            try:
                result = await call()
            except errors.StoreUnavailable as exc:
                await self.pause(exc)
            else:
                self.over()
                return result

    async def pause(self, exc: errors.StoreUnavailable) -> None:
        """Wait before the next probe; raise `exc` when patience is spent."""
        now = self._clock.monotonic()
        if self._since is None:
            self._since = now
        if self._patience is not None and now - self._since >= self._patience:
            self._since = None
            raise exc
        self._probes += 1
        self.reason = exc.message
        self._meter.retry("store")
        delay = backoff(self._probes)
        log.warning("store unavailable", error=exc.message, probes=self._probes, retry_in=delay)
        await self._clock.sleep(delay)

    def over(self) -> None:
        """Note that the store has answered."""
        if self._probes:
            log.info("store available again", probes=self._probes)
        self._since, self._probes, self.reason = None, 0, None
