"""From the queue to the executor: in order, never more than the bounds, suspects first alone."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Final

import structlog

from cqrs_es import errors, wire
from cqrs_es.runtime.in_hand import Held, InHand

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cqrs_es.execution.stages import Answer
    from cqrs_es.messages import CommandMessage
    from cqrs_es.ports.broker import CommandIntake, Delivery
    from cqrs_es.runtime.dead_messages import DeadMessages
    from cqrs_es.runtime.isolation import Isolation
    from cqrs_es.runtime.process import Process

log = structlog.get_logger("cqrs_es.worker")

# A command that the process died of so often, first among other suspects and then
# alone, fails: the batch it first came in is one death more.
MOST_ATTEMPTS: Final = 2
# So many at most are to be tried one by one after the second death; more would
# recover faster from a death that none of them is to blame for.
SUSPECTS_TOGETHER: Final = 64


class Taker:
    """Submits one partition's deliveries, and buries those that are no commands."""

    def __init__(
        self,
        process: Process,
        dead: DeadMessages,
        isolation: Isolation,
        intake: CommandIntake,
        in_hand: InHand,
        partition: int,
    ) -> None:
        self._process = process
        self._dead = dead
        self._isolation = isolation
        self._intake = intake
        self._in_hand = in_hand
        self._partition = partition

    async def run(self) -> None:
        """Receive and submit, never more than the bounds at once, for ever."""
        while True:
            received = await self._intake.receive(await self._in_hand.room())
            for redelivered, some in itertools.groupby(received, lambda it: it.redelivered):
                if redelivered:
                    await self._take_again(list(some))
                else:
                    await self._take(some)

    async def _take(self, deliveries: Iterable[Delivery]) -> None:
        for delivery in deliveries:
            message = await self._parsed(delivery)
            if message is not None:
                self._process.meter.delivered(delivery.queued_at, message.sent_at)
                await self._isolation.wait_open()
                _ = self._submit(delivery, message)

    async def _parsed(self, delivery: Delivery) -> CommandMessage | None:
        """Read a message; bury what is none."""
        try:
            return wire.parse_command(delivery.body, self._process.settings.max_message_bytes)
        except errors.InvalidMessage as exc:
            await self._dead.bury(delivery, exc.message)
            buried = Held(delivery)
            self._in_hand.add(buried)
            self._in_hand.note_done(buried)
            return None

    def _submit(self, delivery: Delivery, message: CommandMessage, attempts: int = 0) -> Answer:
        condemned = None
        if attempts > MOST_ATTEMPTS:
            condemned = f"the process died at {attempts} attempts to handle the command"
        span = self._process.tracing.processing(message, self._partition)
        answer = self._process.executor.submit(
            message, attempts=attempts, condemned=condemned, span=span
        )
        held = Held(delivery, message, answer, attempted=attempts > 0)
        self._in_hand.add(held)
        answer.add_done_callback(lambda _: self._in_hand.note_done(held))
        return answer

    # --- What was out when a process ended -----------------------------------

    async def _take_again(self, deliveries: Sequence[Delivery]) -> None:
        """Handle what was out when a process ended, in order and few at a time.

        Most of it is innocent, and was only near the command that the process
        died of, if it did. So the first time they go together, an attempt at
        each recorded first; who was among those when the process died again
        goes alone from then on.
        """
        for start in range(0, len(deliveries), SUSPECTS_TOGETHER):
            few = deliveries[start : start + SUSPECTS_TOGETHER]
            messages = [(each, await self._parsed(each)) for each in few]
            suspects = [(each, message) for each, message in messages if message is not None]
            if suspects:
                await self._take_suspects(suspects)

    async def _take_suspects(self, suspects: Sequence[tuple[Delivery, CommandMessage]]) -> None:
        outage, events = self._process.outage(), self._process.storage.events
        ids = {message.id for _, message in suspects}
        unanswered = ids - (await outage.wait_out(lambda: events.find_outcomes(ids))).keys()
        async with self._isolation.alone():
            before = await outage.wait_out(lambda: events.record_first_attempts(unanswered))
            log.info("commands redelivered", commands=len(unanswered), attempted=len(before))
            together: list[Answer] = []
            for delivery, message in suspects:
                if message.id in before:
                    await _all_answered(together)
                    await self._take_alone(delivery, message)
                else:
                    attempts = 1 if message.id in unanswered else 0
                    together.append(self._submit(delivery, message, attempts))
            await _all_answered(together)

    async def _take_alone(self, delivery: Delivery, message: CommandMessage) -> None:
        """Handle a command with nothing beside it, its attempt recorded first."""
        outage, events = self._process.outage(), self._process.storage.events
        attempts = await outage.wait_out(lambda: events.record_attempt(message.id))
        log.warning("command attempted again", command_id=message.id, attempts=attempts)
        await _all_answered([self._submit(delivery, message, attempts)])


async def _all_answered(answers: Sequence[Answer]) -> None:
    if answers:
        await asyncio.wait(answers)
