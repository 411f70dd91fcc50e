"""What an executor is run with: its numbers, and whom it tells of what it does."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final, TypeAlias

import msgspec

from cqrs_es.aggregate import NO_RETRIES, Retries
from cqrs_es.execution.retry import with_jitter
from cqrs_es.messages import CommandMessage
from cqrs_es.telemetry.metrics import NO_METER, Meter
from cqrs_es.telemetry.tracing import NO_TRACING, Tracing
from cqrs_es.wire import MAX_MESSAGE_BYTES

MAX_EVENTS_PER_COMMAND: Final = 10_000
# Bounds what one append transaction carries, beside the number of its commands.
MAX_APPEND_BYTES: Final = 4 * 1024 * 1024

OnHandlerFailure: TypeAlias = Callable[[CommandMessage, BaseException], None]


@dataclass(frozen=True, slots=True)
class ExecutionPolicy:
    """How commands are batched, timed and retried; times in seconds.

    `retry_delays`: the waits before the second, third … attempt at a command
    whose handler failed unexpectedly; after the last it fails. `retries` are those of an
    application for what it names. `patience`: how
    long to go on trying while the store is away, None for as long as it takes.
    `cache_bytes`: how much memory the states of aggregates used last may take.
    """

    batch_size: int = 500
    handler_timeout: float = 30.0
    retry_delays: tuple[float, ...] = (0.0, 0.2, 1.0, 5.0)
    retries: Retries = NO_RETRIES
    patience: float | None = None
    cache_bytes: int = 64 * 1024 * 1024
    max_event_bytes: int = 1024 * 1024
    max_message_bytes: int = MAX_MESSAGE_BYTES

    def retry_delay(
        self, failures: int, exc: BaseException, own: Retries = NO_RETRIES
    ) -> float | None:
        """Return the wait after so many failures, with jitter; None when they are enough.

        An aggregate's `own` retries go before the application's.
        """
        waits = own.waits_after(exc)
        if waits is None:
            waits = self.retries.waits_after(exc)
        if waits is None:
            waits = self.retry_delays
        return with_jitter(waits[failures - 1]) if failures <= len(waits) else None


class Hooks(msgspec.Struct, frozen=True, kw_only=True):
    """Called on the hot path: they wait for nothing and raise nothing.

    `on_failure` is told of every exception that a handler raises unexpectedly;
    `on_commit` is called after each commit that wrote events, `on_scheduled` after each
    that scheduled commands, with their partitions.
    """

    on_failure: OnHandlerFailure | None = None
    on_commit: Callable[[], None] | None = None
    on_scheduled: Callable[[Collection[int]], None] | None = None
    meter: Meter = NO_METER
    tracing: Tracing = NO_TRACING


NO_HOOKS: Final = Hooks()
