"""Bringing home what the broker itself gave up, so that all dead letters are in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import structlog

from cqrs_es import errors
from cqrs_es.execution.policy import backoff

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cqrs_es.ports.broker import Broker, CommandIntake, Delivery
    from cqrs_es.ports.clock import Clock

    Bury = Callable[[Delivery, str], Awaitable[None]]

log = structlog.get_logger("cqrs_es.worker")

AT_ONCE: Final = 100


async def import_dead_letters(broker: Broker, clock: Clock, consumer: str, bury: Bury) -> None:
    """Bury what the broker gave up, for ever; return where brokers don't do that.

    A broker that fails here does not keep the partition from being worked on.
    """
    attempt = 0
    while True:
        try:
            intake = await broker.open_dead_intake(consumer)
            if intake is None:
                return
            attempt = 0
            await _bury_all(intake, bury)
        except errors.BrokerUnavailable as exc:
            attempt += 1
            log.warning("dead letters not imported", error=exc.message)
            await clock.sleep(backoff(attempt))


async def _bury_all(intake: CommandIntake, bury: Bury) -> None:
    try:
        while True:
            for delivery in await intake.receive(AT_ONCE):
                await bury(delivery, delivery.headers.get("reason", "the broker gave it up"))
                await intake.settle([delivery])
    finally:
        await intake.close()
