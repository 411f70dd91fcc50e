"""Whom execution tells of what it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cqrs_es.messages import CommandMessage
from cqrs_es.telemetry.meter import NO_METER, Meter
from cqrs_es.telemetry.tracing import NO_TRACING, Tracing

OnHandlerFailure = Callable[[CommandMessage, BaseException], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """Called on the hot path: they wait for nothing and raise nothing.

    `on_failure` is told of every exception that a handler raises unexpectedly;
    `on_commit` is called after each commit that wrote events.
    """

    on_failure: OnHandlerFailure | None = None
    on_commit: Callable[[], None] | None = None
    meter: Meter = NO_METER
    tracing: Tracing = NO_TRACING


NO_HOOKS = Hooks()
