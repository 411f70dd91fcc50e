"""The numbers that execution is run by."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from cqrs_es.wire import MAX_MESSAGE_BYTES

MAX_EVENTS_PER_COMMAND: Final = 10_000
# Bounds what one append transaction carries, beside the number of its commands.
MAX_APPEND_BYTES: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ExecutionPolicy:
    """How commands are batched, timed and retried; times in seconds.

    `retry_delays`: the waits before the second, third … attempt at a command
    whose handler failed unexpectedly; after the last it fails. `patience`: how
    long to go on trying while the store is away, None for as long as it takes.
    """

    batch_size: int = 500
    handler_timeout: float = 30.0
    retry_delays: tuple[float, ...] = (0.0, 0.2, 1.0, 5.0)
    patience: float | None = None
    cached_aggregates: int = 50_000
    max_event_bytes: int = 1024 * 1024
    max_message_bytes: int = MAX_MESSAGE_BYTES

    def retry_delay(self, failures: int) -> float | None:
        """Return the wait after so many failures, with jitter; None when they are enough."""
        if failures > len(self.retry_delays):
            return None
        return with_jitter(self.retry_delays[failures - 1])


def with_jitter(seconds: float) -> float:
    """Spread a wait over 75–125 %, so that those who failed together don't return together."""
    return seconds * random.uniform(0.75, 1.25)  # noqa: S311 - nothing secret about it


def backoff(attempt: int, *, first: float = 0.05, most: float = 5.0) -> float:
    """Return the wait before attempt 1, 2, 3 …: doubling, bounded, with jitter."""
    return with_jitter(min(most, first * 2 ** min(attempt - 1, 16)))
