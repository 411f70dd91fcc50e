"""Trying again: how long to wait before it, and waiting for what is away."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, TypeVar

from cqrs_es import errors
from cqrs_es.ports.clock import Clock, SystemClock
from cqrs_es.telemetry.lines import get_logger
from cqrs_es.telemetry.metrics import NO_METER, Meter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from structlog.typing import FilteringBoundLogger

T = TypeVar("T")
log = get_logger("cqrs_es.execution")


def with_jitter(seconds: float) -> float:
    """Spread a wait over 75–125 %, so that those who failed together don't return together."""
    return seconds * random.uniform(0.75, 1.25)  # noqa: S311 - nothing secret about it


def backoff(attempt: int, *, first: float = 0.05, most: float = 5.0) -> float:
    """Return the wait before attempt 1, 2, 3 …: doubling, bounded, with jitter."""
    return with_jitter(min(most, first * 2 ** min(attempt - 1, 16)))


class Retry:
    """Logs the errors of a block that is done again, and waits ever longer between them.

        retry = Retry(log, "heads unreadable")
        while True:
            async with retry:
                await self._look()

    Errors of other kinds than `bears`, and those of `never`, are raised. A block
    without an error ends the series.
    """

    def __init__(
        self,
        log: FilteringBoundLogger,
        event: str,
        *,
        bears: type[Exception] = errors.Unavailable,
        never: type[Exception] = errors.StoreUnusable,
        clock: Clock | None = None,
    ) -> None:
        self._log = log
        self._event = event
        self._bears = bears
        self._never = never
        self._clock = clock or SystemClock()
        self.failures = 0
        self.reason: str | None = None

    async def wait_out(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call that may be made again, until it succeeds; return its result."""
        while True:
            async with self:
                return await call()

    async def __aenter__(self) -> None: ...

    async def __aexit__(
        self, _type: object, error: BaseException | None, _traceback: object
    ) -> bool:
        if error is None:
            self.over()
        elif isinstance(error, self._bears) and not isinstance(error, self._never):
            await self.pause(error)
            return True
        return False

    async def pause(self, error: Exception) -> None:
        """Log an error, and wait before the next attempt."""
        self.failures += 1
        delay = backoff(self.failures)
        unexpected = None if isinstance(error, errors.CqrsError) else error
        self.reason = error.message if isinstance(error, errors.CqrsError) else repr(error)
        self._log.warning(
            self._event,
            error=self.reason,
            failures=self.failures,
            retry_in=round(delay, 2),
            exc_info=unexpected,
        )
        await self._clock.sleep(delay)

    def over(self) -> None:
        """End the series: it works again."""
        self.failures, self.reason = 0, None


class Outage(Retry):
    """Probes a store that is away; raises the last `StoreUnavailable` when patience is spent."""

    def __init__(self, clock: Clock, patience: float | None, meter: Meter = NO_METER) -> None:
        super().__init__(log, "store unavailable", bears=errors.StoreUnavailable, clock=clock)
        self._meter = meter
        self._patience = patience
        self._since: float | None = None

    async def pause(self, error: Exception) -> None:
        """Wait before the next probe; raise `error` when patience is spent."""
        now = self._clock.monotonic()
        if self._since is None:
            self._since = now
        if self._patience is not None and now - self._since >= self._patience:
            self._since = None
            raise error
        self._meter.retry("store")
        await super().pause(error)

    def over(self) -> None:
        """Note that the store has answered."""
        if self.failures:
            log.info("store available again", failures=self.failures)
            self._since = None
            super().over()
