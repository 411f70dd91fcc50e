"""Messages that no outcome is possible for: put among the dead letters, wherever they turn up."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import structlog

from cqrs_es import errors, wire
from cqrs_es.execution.retry import backoff
from cqrs_es.ports.dead_letters import DeadLetter

if TYPE_CHECKING:
    from cqrs_es.ports.broker import CommandIntake, Delivery
    from cqrs_es.runtime.process import Process

log = structlog.get_logger("cqrs_es.worker")

IMPORTED_AT_ONCE: Final = 100


class DeadMessages:
    """Buries messages that no outcome is possible for, and counts them."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.buried = 0

    async def bury(self, delivery: Delivery, reason: str) -> None:
        """Put a message among the dead letters.

        Where the id that it bears has a letter already, of a command that
        failed perhaps, that one stays, and this one goes by its content.
        """
        letter = self._letter(delivery, reason)
        outage, letters = self._process.outage(), self._process.storage.dead_letters
        known = await outage.wait_out(lambda: letters.get(letter.id))
        if known is not None and known.body_hash != letter.body_hash:
            letter = replace(letter, id=letter.body_hash[:32])
        await outage.wait_out(lambda: letters.add(letter))
        self.buried += 1
        self._process.meter.dead_message()
        log.warning("message buried", dead_letter=letter.id, reason=reason)

    def _letter(self, delivery: Delivery, reason: str) -> DeadLetter:
        return DeadLetter.of(
            delivery.body,
            reason=reason,
            source="commands",
            seen_at=self._process.clock.now(),
            limit=self._process.settings.max_message_bytes,
            command_id=wire.command_id_of(delivery.body),
            headers=delivery.headers,
        )

    async def import_forever(self, consumer: str) -> None:
        """Bury what the broker itself gave up, for ever; return where brokers don't do that.

        A broker that fails here does not keep the partition from being worked on.
        """
        attempt = 0
        while True:
            try:
                intake = await self._process.broker.open_dead_intake(consumer)
                if intake is None:
                    return
                attempt = 0
                await self._import_from(intake)
            except errors.BrokerUnavailable as exc:
                attempt += 1
                log.warning("dead letters not imported", error=exc.message)
                await self._process.clock.sleep(backoff(attempt))

    async def _import_from(self, intake: CommandIntake) -> None:
        try:
            while True:
                for delivery in await intake.receive(IMPORTED_AT_ONCE):
                    await self.bury(
                        delivery, delivery.headers.get("reason", "the broker gave it up")
                    )
                    await intake.settle([delivery])
        finally:
            await intake.close()
