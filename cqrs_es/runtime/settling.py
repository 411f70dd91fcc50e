"""From the executor back to the queue: replies, then acknowledgements, many at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from cqrs_es import errors, wire
from cqrs_es.ports.broker import OutgoingReply

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cqrs_es.ports.broker import CommandIntake
    from cqrs_es.runtime.in_hand import Held, InHand
    from cqrs_es.runtime.leases import Assignment
    from cqrs_es.runtime.process import Process

log = structlog.get_logger("cqrs_es.worker")


class Settler:
    """Settles one partition's deliveries, each after its outcome is committed."""

    def __init__(
        self, process: Process, intake: CommandIntake, in_hand: InHand, assignment: Assignment
    ) -> None:
        self._process = process
        self._intake = intake
        self._in_hand = in_hand
        self._assignment = assignment

    async def run(self) -> None:
        """Settle whatever is answered by the time the last settlement is done, for ever.

        Raises what kept a command from an outcome: it stays in the queue.
        """
        while True:
            done = await self._in_hand.take_done()
            await self._forgive(done)
            _raise_trouble(done)
            await self._reply(done)
            with self._process.meter.phase("settle"):
                await self._intake.settle([held.delivery for held in done])
            self._assignment.reached((self._assignment.position or 0) + len(done))
            await self._in_hand.settled(done)

    async def _forgive(self, done: Sequence[Held]) -> None:
        """Uncount attempts that ended in trouble: the process has not died of those commands."""
        ids = [
            held.message.id
            for held in done
            if held.attempted and held.message is not None and held.trouble is not None
        ]
        if ids:
            events = self._process.storage.events
            await self._process.outage().wait_out(lambda: events.forget_attempts(ids))

    async def _reply(self, done: Sequence[Held]) -> None:
        replies = [reply for held in done if (reply := _reply_for(held)) is not None]
        if not replies:
            return
        try:
            with self._process.meter.phase("reply"):
                await self._process.broker.reply(replies)
        except errors.BrokerUnavailable as exc:
            log.warning("replies lost", replies=len(replies), error=exc.message)


def _raise_trouble(done: Sequence[Held]) -> None:
    for held in done:
        if (trouble := held.trouble) is not None:
            raise trouble


def _reply_for(held: Held) -> OutgoingReply | None:
    message, answer = held.message, held.answer
    if message is None or message.reply_to is None or answer is None or answer.cancelled():
        return None
    outcome = answer.result()
    return OutgoingReply(message.reply_to, outcome.command_id, wire.encode_outcome(outcome))
