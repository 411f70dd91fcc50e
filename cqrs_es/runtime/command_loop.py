"""The command worker: from the queue to the executor, and the answers back (DESIGN §5).

A message is settled only after its outcome is committed, or it is in the
dead letters. What is in hand when the process dies is delivered again; what
was committed already is then answered from the store.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import structlog

from cqrs_es import errors, wire
from cqrs_es.execution.outage import Outage
from cqrs_es.ports.broker import OutgoingReply
from cqrs_es.ports.dead_letters import DeadLetter
from cqrs_es.runtime.dead_import import import_dead_letters
from cqrs_es.runtime.isolation import Isolation
from cqrs_es.runtime.waiting import unless
from cqrs_es.telemetry.meter import NO_METER, Meter
from cqrs_es.telemetry.tracing import NO_TRACING, Tracing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cqrs_es.execution.executor import Executor
    from cqrs_es.execution.work import Answer
    from cqrs_es.messages import CommandMessage, Outcome
    from cqrs_es.ports.broker import Broker, CommandIntake, Delivery
    from cqrs_es.ports.clock import Clock
    from cqrs_es.ports.leases import Lease
    from cqrs_es.ports.storage import Storage
    from cqrs_es.runtime.leases import Assignment

log = structlog.get_logger("cqrs_es.worker")

# A command that the process died of so often, first among other suspects and then
# alone, fails: the batch it first came in is one death more.
MOST_ATTEMPTS: Final = 2
# So many at most are to be tried one by one after the second death; more would
# recover faster from a death that none of them is to blame for.
SUSPECTS_TOGETHER: Final = 64
# Bytes of messages of one partition in hand, beside the number of commands: a queue of large
# ones must not become the process's memory.
MOST_BYTES_IN_HAND: Final = 16 * 1024 * 1024
# After so long without an error an intake is as good as one that had something to do.
CALM_SECONDS: Final = 1.0
PRUNE_CHUNK: Final = 1000
PRUNE_EVERY_SECONDS: Final = 60.0


class CommandWorker:
    """Consumes partitions of the command queue into one executor."""

    def __init__(  # noqa: PLR0913 - one argument for each part it works with
        self,
        storage: Storage,
        broker: Broker,
        executor: Executor,
        clock: Clock,
        *,
        max_message_bytes: int,
        most_in_hand: int,
        retention_days: float,
        meter: Meter = NO_METER,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self.storage = storage
        self.broker = broker
        self.executor = executor
        self.clock = clock
        self.isolation = Isolation(executor)
        self.max_message_bytes = max_message_bytes
        self.most_in_hand = most_in_hand
        self._retention = timedelta(days=retention_days)
        self.meter = meter
        self.tracing = tracing
        self.dead = 0

    async def run_partition(self, assignment: Assignment) -> None:
        """Consume a partition until stopped, then settle what is in hand."""
        lease = assignment.lease
        intake = await self.broker.open_intake(lease.partition, lease.owner)
        try:
            async with asyncio.TaskGroup() as group:
                consumer = _Consumer(self, intake, assignment)
                settling = group.create_task(consumer.settle_forever())
                pruning = group.create_task(self._prune_forever(lease.partition))
                importing = group.create_task(self._import_dead_letters(lease))
                calming = group.create_task(self._note_calm(assignment))
                await unless(assignment.stopping, consumer.take_forever())
                await consumer.drain()
                settling.cancel()
                pruning.cancel()
                importing.cancel()
                calming.cancel()
        except* errors.CqrsError as group_of_errors:
            raise _first(group_of_errors) from None
        finally:
            await intake.close()

    async def _note_calm(self, assignment: Assignment) -> None:
        """Note that all is well after a while: in an empty queue nothing else shows it."""
        if assignment.trouble is not None:
            await self.clock.sleep(CALM_SECONDS)
            assignment.went_well()

    async def bury(self, delivery: Delivery, reason: str) -> None:
        """Put a message that no outcome is possible for among the dead letters.

        Where the id that it bears has a letter already, of a command that
        failed perhaps, that one stays, and this one goes by its content.
        """
        letter = DeadLetter.of(
            delivery.body,
            reason=reason,
            source="commands",
            seen_at=self.clock.now(),
            limit=self.max_message_bytes,
            command_id=wire.command_id_of(delivery.body),
            headers=delivery.headers,
        )
        outage, letters = self.outage(), self.storage.dead_letters
        known = await outage.wait_out(lambda: letters.get(letter.id))
        if known is not None and known.body_hash != letter.body_hash:
            letter = replace(letter, id=letter.body_hash[:32])
        await outage.wait_out(lambda: letters.add(letter))
        self.dead += 1
        self.meter.dead_message()
        log.warning("message buried", dead_letter=letter.id, reason=reason)

    def outage(self) -> Outage:
        """Make what waits for the store for as long as it takes."""
        return Outage(self.clock, None, self.meter)

    async def _import_dead_letters(self, lease: Lease) -> None:
        """Fetch what the broker gave up; whoever holds partition 0 does it."""
        if lease.partition == 0:
            await import_dead_letters(self.broker, self.clock, lease.owner, self.bury)

    async def _prune_forever(self, partition: int) -> None:
        """Forget old outcomes in small chunks; whoever holds partition 0 does it."""
        while partition == 0:
            pruned = await self._try_prune()
            if pruned < PRUNE_CHUNK:
                await self.clock.sleep(PRUNE_EVERY_SECONDS)

    async def _try_prune(self) -> int:
        before = self.clock.now() - self._retention
        try:
            return await self.storage.events.prune_outcomes(before, PRUNE_CHUNK)
        except errors.CqrsError as exc:
            log.warning("outcomes not pruned", error=exc.message)
            return 0


@dataclass(slots=True, eq=False)
class _InHand:
    """A delivery on its way to being settled; `answer` is None for a buried one."""

    delivery: Delivery
    message: CommandMessage | None = None
    answer: Answer | None = None
    attempted: bool = False


class _Consumer:
    """One partition's deliveries, from the intake to their settlement."""

    def __init__(
        self, worker: CommandWorker, intake: CommandIntake, assignment: Assignment
    ) -> None:
        self._worker = worker
        self._intake = intake
        self._assignment = assignment
        assignment.in_hand = 0
        self._bytes_in_hand = 0
        self._done: deque[_InHand] = deque()
        self._something_done = asyncio.Event()
        self._some_settled = asyncio.Condition()

    # --- Taking --------------------------------------------------------------

    async def take_forever(self) -> None:
        """Receive and submit, never more than the bound at once."""
        while True:
            room = await self._room()
            received = await self._intake.receive(room)
            for redelivered, some in itertools.groupby(received, lambda it: it.redelivered):
                if redelivered:
                    await self._take_again(list(some))
                else:
                    await self._take(some)

    async def _room(self) -> int:
        async with self._some_settled:
            await self._some_settled.wait_for(self._has_room)
        return self._worker.most_in_hand - self._assignment.in_hand

    def _has_room(self) -> bool:
        few = self._assignment.in_hand < self._worker.most_in_hand
        return few and self._bytes_in_hand < MOST_BYTES_IN_HAND

    def _hold(self, in_hand: _InHand) -> None:
        self._assignment.in_hand += 1
        self._bytes_in_hand += len(in_hand.delivery.body)

    async def _take(self, deliveries: Iterable[Delivery]) -> None:
        for delivery in deliveries:
            message = await self._parsed(delivery)
            if message is not None:
                self._worker.meter.delivered(delivery.queued_at, message.sent_at)
                await self._worker.isolation.wait_open()
                _ = self._submit(delivery, message)

    async def _parsed(self, delivery: Delivery) -> CommandMessage | None:
        """Read a message; bury what is none."""
        try:
            return wire.parse_command(delivery.body, self._worker.max_message_bytes)
        except errors.InvalidMessage as exc:
            await self._worker.bury(delivery, exc.message)
            buried = _InHand(delivery)
            self._hold(buried)
            self._note_done(buried)
            return None

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
        outage, events = self._worker.outage(), self._worker.storage.events
        ids = {message.id for _, message in suspects}
        unanswered = ids - (await outage.wait_out(lambda: events.find_outcomes(ids))).keys()
        async with self._worker.isolation.alone():
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
        outage, events = self._worker.outage(), self._worker.storage.events
        attempts = await outage.wait_out(lambda: events.record_attempt(message.id))
        log.warning("command attempted again", command_id=message.id, attempts=attempts)
        await _all_answered([self._submit(delivery, message, attempts)])

    def _submit(self, delivery: Delivery, message: CommandMessage, attempts: int = 0) -> Answer:
        condemned = None
        if attempts > MOST_ATTEMPTS:
            condemned = f"the process died at {attempts} attempts to handle the command"
        span = self._worker.tracing.processing(message, self._assignment.lease.partition)
        answer = self._worker.executor.submit(
            message, attempts=attempts, condemned=condemned, span=span
        )
        in_hand = _InHand(delivery, message, answer, attempted=attempts > 0)
        self._hold(in_hand)
        answer.add_done_callback(lambda _: self._note_done(in_hand))
        return answer

    # --- Settling ------------------------------------------------------------

    def _note_done(self, in_hand: _InHand) -> None:
        if in_hand.answer is not None and not in_hand.answer.cancelled():
            # Where all of a batch fail of one cause only the first is raised: note them all.
            in_hand.answer.exception()
        self._done.append(in_hand)
        self._something_done.set()

    async def settle_forever(self) -> None:
        """Settle whatever is answered by the time the last settlement is done."""
        while True:
            await self._something_done.wait()
            self._something_done.clear()
            done = [self._done.popleft() for _ in range(len(self._done))]
            await self._forgive(done)
            self._raise_troubles(done)
            await self._reply([item for item in done if item.message and item.message.reply_to])
            with self._worker.meter.phase("settle"):
                await self._intake.settle([item.delivery for item in done])
            self._assignment.reached((self._assignment.position or 0) + len(done))
            async with self._some_settled:
                self._assignment.in_hand -= len(done)
                self._bytes_in_hand -= sum(len(item.delivery.body) for item in done)
                self._some_settled.notify_all()

    async def drain(self) -> None:
        """Wait until everything taken is settled."""
        async with self._some_settled:
            await self._some_settled.wait_for(lambda: self._assignment.in_hand == 0)

    async def _forgive(self, done: Sequence[_InHand]) -> None:
        """Uncount attempts that ended in trouble: the process has not died of those commands."""
        ids = [
            item.message.id
            for item in done
            if item.attempted and item.message is not None and _trouble_of(item) is not None
        ]
        if not ids:
            return
        outage = self._worker.outage()
        await outage.wait_out(lambda: self._worker.storage.events.forget_attempts(ids))

    @staticmethod
    def _raise_troubles(done: Sequence[_InHand]) -> None:
        """Give the partition up where a command got no outcome; it stays in the queue."""
        for item in done:
            if (trouble := _trouble_of(item)) is not None:
                raise trouble

    async def _reply(self, items: Sequence[_InHand]) -> None:
        replies = [_reply_for(item.message, item.answer) for item in items]
        wanted = [reply for reply in replies if reply is not None]
        if not wanted:
            return
        try:
            with self._worker.meter.phase("reply"):
                await self._worker.broker.reply(wanted)
        except errors.BrokerUnavailable as exc:
            log.warning("replies lost", replies=len(wanted), error=exc.message)


async def _all_answered(answers: Sequence[Answer]) -> None:
    if answers:
        await asyncio.wait(answers)


def _trouble_of(item: _InHand) -> BaseException | None:
    """Return why a command got no outcome, None when it got one."""
    if item.answer is None or item.answer.cancelled():
        return None
    return item.answer.exception()


def _reply_for(message: CommandMessage | None, answer: Answer | None) -> OutgoingReply | None:
    if message is None or message.reply_to is None or answer is None or answer.cancelled():
        return None
    outcome: Outcome = answer.result()
    return OutgoingReply(message.reply_to, outcome.command_id, wire.encode_outcome(outcome))


def _first(group: ExceptionGroup[errors.CqrsError]) -> Exception:
    """Return the first error within a group, however deeply it is wrapped."""
    error: Exception = group
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
